"""One measurement: a world and a worker in processes of their own, warm-up, a window, and what happened in it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from load.compare.contenders import ROOT, Contender
from load.compare.task import Load

from cvworker.bench import tree
from cvworker.bench.world import pace

WARM_S, WARM_AT_MOST_S = 3.0, 15.0
"""Seconds after the first answer: at least, and at most where answers are too few to wait for."""
START_S = 120.0
LOOK_S = 0.1
Tell = Callable[[str], None]


class Failed(Exception):
    """A worker that did not start or ended by itself; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One window of one worker under one load."""

    worker: str
    load: str
    round: int
    seconds: float
    answers: int
    images_s: float
    cpu_ms: float
    """CPU time of the worker's process tree per answer."""
    split_cpu_ms: tuple[float, ...]
    """The same by process, in the order of the tree: itself, then its children."""
    world_cpu_ms: float
    pss_mb: float
    start_s: float
    """From its start to its first answer."""
    processes: int
    repeats: int
    errors: int
    expired: int
    held: int
    """Messages in flight at the end of the window."""
    extensions: int

    def json(self) -> dict[str, object]:
        return asdict(self)


class Peer:
    """The world's process, as the runner sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self.base = f"http://127.0.0.1:{self.port}"
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def counts(self) -> dict[str, float]:
        self._connection.request("GET", "/counts")
        with self._connection.getresponse() as response:
            counts: dict[str, float] = json.load(response)
            return counts


@contextmanager
def world(load: Load, backlog: int | None = None, messages: str = "plain", every: float = 0.0) -> Iterator[Peer]:
    """A world of its own for each measurement, so that none begins with what another left."""
    command = [sys.executable, "-m", "load.compare.world"]
    command += ["--image-ms", str(load.image_ms), "--callback-ms", str(load.callback_ms), "--messages", messages]
    command += ["--every", str(every)]
    command += ["--backlog", str(backlog)] if backlog is not None else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        yield Peer(process)
    finally:
        tree.end(process.pid)
        process.wait()


@contextmanager
def worker(contender: Contender, load: Load, base: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The worker and its log; when the block ends nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="cvworker-compare-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                contender.command(base, load.name),
                env=contender.environment(base),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,  # Ctrl-C goes to the runner, which ends it in order
            )
        try:
            yield process, log
        finally:
            tree.end(process.pid)
            process.wait()


def measure(contender: Contender, load: Load, number: int, seconds: float, tell: Tell) -> Sample:
    """Run one worker under one load. Raises Failed where it does not work."""
    with world(load, messages=contender.messages) as peer, worker(contender, load, peer.base) as (process, log):

        def look() -> dict[str, float]:
            time.sleep(LOOK_S)
            if process.poll() is not None:
                raise Failed(f"{contender.name} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            return peer.counts()

        began = peer.counts()["at"]
        while not (now := look())["callbacks"]:
            tell(f"starting, {now['at'] - began:.0f} s")
            if now["at"] - began > START_S:
                raise Failed(f"{contender.name} answered nothing in {START_S:.0f} s:\n{log.read_text()[-2000:]}")
        first = now["at"]
        while (warm := now["at"] - first) < WARM_S or (now["callbacks"] < load.warm_answers and warm < WARM_AT_MOST_S):
            tell("warming up")
            now = look()
        pss = tree.pss_bytes(process.pid)  # outside the window: with six processes a look takes 60 ms of CPU
        before, cpu_before = look(), tree.cpu_seconds(process.pid)
        now = before
        while (elapsed := now["at"] - before["at"]) < seconds:
            tell(f"{elapsed:.0f} of {seconds:.0f} s")
            now = look()
        cpu_after = tree.cpu_seconds(process.pid)
        cpu = sum(cpu_after.values()) - sum(cpu_before.values())
        pss = max(pss, tree.pss_bytes(process.pid))
        took = {name: value - before[name] for name, value in now.items() if not isinstance(value, str)}
        images_s = pace(before, now)
        answers = max(1.0, images_s * took["at"])
        return Sample(
            worker=contender.name,
            load=load.name,
            round=number,
            seconds=took["at"],
            answers=int(took["callbacks"]),
            images_s=images_s,
            cpu_ms=1000 * cpu / answers,
            split_cpu_ms=tuple(1000 * (cpu_after[i] - cpu_before.get(i, 0.0)) / answers for i in cpu_after),
            world_cpu_ms=1000 * took["cpu"] / answers,
            pss_mb=pss / 2**20,
            start_s=first - began,
            processes=len(tree.members(process.pid)),
            repeats=int(now["repeats"]),
            errors=int(now["errors"]),
            expired=int(now["expired"]),
            held=int(now["held"]),
            extensions=int(now["visibility_changes"]),
        )
