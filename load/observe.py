"""What metrics, status page, health checks and scrapes cost, measured: ``python -m load.observe``.

One worker in the world of ``load.compare``, its counting switched on and off again and again while it runs, so that
what else the machine does meets both. All that is switched is in the worker's own process: what that takes for each
message, in windows of a few seconds, is compared with the window beside it that is off, and the median of these
differences is told as a share of the CPU time of all the worker's processes. (Decoding, which is most of that, swings
by more with the machine's clock than what is looked for.) Ends with 1 where looking costs more than 2 %.

On: the worker as it is, its page open, ``/metrics`` scraped every 5 s, ``/livez`` and ``/readyz`` asked every 5 s. Off:
counters, timings and history do nothing, and nobody asks.
"""

from __future__ import annotations

import argparse
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from load.compare.contenders import CONTENDERS, Contender
from load.compare.measure import Peer, worker, world
from load.compare.task import LOADS

from cvworker.bench import tree

MOST = 0.02
LOOK_S = 5.0
WARM_ANSWERS = 3000
SETTLE_S = 0.5
"""After each switch, before the next window begins."""
PATHS = ("metrics", "livez", "readyz")


class Switched(Contender):
    """The worker whose counting can be switched: this module, as its program."""

    def command(self, base: str, load: str) -> list[str]:
        ours = super().command(base, load)
        return [*ours[:2], "load.observe", "--worker", *ours[4:]]


def main() -> int:
    """The exit code: 0, or 1 where looking costs more than it may."""
    parser = argparse.ArgumentParser(
        "python -m load.observe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=60, help="default: 60, which take about seven minutes")
    parser.add_argument("--seconds", type=float, default=3, help="of each window; default: 3")
    parser.add_argument("--load", choices=LOADS, default="cpu", help="default: cpu, the least work around a message")
    wanted = parser.parse_args()
    shares = []
    with _running(wanted.load) as window:
        for number in range(wanted.pairs):
            order = (True, False) if number % 2 else (False, True)
            found = {on: window(on, wanted.seconds) for on in order}
            (on, _), (off, off_in_all) = found[True], found[False]
            shares.append((on - off) / off_in_all)
            print(f"pair {number + 1}: on {on:.3f} ms, off {off:.3f} ms of {off_in_all:.3f} a message", flush=True)
    middle = statistics.median(shares)
    low, high = _interval(shares)
    print(
        f"looking costs {middle:+.2%} of the CPU for each message "
        f"(95 % of resamples: {low:+.2%} to {high:+.2%}; at most {MOST:.0%})"
    )
    return 0 if middle < MOST else 1


@contextmanager
def _running(load: str) -> Iterator[Callable[[bool, float], tuple[float, float]]]:
    """A warm worker, and what measures a window of it: CPU of its own process and of all, milliseconds a message."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = CONTENDERS["cvworker"]
    ours = replace(ours, settings={**ours.settings, "HTTP_PORT": str(port)})
    contender = Switched(**{name: getattr(ours, name) for name in ours.__dataclass_fields__})
    on = threading.Event()
    with (
        world(LOADS[load], messages=contender.messages) as peer,
        worker(contender, LOADS[load], peer.base) as (process, log),
        _watched(f"http://127.0.0.1:{port}/", on),
    ):
        while peer.counts()["callbacks"] < WARM_ANSWERS:
            if process.poll() is not None:
                sys.exit(f"the worker ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield lambda wanted, seconds: _window(process, peer, on, wanted, seconds)


def _window(
    process: subprocess.Popen[bytes], peer: Peer, on: threading.Event, wanted: bool, seconds: float
) -> tuple[float, float]:
    process.send_signal(signal.SIGUSR2 if wanted else signal.SIGWINCH)
    (on.set if wanted else on.clear)()
    time.sleep(SETTLE_S)
    answers, before = peer.counts()["callbacks"], tree.cpu_seconds(process.pid)
    time.sleep(seconds)
    answers, after = peer.counts()["callbacks"] - answers, tree.cpu_seconds(process.pid)
    spent = {pid: 1000 * (cpu - before.get(pid, 0.0)) / max(1.0, answers) for pid, cpu in after.items()}
    return spent[process.pid], sum(spent.values())


def _interval(shares: list[float]) -> tuple[float, float]:
    """Where the median lies in 95 % of samples drawn from these with replacement."""
    chance = random.Random(0)  # noqa: S311
    medians = sorted(statistics.median(chance.choices(shares, k=len(shares))) for _ in range(1000))
    return medians[25], medians[974]


@contextmanager
def _watched(url: str, on: threading.Event) -> Iterator[None]:
    """While ``on``: a page that listens, and a Prometheus and a load balancer that ask."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            for path in PATHS if on.is_set() else ():
                try:
                    urllib.request.urlopen(url + path, timeout=LOOK_S).read()  # noqa: S310
                except OSError:  # it still starts, or has ended
                    pass
            over.wait(LOOK_S)

    def listen() -> None:
        while not over.is_set():
            try:
                if on.wait(0.5):
                    with urllib.request.urlopen(url + "events", timeout=LOOK_S) as events:  # noqa: S310
                        while on.is_set() and not over.is_set() and events.readline():
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


def run_worker() -> int:
    """``cvworker run`` that counts after SIGUSR2, and does not after SIGWINCH."""
    from prometheus_client import Counter, Gauge, Histogram

    from cvworker import cli
    from cvworker.observe.metrics import Busy, Metrics

    counting = True

    def switched(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: method(*args, **kwargs) if counting else None

    def switch(number: int, _frame: object) -> None:
        nonlocal counting
        counting = number == signal.SIGUSR2

    told = (
        "timed",
        "received",
        "sqs_called",
        "admitted",
        "batch_done",
        "called_back",
        "answered",
        "ended",
        "erred",
        "look",
    )
    for owner, names in (
        (Metrics, (*told, "lease_event", "look")),
        (Busy, ("look",)),
        (Counter, ("inc",)),
        (Gauge, ("set",)),
        (Histogram, ("observe",)),
    ):
        for name in names:
            setattr(owner, name, switched(getattr(owner, name)))
    for each in (signal.SIGUSR2, signal.SIGWINCH):
        signal.signal(each, switch)
    return cli.main(["run", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(run_worker() if sys.argv[1:2] == ["--worker"] else main())
