"""What the driver says of one GPU while something runs on it, by ``nvidia-smi``; nothing where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from statistics import mean
from typing import Self

MIB = 2**20
LOOK_MS = 250
STOP_S = 5.0
PROGRAM = "nvidia-smi"


class Gpu:
    """Watches the GPU that ``device`` (the setting) means, for as long as its context lasts.

    By a process, not by torch: a CUDA context of our own would occupy memory on the device that is measured.
    """

    def __init__(self, device: str) -> None:
        self._place = None if device == "cpu" or shutil.which(PROGRAM) is None else _place(device)
        self._process: subprocess.Popen[str] | None = None
        self._seen: list[tuple[float, float | None, float | None]] = []
        """When (monotonic), percent of the last moments in which something ran, and MiB taken by everybody."""

    def __enter__(self) -> Self:
        if self._place is not None:
            fields = "--query-gpu=utilization.gpu,memory.used"
            self._process = subprocess.Popen(
                [PROGRAM, "-i", self._place, fields, "--format=csv,noheader,nounits", "-lms", str(LOOK_MS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                process_group=0,  # Ctrl-C goes to the command, which ends it
            )
            threading.Thread(target=self._read, args=(self._process,), name="gpu", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def busy(self, begin: float, end: float) -> float | None:
        """Mean share of a stretch of time (monotonic) in which something ran, 0 to 1; None where it is not known."""
        shares = [share for at, share, _ in self._seen if share is not None and begin <= at <= end]
        return mean(shares) / 100 if shares else None

    def taken(self, begin: float, end: float) -> list[int]:
        """Bytes taken, by everybody, at each look in a stretch of time."""
        return [round(mib * MIB) for at, _, mib in self._seen if mib is not None and begin <= at <= end]

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                share, _, mib = line.partition(",")
                self._seen.append((time.monotonic(), _number(share), _number(mib)))


def _place(device: str) -> str:
    """What ``nvidia-smi -i`` takes for a device as torch counts them, which sees only those it is shown."""
    number = int(device.partition(":")[2] or 0)
    shown = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    return shown[number] if number < len(shown) else str(number)


def _number(text: str) -> float | None:
    """None for ``[N/A]``, as slices of a GPU answer."""
    try:
        return float(text)
    except ValueError:
        return None
