"""Finding the image that ends a process: rows are noted before they are worked on, where the note outlives the process.

Ray starts an actor that died anew and runs its task again. Rows that were in hand at that moment are suspects and run
one by one; one that ends a second process alone has failed, and the others go on without it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

T = TypeVar("T")

KILLS = 2
"""Processes that a row may end: once among others or by bad luck, once more by itself, and it has failed."""
MAX_STARTS = 5
"""Starts of a stage's actors beyond one each, without a row done between them, before the run is given up."""
LOOK_S = 0.5


class Ledger:
    """Which rows are in hand, and how many processes each has ended: an actor of its own, which runs no module."""

    def __init__(self) -> None:
        self._in_hand: set[tuple[str, int]] = set()
        self._kills: dict[tuple[str, int], int] = {}
        self._starts: dict[str, int] = {}

    def started(self, stage: str) -> int:
        """Note that an actor of ``stage`` starts: the starts since the last row that was done."""
        self._starts[stage] = self._starts.get(stage, 0) + 1
        return self._starts[stage]

    def begin(self, stage: str, rows: Sequence[int]) -> list[int]:
        """How many processes each row has ended. Where none has ended any, all are in hand from now on."""
        keys = [(stage, row) for row in rows]
        for key in self._in_hand.intersection(keys):
            self._kills[key] = self._kills.get(key, 0) + 1
        self._in_hand.difference_update(keys)
        kills = [self._kills.get(key, 0) for key in keys]
        if not any(kills):
            self._in_hand.update(keys)
        return kills

    def enter(self, stage: str, row: int) -> None:
        self._in_hand.add((stage, row))

    def leave(self, stage: str, row: int) -> None:
        self._in_hand.discard((stage, row))

    def end(self, stage: str, rows: Sequence[int]) -> None:
        """All rows are done: forget them."""
        keys = [(stage, row) for row in rows]
        self._in_hand.difference_update(keys)
        for key in keys:
            self._kills.pop(key, None)
        self._starts[stage] = 0


class Suspects:
    """One actor's use of the ledger, and a watch over it: work that takes too long ends the process like a crash."""

    def __init__(self, ledger: Any, stage: str, *, actors: int, stall_timeout: float) -> None:
        self._ledger = ledger
        self._stage = stage
        self._limit = stall_timeout
        self._since: float | None = None
        starts = ray.get(ledger.started.remote(stage))
        if starts > actors + MAX_STARTS:
            raise RuntimeError(f"{stage} ends its process again and again, no image at fault")
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def guarded(
        self, rows: Sequence[int], work: Callable[[range | list[int]], Iterator[T]], guilty: Callable[[int], T]
    ) -> Iterator[T]:
        """What ``work`` gives for the indices of ``rows``: for all at once, or one by one where some are suspects.

        ``guilty`` gives the same for the index of a row that has ended :data:`KILLS` processes.
        """
        kills = ray.get(self._ledger.begin.remote(self._stage, rows))
        if not any(kills):
            yield from work(range(len(rows)))
        else:
            for index, row in enumerate(rows):
                if kills[index] >= KILLS:
                    yield guilty(index)
                    continue
                ray.get(self._ledger.enter.remote(self._stage, row))
                yield from work([index])
                ray.get(self._ledger.leave.remote(self._stage, row))
        self._ledger.end.remote(self._stage, rows)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End the process, as a crash would, if this takes longer than ``stall_timeout``."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_S)
            since = self._since
            if since is not None and time.monotonic() - since > self._limit:
                print(f"{self._stage}: no progress for {self._limit:g} s; the process is ended", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(70)
