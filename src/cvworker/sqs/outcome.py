"""How a message ends, and how long it waits when it is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

RETRY_BASE_S = 5.0
RETRY_CAP_S = 900.0
RETRY_JITTER = 0.2
UNANSWERABLE_S = 3600
"""Without a redrive policy, a message that cannot be answered comes back once an hour at most."""


class End(StrEnum):
    """What becomes of a message."""

    ANSWERED = "answered"
    """Its callback was accepted, or its receiver is gone for good: deleted."""
    LATER = "later"
    """Visible again after a delay; SQS delivers it once more."""
    LEFT = "left"
    """Cannot be answered: left to the queue's redrive policy."""
    RELEASED = "released"
    """Given back at once, untouched, because this worker stops."""
    LOST = "lost"
    """Its lease ran out here: it is somebody else's now."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One end, with the delay in seconds before SQS delivers again (``None``: as the message stands)."""

    end: End
    delay: float | None = None

    @property
    def rank(self) -> int:
        """Which outcome wins where the jobs of one message end differently: the one that keeps the message."""
        return [End.ANSWERED, End.LEFT, End.LATER, End.RELEASED, End.LOST].index(self.end)


ANSWERED = Outcome(End.ANSWERED)
LEFT = Outcome(End.LEFT)
RELEASED = Outcome(End.RELEASED, 0)
LOST = Outcome(End.LOST)


def later(attempt: int, at_least: float = 0.0, uniform: Callable[[float, float], float] = random.uniform) -> Outcome:
    """Try again after 5 s x 2^n by receive count, capped at 900 s, give or take a fifth; never before ``at_least``."""
    delay = min(RETRY_BASE_S * 2.0 ** min(attempt - 1, 16), RETRY_CAP_S)
    delay = min(delay * uniform(1 - RETRY_JITTER, 1 + RETRY_JITTER), RETRY_CAP_S)
    return Outcome(End.LATER, max(delay, at_least * uniform(1, 1 + RETRY_JITTER)))
