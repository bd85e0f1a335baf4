"""``python -m load.proof``: prediction, measurement and difference; ends with 1 where a bound is not kept.

One worker is measured with single messages first: what a batch takes is known, and everything else of a message's way
is taken from that. Then 1, 2 and 4 real workers get Poisson traffic at shares of what the planner says they can do,
and the planner's simulation gets the same arrivals. Below the knee (shares under 0.7) throughput has to agree within
15 % and the 95th percentile within 25 %; above it, with more offered than they can do, throughput within 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from load.proof.predict import Calibration, pace, predict
from load.proof.world import World, world
from load.scenarios.rows import BEHIND_S, BEHIND_SHARE
from rich import box
from rich.console import Console
from rich.table import Table

from cvworker import __version__

RATE_BOUND, P95_BOUND = 0.15, 0.25
KNEE = 0.7
"""Of what all workers together can do. Their shares of it are not equal: who has more calls waiting gets more."""
LONE_EVERY_S = 0.9
WARM_UP = 16
PIPE_WIDTH = 160
ROOT = Path(__file__).parents[2]


def main() -> int:
    """The exit code: 0, or 1 where a bound is not kept or a run does not count."""
    parser = argparse.ArgumentParser(
        "python -m load.proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.65, 1.3], help="of what they can do")
    parser.add_argument("--seconds", type=float, default=30.0, help="of traffic for each run (default: %(default)s)")
    parser.add_argument("--lone", type=int, default=25, help="single messages to measure one worker with")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/plan-proof.json"))
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cvworker-proof-") as folder, world(Path(folder), given.seed) as here:
        with here.workers(1):
            console.print("one worker, single messages")
            found = calibrate(here, given.lone, given.seed)
        for workers in given.workers:
            with here.workers(workers):
                here.offer(np.linspace(0.0, 1.0, WARM_UP * workers))
                for share in given.shares:
                    console.print(f"{workers} of them at {share:g} of what they can do")
                    rows.append(run(here, found, workers, share, given.seconds, given.seed + len(rows)))
    result = described(found, given, rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    part = given.out.with_name(f".{given.out.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(given.out)
    show(rows, console)
    console.print(f"written to {given.out}")
    return 0 if all(row["kept"] for row in rows) else 1


def calibrate(here: World, count: int, seed: int) -> Calibration:
    """Single messages, never two at once."""
    here.offer([0.0, 0.1, 0.2, 0.3])
    spread = np.random.default_rng(seed).uniform(
        0, 0.2, count
    )  # so as not to keep time with anything that looks now and then
    latencies, _, answers = here.offer((np.arange(count) * LONE_EVERY_S + spread).tolist())
    timings = [answer["timings_ms"] for answer in answers]
    return Calibration(
        lone_s=float(np.median(latencies)),
        preprocess_s=float(np.median([each["preprocess"] for each in timings])) / 1000,
        download_s=float(np.median([each["download"] for each in timings])) / 1000,
    )


def run(here: World, found: Calibration, workers: int, share: float, seconds: float, seed: int) -> dict[str, Any]:
    """One traffic, predicted and measured."""
    rate = share * workers * pace(found)
    random = np.random.default_rng(seed)
    arrivals = np.sort(random.uniform(0.0, seconds, int(random.poisson(rate * seconds))))
    predicted = predict(found, workers, arrivals, seconds)
    latencies, behind, answers = here.offer(arrivals.tolist())
    achieved = float(np.count_nonzero(arrivals + latencies <= seconds)) / seconds
    p50, p95 = (float(np.quantile(latencies, at, method="inverted_cdf")) for at in (0.5, 0.95))
    rate_off, p95_off = predicted.images_s / achieved - 1, predicted.p95_s / p95 - 1
    late = float(np.mean(behind > BEHIND_S))
    return {
        "workers": workers,
        "share": share,
        "offered": len(arrivals) / seconds,
        "images": len(arrivals),
        "repeats": len(answers) - len(arrivals),
        "predicted": {"images_s": predicted.images_s, "p50_s": predicted.p50_s, "p95_s": predicted.p95_s},
        "measured": {"images_s": achieved, "p50_s": p50, "p95_s": p95},
        "difference": {"images_s": rate_off, "p50_s": predicted.p50_s / p50 - 1, "p95_s": p95_off},
        "sent_late": late,
        "valid": late <= BEHIND_SHARE,
        "kept": late <= BEHIND_SHARE and abs(rate_off) <= RATE_BOUND and (share >= KNEE or abs(p95_off) <= P95_BOUND),
    }


def described(found: Calibration, given: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": "python -m load.proof " + " ".join(sys.argv[1:]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cvworker": __version__,
        "commit": commit.stdout.strip() or None,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "bounds": {"images_s": RATE_BOUND, "p95_s": P95_BOUND, "below": KNEE},
        "seconds": given.seconds,
        "seed": given.seed,
        "calibration": {
            "lone_s": found.lone_s,
            "preprocess_s": found.preprocess_s,
            "download_s": found.download_s,
            "overhead_s": found.overhead_s,
        },
        "pace_images_s": pace(found),
        "kept": all(row["kept"] for row in rows),
        "rows": rows,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prediction | measured | difference."""
    table = Table("workers", "offered/s", box=box.SIMPLE_HEAD, pad_edge=False)
    for what in ("images/s", "p50 s", "p95 s"):
        for column in (f"{what} predicted", "measured", "difference"):
            table.add_column(column, justify="right")
    table.add_column("kept")
    for row in rows:
        cells = []
        for name in ("images_s", "p50_s", "p95_s"):
            digits = 1 if name == "images_s" else 3
            cells += [f"{row[which][name]:.{digits}f}" for which in ("predicted", "measured")]
            cells.append(f"{row['difference'][name]:+.1%}")
        kept = "yes" if row["kept"] else "NO" if row["valid"] else "fell behind"
        table.add_row(str(row["workers"]), f"{row['offered']:.1f}", *cells, kept)
    console.print(table)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"took {time.monotonic() - began:.0f} s")
    sys.exit(code)
