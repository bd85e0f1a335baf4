"""What metrics, status page, health checks and scrapes cost, measured: ``python -m load.observe``.

Pairs of runs in the world of ``load.compare``, one with everything on and looked at, one without any of it, in turn and
each time in the other order. CPU time of all the worker's processes for each message; medians of the pairs' ratios, as
a single pair swings by more than what is looked for. Ends with 1 where it is more than 2 %.

On: the worker as it is, its page open, ``/metrics`` scraped every 5 s, ``/livez`` and ``/readyz`` asked every 5 s. Off:
the same worker with counters, timings and history that do nothing, and nobody who asks.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from load.compare.contenders import CONTENDERS, Contender
from load.compare.measure import Sample, measure
from load.compare.task import LOADS, Load

MOST = 0.02
LOOK_S = 5.0
PATHS = ("metrics", "livez", "readyz")


class Off(Contender):
    """The worker that counts nothing: this module, as its program."""

    def command(self, base: str, load: str) -> list[str]:
        ours = super().command(base, load)
        return [*ours[:2], "load.observe", "--off", *ours[4:]]


def main() -> int:
    """The exit code: 0, or 1 where looking costs more than it may."""
    parser = argparse.ArgumentParser(
        "python -m load.observe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9, help="default: 9, which take about ten minutes")
    parser.add_argument("--seconds", type=float, default=20, help="of each run, after its warm-up; default: 20")
    parser.add_argument("--load", choices=LOADS, default="cpu", help="default: cpu, the least work around a message")
    wanted = parser.parse_args()
    load, ratios = LOADS[wanted.load], []
    for number in range(wanted.pairs):
        found = {}
        for on in (True, False) if number % 2 else (False, True):
            found[on] = run(on, load, number, wanted.seconds)
        ratios.append(found[True].cpu_ms / found[False].cpu_ms)
        print(
            f"pair {number + 1}: on {found[True].cpu_ms:.3f} ms, off {found[False].cpu_ms:.3f} ms a message, "
            f"{ratios[-1] - 1:+.1%}; {found[True].images_s:.0f} and {found[False].images_s:.0f} a second",
            flush=True,
        )
    middle = statistics.median(ratios) - 1
    spread = f"from {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}"
    print(f"looking costs {middle:+.1%} of the CPU for each message ({spread}; at most {MOST:.0%})")
    return 0 if middle < MOST else 1


def run(on: bool, load: Load, number: int, seconds: float) -> Sample:
    """One run, watched or not."""
    ours = CONTENDERS["cvworker"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if not on:
        fields = {name: getattr(ours, name) for name in ours.__dataclass_fields__}
        return measure(Off(**fields), load, number, seconds, lambda _line: None)
    contender = replace(ours, settings={**ours.settings, "HTTP_PORT": str(port)})
    with watched(f"http://127.0.0.1:{port}/"):
        return measure(contender, load, number, seconds, lambda _line: None)


@contextmanager
def watched(url: str) -> Iterator[None]:
    """A page that listens, and a Prometheus and a load balancer that ask."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(LOOK_S):
            for path in PATHS:
                try:
                    urllib.request.urlopen(url + path, timeout=LOOK_S).read()  # noqa: S310
                except OSError:  # it still starts, or has ended
                    pass

    def listen() -> None:
        while not over.wait(1):
            try:
                with urllib.request.urlopen(url + "events", timeout=LOOK_S) as events:  # noqa: S310
                    while not over.is_set() and events.readline():
                        pass
            except OSError:
                pass

    threads = [threading.Thread(target=each, daemon=True) for each in (ask, listen)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(LOOK_S + 1)


def off() -> int:
    """``cvworker run`` with metrics that do nothing."""
    from cvworker import cli
    from cvworker.observe.metrics import Busy, Metrics

    def nothing(*_: Any, **__: Any) -> None:
        pass

    from prometheus_client import Counter, Gauge, Histogram

    told = ("timed", "received", "sqs_called", "admitted", "batch_done", "called_back", "answered", "erred", "look")
    for owner, names in (
        (Metrics, (*told, "lease_event")),
        (Busy, ("look",)),
        (Counter, ("inc",)),
        (Gauge, ("set",)),
        (Histogram, ("observe",)),
    ):
        for name in names:
            setattr(owner, name, nothing)
    return cli.main(["run", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(off() if sys.argv[1:2] == ["--off"] else main())
