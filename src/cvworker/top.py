"""The status page in a terminal, for one worker or several: what ``/status.json`` of each says, drawn once a second."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cvworker.errors import StartupError
from cvworker.observe.metrics import STAGES
from cvworker.observe.verdict import QUEUE_BEFORE

TIMEOUT_S = 3.0
BAR = 20
TONES = {"good": "green", "warn": "yellow", "bad": "red"}
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What a worker says may come from anybody: it must not steer the terminal."""


@dataclass(slots=True)
class Watched:
    """One worker: what it said at the last two looks, or why it said nothing."""

    address: str
    url: str
    status: dict[str, Any] | None = None
    why: str = ""
    done: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    at: float = 0.0

    def look(self) -> None:
        """Ask it."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not know these hosts
        try:
            with opener.open(self.url, timeout=TIMEOUT_S) as answer:
                status = json.load(answer)
            now, done = time.monotonic(), status["done"]
            if self.done:
                self.rates = {name: max(0.0, done[name] - self.done[name]) / (now - self.at) for name in done}
            self.status, self.why, self.done, self.at = status, "", done, now
            _summary(self)  # what another version says may lack something
        except urllib.error.HTTPError as error:
            self.status, self.why = None, f"it answers HTTP {error.code}"
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            self.status, self.why = None, f"no answer: {getattr(reason, 'strerror', None) or reason}"
        except (ValueError, KeyError, TypeError, AttributeError):
            self.status, self.why = None, "it answers, but not as a cvworker of this version does"


def watch(addresses: Sequence[str], *, every: float, once: bool) -> int:
    """Draw until Ctrl-C, or once; the exit code. Raises StartupError for an address that is none."""
    workers = [Watched(address, _status_url(address)) for address in addresses]
    console = Console()
    with ThreadPoolExecutor(max_workers=min(32, len(workers))) as pool:
        list(pool.map(Watched.look, workers))
        if once:
            console.print(drawn(workers))
            return 1 if any(worker.status is None for worker in workers) else 0
        try:
            with Live(drawn(workers), console=console, screen=console.is_terminal, auto_refresh=False) as live:
                while True:
                    time.sleep(every)
                    list(pool.map(Watched.look, workers))
                    live.update(drawn(workers), refresh=True)
        except KeyboardInterrupt:
            return 0


def drawn(workers: Sequence[Watched]) -> RenderableType:
    """One worker with its flow; of several a line each, and the flow of the one that is worst off."""
    if len(workers) == 1:
        return _one(workers[0])
    return Group(_lines(workers), _one(min(workers, key=_rank)))


def _one(worker: Watched) -> RenderableType:
    if worker.status is None:
        return Panel(_text(worker.why), title=_text(worker.address), border_style="red", title_align="left")
    status = worker.status
    verdict = status["verdict"]
    head = _text(verdict["text"], f"bold {TONES.get(verdict['tone'], '')}")
    about = " · ".join(
        _plain(each) for each in (status["model"]["module"], status["model"]["device"], status["state"]) if each
    )
    panel = Panel(
        Group(head, Text(_plain(verdict["hint"]))), title=f"{_plain(worker.address)}  {about}", title_align="left"
    )
    return Group(panel, _summary(worker), _flow(worker), *_errors(status))


def _summary(worker: Watched) -> Text:
    status = worker.status or {}
    waiting, oldest, total = (
        status["backlog"]["visible"],
        status["leases"]["oldest_s"],
        status["latency_ms"].get("total"),
    )
    parts = [
        f"{status['rate_per_s']:,.1f} answered a second",
        f"{'?' if waiting is None else format(waiting, ',')} in SQS",
        f"{status['held']:,} held" + (f", oldest {oldest:,.0f} s" if oldest else ""),
        f"p50 {total['p50']:,.0f} ms, p95 {total['p95']:,.0f} ms" if total else "no latency yet",
        f"leases lost {status['leases']['lost']:,.0f}",
    ]
    return Text("  ".join(parts))


def _flow(worker: Watched) -> Table:
    status = worker.status or {}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (
        ("step", "left"),
        ("a second", "right"),
        ("busy", "left"),
        ("", "right"),
        ("queue before", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for step in STAGES:
        busy, marked = status["busy"].get(step, 0.0), status["verdict"]["step"] == step
        queue = status["queues"].get(QUEUE_BEFORE.get(step, "")) if step != "process" else None
        rate = worker.rates.get(step)
        filled = round(BAR * min(1.0, busy))
        table.add_row(
            Text(step, style="bold" if marked else ""),
            "" if rate is None else f"{rate:,.1f}",
            Text("━" * filled, style="yellow" if marked else "cyan").append("─" * (BAR - filled), style="dim"),
            f"{busy:.0%}",
            f"{queue['depth']}/{queue['limit']}" if queue else "",
        )
    return table


def _errors(status: dict[str, Any]) -> list[RenderableType]:
    """The counts by code, and the newest example."""
    if not status["errors"]:
        return []
    counts = "  ".join(f"{code} {count:,.0f}" for code, count in sorted(status["errors"].items()))
    latest = [f"latest  {each['code']} {each['id']}: {each['message']}" for each in status["examples"][-1:]]
    return [_text(f"errors  {counts}", "red"), *(_text(line, "dim") for line in latest)]


def _lines(workers: Sequence[Watched]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("worker", "state", "a second", "held", "p95 ms", "what holds it back"):
        table.add_column(name, justify="right" if name in ("a second", "held", "p95 ms") else "left")
    for worker in workers:
        if worker.status is None:
            table.add_row(_text(worker.address), Text("–", style="red"), "", "", "", _text(worker.why, "red"))
            continue
        status = worker.status
        verdict, total = status["verdict"], status["latency_ms"].get("total")
        table.add_row(
            _text(worker.address),
            _text(status["state"]),
            f"{status['rate_per_s']:,.1f}",
            f"{status['held']:,}",
            f"{total['p95']:,.0f}" if total else "–",
            _text(verdict["text"], TONES.get(verdict["tone"], "")),
        )
    well = [worker.status for worker in workers if worker.status is not None]
    rate, held = sum(each["rate_per_s"] for each in well), sum(each["held"] for each in well)
    table.add_row("together", f"{len(well)} of {len(workers)}", f"{rate:,.1f}", f"{held:,}", "", "", style="bold")
    return table


def _rank(worker: Watched) -> tuple[int, float]:
    """The worst first, as far as it can be looked at; of those alike the busiest."""
    if worker.status is None:
        return 3, 0.0
    tone = ("bad", "warn", "good").index(worker.status["verdict"]["tone"])
    return tone, -max(worker.status["busy"].values(), default=0.0)


def _status_url(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url):
        raise StartupError(f"{address!r} is no address: give host:port, or http://host:port/")
    return url.rstrip("/") + "/status.json"


def _plain(value: object) -> str:
    return CONTROLS.sub("�", str(value))


def _text(value: object, style: str = "") -> Text:
    """As it is: a plain string would be read as rich's markup."""
    return Text(_plain(value), style=style)
