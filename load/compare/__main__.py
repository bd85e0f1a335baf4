"""Compare workers: every worker under every load, in turn, as many rounds as asked for.

Prints a table, and writes compare.json (every sample) and compare.svg (a picture) to --out. Ratios are taken within a
round, so that a machine that is slower for a while is so for both sides; then the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial
from pathlib import Path

from load.compare import chart
from load.compare.ceiling import measure_ceiling
from load.compare.contenders import BASELINE, CONTENDERS, Contender
from load.compare.limit import LIMITS, measure_limit
from load.compare.measure import Failed, measure
from load.compare.report import Report
from load.compare.task import LOADS, Load
from rich.console import Console
from rich.status import Status

PLAIN_WIDTH = 110
"""Columns where the output is no terminal."""
EXAMPLES = """\
examples:
  python -m load.compare                                        everything, three rounds (up to an hour)
  python -m load.compare --load cpu io --worker asyncio cvworker --rounds 1
  python -m load.compare --load r50 --worker asyncio cvworker cvworker-auto --seconds 20
  python -m load.compare --no-limits --out build/compare
"""


def main() -> int:
    """The exit code: 0, or 1 where a worker failed."""
    parser = argparse.ArgumentParser(
        "python -m load.compare",
        description=__doc__,
        epilog="\n".join(
            [EXAMPLES, "workers:", *_told(), "", "loads:", *(f"  {n:18} {LOADS[n].summary}" for n in LOADS)]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--worker", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="WORKER")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a window (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--no-limits", action="store_true", help="leave out the limits of the machine and of the world")
    parser.add_argument("--out", type=Path, default=Path("build/compare"), help="folder for the files")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, as Ctrl-C does
    given.out.mkdir(parents=True, exist_ok=True)
    report, console = Report(given.seconds, given.rounds), Console()
    console = console if console.is_terminal else Console(width=PLAIN_WIDTH)
    workers = [CONTENDERS[name] for name in given.worker]
    report.notes += [each.missing for each in workers if each.missing]
    workers = [each for each in workers if not each.missing]
    try:
        with console.status("") as status:
            if not given.no_limits:
                _limits(report, status, given.load)
            failed = _rounds(report, status, [LOADS[name] for name in given.load], workers)
    except KeyboardInterrupt:
        failed = True
        report.notes.append("interrupted: what follows is incomplete")
    for note in report.notes:
        console.print(note, style="yellow", markup=False)
    if report.samples:
        console.print(report.table())
        for line in report.limit_lines():
            console.print(line, style="dim", markup=False, highlight=False)
        path = report.write(given.out)
        picture = given.out / "compare.svg"
        picture.write_text(chart.draw(report))
        console.print(f"{path}, {picture}", markup=False)
    return 1 if failed else 0


def _told() -> list[str]:
    return [f"  {each.name:18} {each.summary} ({', '.join(each.loads)})" for each in CONTENDERS.values()]


def _tell(status: Status, title: str, what: str) -> None:
    status.update(f"{title}: {what}")


def _limits(report: Report, status: Status, loads: list[str]) -> None:
    """Of the machine, for the loads that are run, and of the world."""
    for name in LIMITS:
        if name != "r50" or "r50" in loads:
            status.update(f"limit: {LIMITS[name]}")
            report.limits.append(measure_limit(name, report.seconds / 2))
    status.update("limit: the world")
    report.ceiling = measure_ceiling(report.seconds / 2)


def _rounds(report: Report, status: Status, loads: list[Load], workers: list[Contender]) -> bool:
    """Every worker under every load, in turn; whether one failed, which does not end the run."""
    failed = False
    for number in range(1, report.rounds + 1):
        for load in loads:
            for worker in (each for each in workers if load.name in each.loads):
                title = f"round {number} of {report.rounds}: {worker.name} on {load.name}"
                try:
                    sample = measure(worker, load, number, report.seconds, partial(_tell, status, title))
                except Failed as error:
                    failed = True
                    report.notes.append(f"{title}: {error}")
                    continue
                report.samples.append(sample)
                baseline = "" if worker.name != BASELINE else ", the baseline"
                shown = f"{sample.images_s:.1f} images/s, {sample.cpu_ms:.2f} CPU ms{baseline}"
                status.console.print(f"{title}: {shown}", markup=False, highlight=False)
    return failed


if __name__ == "__main__":
    sys.exit(main())
