"""The last minutes' throughput and latency, so that a page just opened shows where things come from."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

EVERY_S, POINTS = 5.0, 60
"""Five minutes, a point every five seconds."""
Timings = Mapping[str, float]
EMPTY: dict[str, Any] = {"every_s": EVERY_S, "rate_per_s": [], "p50_ms": [], "p95_ms": []}


class History:
    """A ring of points: messages answered a second, and how long they took from sent to answered."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float | None, float | None]] = deque(maxlen=POINTS)
        self._since: float | None = None
        self._answered = 0.0

    def look(self, now: float, answered: float, recent: Collection[tuple[float, Timings]]) -> None:
        """Add a point where one is due. ``answered`` in all; ``recent`` are the last messages' ends and timings."""
        if self._since is None:
            self._since, self._answered = now, answered
        elif (elapsed := now - self._since) >= EVERY_S:
            took = sorted(timings["total"] for at, timings in list(recent) if at > self._since and "total" in timings)
            middle = took[len(took) // 2] if took else None
            late = took[int(len(took) * 0.95)] if took else None
            self._points.append(((answered - self._answered) / elapsed, middle, late))
            self._since, self._answered = now, answered

    def shown(self) -> dict[str, Any]:
        """The points as three lists, the oldest first; a latency is None where no message ended."""
        points = list(self._points)
        return {
            **EMPTY,
            "rate_per_s": [round(rate, 2) for rate, _, _ in points],
            "p50_ms": [middle and round(middle, 1) for _, middle, _ in points],
            "p95_ms": [late and round(late, 1) for _, _, late in points],
        }


def together(histories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Those of several pipelines, their ends side by side: rates add up, p50 is the mean of theirs, p95 the worst."""

    def columns(name: str) -> list[list[float]]:
        rows = zip_longest(*(reversed(each[name]) for each in histories))
        return [[value for value in row if value is not None] for row in rows][::-1]

    return {
        **EMPTY,
        "rate_per_s": [round(sum(values), 2) for values in columns("rate_per_s")],
        "p50_ms": [round(sum(values) / len(values), 1) if values else None for values in columns("p50_ms")],
        "p95_ms": [max(values, default=None) for values in columns("p95_ms")],
    }
