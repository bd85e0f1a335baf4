"""The tables of the reports, and how far a measurement is, for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cvworker.report.page import Cell


def console(pipe_width: int) -> Console:
    """Stdout; ``pipe_width`` columns wide where that is no terminal. Nothing printed is taken for markup."""
    return Console(width=None if sys.stdout.isatty() else pipe_width, highlight=False, markup=False)


def print_table(
    screen: Console, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, left: Sequence[str] = ()
) -> None:
    """A table, numbers to the right; what is long is folded, and what is not there is a dash."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(cell)) for cell in row))
    screen.print(table)


class Bar:
    """What is being measured, and how much is done: a bar on a terminal, elsewhere a line for each thing."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def tell(self, what: str) -> None:
        """Say what is being done now."""
        self._bar.update(self._task, description=what)
        if not self._bar.console.is_terminal:
            print(what, file=sys.stderr, flush=True)

    def begin(self, steps: int) -> None:
        """There are so many steps."""
        self._bar.update(self._task, total=steps)

    def step(self) -> None:
        """One of them is done."""
        self._bar.advance(self._task)


@contextmanager
def progress(what: str) -> Iterator[Bar]:
    """A bar on stderr while the context lasts, gone after it."""
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Bar(bar, bar.add_task(what, total=None))


def _cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:,.5g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell
