"""From JPEG bytes over loopback HTTP to the callback, with the whole worker: a network at 224 on a device.

Every combination of --decode, --optimize, --batch and --processes is run in turn, after the limits: the network alone
on data that is on the device, and decoding alone. Prints a table, and writes device.json (every sample) and device.svg
to --out. What no longer fits into --minutes is left out, and said so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from load.compare.ceiling import measure_ceiling
from load.compare.measure import Failed
from load.device import alone
from load.device.report import GOAL, Report
from load.device.run import START_S, WARM_S, Plan, measure
from rich.console import Console
from rich.status import Status

PLAIN_WIDTH = 180
"""Columns where the output is no terminal."""
USUAL_START_S = {"off": 12.0, "auto": 15.0, "full": 90.0}
"""What a start takes, for the estimate; with many processes or a busy machine it takes longer."""
EXAMPLES = """\
examples:
  python -m load.device                                             batches of 8, 32 and 128; 1, 2 and 4 processes
  python -m load.device --batch 8 32 --processes 1 2 --decode cpu device --optimize off auto full --minutes 60
  python -m load.device --batch 16 64 256 --processes 8 --decode device --seconds 10
  python -m load.device --device cpu --network resnet18 --batch 8 --processes 1 --seconds 5    where there is no GPU
"""


def main() -> int:
    """The exit code: 0, 1 where a run failed, 2 where the device is not there."""
    given = _arguments()
    device = _device(given.device)
    if device is None:
        print(f"device: {given.device} is not there; give --device cpu to try this without one", file=sys.stderr)
        return 2
    os.environ["LOAD_NETWORK"] = given.network  # the worker's processes inherit it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, as Ctrl-C does
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console = console if console.is_terminal else Console(width=PLAIN_WIDTH)
    report, plans = Report(device, given.seconds), _plans(given, device)
    if device == "cpu" and "device" in given.decode:
        report.notes.append("decode device: left out, the CPU is no device to decode on")
    until = time.monotonic() + 60 * given.minutes
    _say(console, f"{len(plans)} runs, about {_minutes(plans, given.seconds):.0f} minutes; {given.minutes:g} at most")
    failed = False
    try:
        with console.status("") as status:
            if not given.no_limits:
                _limits(report, plans, given.precision, until, status)
            failed = _runs(report, plans, until, status)
    except KeyboardInterrupt:
        failed = True
        report.notes.append("interrupted: what follows is incomplete")
    _show(console, report, given.out)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m load.device",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--network", default="resnet50", help="a classifier of torchvision (default: resnet50)")
    parser.add_argument("--decode", nargs="+", choices=("cpu", "device"), default=["cpu", "device"])
    parser.add_argument("--optimize", nargs="+", choices=tuple(START_S), default=["auto"])
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a window (default: 5)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    parser.add_argument("--no-limits", action="store_true", help="leave out the parts alone")
    parser.add_argument("--out", type=Path, default=Path("build/device"), help="folder for the files")
    return parser.parse_args()


def _device(wanted: str) -> str | None:
    import torch

    count = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda:0"
    if wanted == "cpu":
        return wanted
    kind, _, index = wanted.partition(":")
    known = kind == "cuda" and (index or "0").isdigit() and int(index or 0) < count
    return f"cuda:{index or 0}" if known else None


def _plans(given: argparse.Namespace, device: str) -> list[Plan]:
    """The combinations, those of one start alike together; the CPU is no device to decode on."""
    decodes = [each for each in given.decode if each == "cpu" or device != "cpu"]
    chosen = itertools.product(given.optimize, given.batch, given.processes, decodes or ["cpu"])
    return [
        Plan(device, given.network, decode, optimize, given.precision, batch, processes)
        for optimize, batch, processes, decode in chosen
    ]


def _run_s(plan: Plan, seconds: float) -> float:
    return USUAL_START_S[plan.optimize] + WARM_S + seconds


def _minutes(plans: list[Plan], seconds: float) -> float:
    """An estimate, limits included."""
    networks = {(plan.optimize, plan.batch) for plan in plans}
    alone_s = sum(USUAL_START_S[optimize] + seconds for optimize, _ in networks) + 4 * seconds
    return (alone_s + sum(_run_s(plan, seconds) for plan in plans)) / 60


def _limits(report: Report, plans: list[Plan], precision: str, until: float, status: Status) -> None:
    """Of every part that the plans need, each once."""
    seconds, first = report.seconds, plans[0]
    todo: dict[str, Callable[[], alone.Alone]] = {"decode on the CPU": partial(alone.decode_on_cpu, seconds)}
    if any(plan.decode == "device" for plan in plans):
        todo["decode on the device"] = partial(alone.decode_on_device, first.device, seconds)
    for plan in plans:
        of = partial(alone.network, plan.device, plan.network, plan.batch, plan.optimize, precision, seconds)
        todo[f"network, batch {plan.batch}, optimize {plan.optimize}"] = of
    for title, run in todo.items():
        status.update(f"limit: {title}")
        if time.monotonic() > until:
            report.notes.append(f"limit: {title}: left out, the time is over")
            continue
        try:
            report.limits.append(run())
        except alone.NotMeasured as error:
            report.notes.append(f"limit: {title}: not measured: {error}")
    status.update("limit: the world")
    report.ceiling = measure_ceiling(seconds / 2)


def _runs(report: Report, plans: list[Plan], until: float, status: Status) -> bool:
    """Every plan in turn; whether one failed, which does not end the others."""
    failed = False
    for number, plan in enumerate(plans, 1):
        if time.monotonic() + _run_s(plan, report.seconds) > until:
            report.notes.append(f"{plan.title}: left out, the time is over; narrow the choice or give more --minutes")
            continue
        title = f"{number} of {len(plans)}: {plan.title}"
        try:
            report.add(measure(plan, report.seconds, partial(_tell, status, title)))
        except Failed as error:
            failed = True
            report.notes.append(f"{plan.title}: {error}")
            continue
        _say(status.console, f"{title}: {report.samples[-1].images_s:.1f} images/s")
    return failed


def _tell(status: Status, title: str, what: str) -> None:
    status.update(f"{title}: {what}")


def _show(console: Console, report: Report, folder: Path) -> None:
    for note in report.notes:
        console.print(note, style="yellow", markup=False)
    if report.samples:
        console.print(report.table())
    for line in report.limit_lines():
        console.print(line, style="dim", markup=False, highlight=False)
    if report.samples or report.limits:
        best = max((each.ratio or 0.0 for each in report.samples), default=0.0)
        _say(console, f"best: {best:.2f} of the smallest limit (to be reached on a GPU: {GOAL:.2f})")
        _say(console, ", ".join(map(str, report.write(folder))))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
