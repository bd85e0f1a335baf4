"""The pace of ``cvworker bulk`` beside the worker's own, for a module that is bound by its model.

``python -m load.bulk`` runs both in turn over the same pictures from the same host, start-up left out: ResNet-18 in
fp32 on the CPU. The worker is measured over a window after its warm-up. Bulk is measured from its first partition to
its last, so that what it had prepared before the first is its gain, and what it drains at the end is its loss. CPU time
is that of all processes: on a machine that others use as well, it is the steadier figure of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from load.compare.contenders import MODULES, Contender
from load.compare.measure import worker as started
from load.compare.measure import world
from load.compare.pictures import COUNT
from load.compare.task import LOADS
from rich.console import Console
from rich.table import Table

from cvworker.bench import tree

LOAD = LOADS["cpu"]
OURS = Contender("cvworker", "its defaults", module="Small", settings={"PRECISION": "fp32", "LOG_LEVEL": "warning"})
PARTITION = 50
WARM = 100
"""Answers of the worker before its window begins."""
START_S = 300.0
"""For a start, and for a window."""
LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Pace:
    """Images a second, and milliseconds of CPU time for each, of all processes together."""

    images_s: float
    cpu_ms: float


def worker_pace(images: int) -> Pace:
    """The pace of ``cvworker run``, over as many answers as bulk is given."""
    with world(LOAD) as peer, started(OURS, LOAD, peer.base) as (process, log):

        def answered(count: float) -> tuple[float, float, float]:
            until = time.monotonic() + START_S
            while (now := peer.counts())["callbacks"] < count:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the worker does not work:\n{log.read_text()[-2000:]}")
                time.sleep(LOOK_S)
            return now["callbacks"], now["at"], sum(tree.cpu_seconds(process.pid).values())

        before = answered(WARM)
        return _pace(before, answered(before[0] + images - PARTITION))


def bulk_pace(images: int) -> Pace:
    """The pace of ``cvworker bulk``, from its first partition to its last."""
    with world(LOAD) as peer, tempfile.TemporaryDirectory(prefix="cvworker-bulk-") as name:
        folder = Path(name)
        rows = ({"image_url": f"{peer.base}/i/{n % COUNT}.jpg"} for n in range(images))
        (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-m", "cvworker", "bulk", "--module", f"{MODULES}:Small", "--input", "images.jsonl"]
        command += ["--output", "results", "--partition-rows", str(PARTITION)]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                command,
                env=OURS.environment(peer.base),
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # as the worker has: a scheduler may share the cores out by session
            )

        def written(count: float) -> tuple[float, float, float]:
            until = time.monotonic() + START_S
            while (done := PARTITION * len(list(folder.glob("results/part-*")))) < count:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"bulk does not work:\n{(folder / 'log').read_text()}")
                time.sleep(LOOK_S)
            return done, time.monotonic(), sum(tree.cpu_seconds(process.pid).values())

        try:
            before = written(PARTITION)
            return _pace(before, written(images - PARTITION))  # while all of its processes are there to be looked at
        finally:
            tree.end(process.pid)


def _pace(before: tuple[float, float, float], after: tuple[float, float, float]) -> Pace:
    done, seconds, cpu = (late - early for early, late in zip(before, after, strict=True))
    return Pace(done / seconds, 1000 * cpu / done)


def main() -> None:
    parser = argparse.ArgumentParser("python -m load.bulk", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help=f"in a round; a multiple of {PARTITION}")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    table = Table("round", "worker", "bulk", "images/s, bulk / worker", "per CPU second, bulk / worker", box=None)
    ratios: list[tuple[float, float]] = []
    for number in range(1, given.rounds + 1):
        pair = (worker_pace, bulk_pace) if number % 2 else (bulk_pace, worker_pace)  # neither is always first
        found = {measure: measure(given.images) for measure in pair}
        own, bulk = found[worker_pace], found[bulk_pace]
        ratios.append((bulk.images_s / own.images_s, own.cpu_ms / bulk.cpu_ms))
        shown = (f"{each.images_s:.1f} images/s, {each.cpu_ms:.1f} ms CPU each" for each in (own, bulk))
        table.add_row(str(number), *shown, *(f"{ratio:.2f}" for ratio in ratios[-1]))
        print(f"round {number} of {given.rounds} is done", file=sys.stderr, flush=True)
    medians = (f"{statistics.median(column):.2f}" for column in zip(*ratios, strict=True))
    table.add_row("median", "", "", *medians)
    console = Console(width=140)
    console.print(table)
    console.print(f"{given.images} images a round, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
