"""What ``cvworker demo`` shows at the terminal: its progress, and the table at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from cvworker.embedded.exhibits import LabelRow
from cvworker.embedded.sheet import STEPS, Tally

LINE_EVERY_S = 3.0
"""Between two lines of progress where stdout is no terminal."""
BAR_WIDTH = 12
SIDE_BY_SIDE = 96
"""Columns of the terminal from which the two tables fit beside each other."""


@dataclass(slots=True)
class Stand:
    """How far the demo is."""

    count: int
    drawn: int = 0
    ready: str = ""
    """What the worker says of its model; empty until it is ready."""
    sending: bool = False
    answered: int = 0
    rate: float = 0.0
    """Answers a second since the first request was sent."""

    @property
    def progress(self) -> tuple[int, str, bool, int]:
        """What changes as long as anything moves."""
        return self.drawn, self.ready, self.sending, self.answered

    @property
    def stage(self) -> tuple[bool, str, bool, bool]:
        """What changes when a part of the work is done."""
        return self.drawn == self.count, self.ready, self.sending, self.answered == self.count

    def line(self) -> str:
        if self.sending:
            return f"answered {self.answered} of {self.count}, {self.rate:.1f} images/s"
        return f"drawn {self.drawn} of {self.count}; worker: {self.ready or 'starting'}"


class View:
    """Three bars at a terminal; elsewhere a line at each stage, and every few seconds between."""

    def __init__(self, console: Console, count: int) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._stage: object = None
        self._line_at = 0.0
        if console.is_terminal:
            columns = (
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description:<8}"),
                BarColumn(40, complete_style="cyan", finished_style="green", pulse_style="cyan"),
                TextColumn("{task.fields[note]}"),
            )
            self._bars = Progress(*columns, console=console)
            self._drawn = self._bars.add_task("pictures", total=count, note="")
            self._worker = self._bars.add_task("worker", total=None, note="starting")
            self._answered = self._bars.add_task("answers", total=count, note="")

    def show(self, stand: Stand) -> None:
        if self._bars is not None:
            self._bars.update(self._drawn, completed=stand.drawn, note=f"{stand.drawn} of {stand.count} drawn")
            if stand.ready:
                self._bars.update(self._worker, total=1, completed=1, note=stand.ready)
            if stand.sending:
                note = f"{stand.answered} of {stand.count}, {stand.rate:.1f} images/s"
                self._bars.update(self._answered, completed=stand.answered, note=note)
        elif stand.stage != self._stage or time.monotonic() - self._line_at > LINE_EVERY_S:
            self._stage, self._line_at = stand.stage, time.monotonic()
            self._console.print(stand.line(), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()


def report(tally: Tally, rows: Sequence[LabelRow], expected: Counter[str], seconds: float, width: int) -> Table:
    """The table at the end: what was answered, how fast, and where the time went, in so many columns of the terminal.

    ``rows`` are empty where nothing is known of the pictures; ``expected`` counts the error codes that are right.
    """
    page = Table.grid(padding=(0, 3))
    tables = _answers(tally, rows, expected), _times(tally, seconds)
    if width >= SIDE_BY_SIDE:
        page.add_row(*tables)
    else:
        for table in tables:
            page.add_row(table)
    return page


def _answers(tally: Tally, rows: Sequence[LabelRow], expected: Counter[str]) -> Table:
    known = bool(rows)
    table = _table("answered", "pictures", *(("right", "wrong", "missed") if known else ()))
    for row in rows:
        table.add_row(row.label, *_counts(row.answers, row.right, row.wrong, row.missed))
    if not known:
        ok = Counter(ok=tally.images - tally.unanswered - tally.errors.total())
        for label, count in (tally.labels or tally.verdicts or ok).most_common():
            table.add_row(label, *_counts(count)[:1])
    table.add_section()
    for code in sorted(tally.errors.keys() | expected.keys()):
        answers, right = tally.errors[code], min(tally.errors[code], expected[code])
        counts = _counts(answers, right, answers - right, expected[code] - right)
        table.add_row(code, *counts if known else counts[:1])
    if known:
        table.add_section()
        table.add_row("all", *_counts(tally.images, tally.right, tally.wrong))
    return table


def _times(tally: Tally, seconds: float) -> Table:
    table = _table("speed", "", " ")
    table.columns[2].justify = "left"
    if tally.totals:
        table.add_row("images/s", f"{len(tally.totals) / seconds:.1f}")
    for percent in (50, 95):
        if (latency := tally.percentile(percent)) is not None:
            table.add_row(f"latency p{percent}", _duration(latency))
    table.add_section()
    steps = {"in the queue": tally.queued, **{name: tally.steps[step] for step, name in STEPS.items()}}
    whole = sum(steps.values()) or 1.0
    for name, total in steps.items() if tally.totals else ():
        bar = "█" * round(BAR_WIDTH * total / whole)
        table.add_row(name, _duration(total / len(tally.totals)), f"{total / whole:4.0%} [cyan]{bar}[/]")
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if table.columns else "left", no_wrap=True)
    return table


def _counts(answers: int, right: int = 0, *amiss: int) -> list[str]:
    """The cells of one row, of which what is amiss stands out, unless it is nothing."""
    cells = [(answers, "default"), (right, "default"), *((number, "yellow") for number in amiss)]
    return [f"[{style if number else 'dim'}]{number:,}[/]" for number, style in cells]


def _duration(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"
