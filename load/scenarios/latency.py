"""How long the image host and the receiver take for an answer: ``80``, ``exp:80`` or ``lognormal:80,400``, in ms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from cvworker.errors import StartupError
from cvworker.plan.traffic import Floats, Latency

FORMS = "MS always, exp:MEAN exponential, lognormal:MEDIAN,P95; milliseconds"
_BLOCK = 1024


def draws(text: str, seed: int, name: str = "latency") -> Iterator[float]:
    """Seconds, one after the other without an end; the same for the same seed.

    Raises StartupError, with ``name``, where ``text`` is none of :data:`FORMS`. At once, before the first is drawn.
    """
    kind, colon, rest = text.rpartition(":")
    numbers = _numbers(rest)
    random = np.random.default_rng(seed)
    if not colon and len(numbers) == 1:
        return _blocks(lambda: Latency(numbers[0]).draw(random, _BLOCK))
    if kind == "exp" and len(numbers) == 1:
        return _blocks(lambda: random.exponential(numbers[0], _BLOCK))
    if kind == "lognormal" and len(numbers) == 2 and 0 < numbers[0] <= numbers[1]:
        return _blocks(lambda: Latency(*numbers).draw(random, _BLOCK))
    raise StartupError(f"{name}: {text!r} is none of: {FORMS}")


def _numbers(text: str) -> list[float]:
    """Seconds; none where one of them is no number of milliseconds."""
    try:
        found = [float(part) / 1000 for part in text.split(",")]
    except ValueError:
        return []
    return found if all(0 <= each < math.inf for each in found) else []


def _blocks(draw: Callable[[], Floats]) -> Iterator[float]:
    while True:
        yield from draw().tolist()
