"""The limits of the machine for this work: decoding and resizing alone on all cores, and the model alone.

``python -m load.compare.limit NAME SECONDS`` measures one and prints it as JSON. The runner calls it so, because
torch's thread settings and memory must not stay behind in it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from load.compare.contenders import ROOT

DECODE, DECODE_MIN_SIDE, MODEL = "decode + resize", "decode + resize, min_side", "model at batch 8"
LIMITS = {"full": DECODE, "min-side": DECODE_MIN_SIDE, "r50": MODEL}
_SHORT_S = 600.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What one part of the work can reach by itself."""

    name: str
    images_s: float
    cpu_ms: float


def measure_limit(name: str, seconds: float) -> Limit:
    """In a process of its own."""
    command = [sys.executable, "-m", "load.compare.limit", name, str(seconds)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=_SHORT_S)
    return Limit(**json.loads(found.stdout))


def _repeat(work: Callable[[], int], seconds: float) -> tuple[float, float]:
    """Images/s and CPU ms an image of ``work``, which tells how many images it did."""
    work()
    began, cpu, images = time.monotonic(), time.process_time(), 0
    while (elapsed := time.monotonic() - began) < seconds:
        images += work()
    return images / elapsed, 1000 * (time.process_time() - cpu) / images


def _decode(arguments: tuple[int, float]) -> tuple[float, float]:
    import torch
    from load.compare.pictures import pictures
    from load.compare.task import decode, preprocess

    torch.set_num_threads(1)
    side, seconds = arguments
    images = pictures()

    def work() -> int:
        for data in images:
            preprocess(decode(data, side))
        return len(images)

    return _repeat(work, seconds)


def _model(seconds: float) -> tuple[float, float]:
    import torch
    from load.compare.task import BATCH, SIDE, make_model

    model = make_model("r50")
    batch = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    return _repeat(lambda: len(model(batch)), seconds)


def main(name: str, seconds: float) -> Limit:
    """Measure here."""
    if LIMITS[name] == MODEL:
        return Limit(LIMITS[name], *_model(seconds))
    from load.compare.task import SIDE

    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        found = pool.map(_decode, [(SIDE if name == "min-side" else 0, seconds)] * cores, chunksize=1)
    return Limit(LIMITS[name], sum(each[0] for each in found), sum(each[1] for each in found) / cores)


if __name__ == "__main__":
    print(json.dumps(asdict(main(sys.argv[1], float(sys.argv[2])))))
