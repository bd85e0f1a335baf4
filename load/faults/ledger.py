"""What happened, in order: the one thing that the judge believes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an event tells."""

    STARTED = "started"
    """A worker process was started."""
    STOPPING = "stopping"
    """It was sent SIGTERM."""
    STOPPED = "stopped"
    """It ended by itself, with ``status`` as its exit code."""
    KILLED = "killed"
    """It was ended by SIGKILL."""
    CALL = "call"
    """An SQS call, whatever came of it; ``note`` is the operation."""
    SENT = "sent"
    """``note`` is the request's nature."""
    RECEIVED = "received"
    """Given to ``worker`` for the ``count``-th time, hidden for ``seconds``; ``note`` holds what was done to it."""
    HIDDEN = "hidden"
    """Its visibility was set to ``seconds`` from now: an extension, a delay, or (0) a return."""
    EXPIRED = "expired"
    """Its visibility timeout ran out: visible again."""
    DELETED = "deleted"
    """``note`` is "stale" where the handle was an old one, so that nothing was deleted."""
    DEAD = "dead"
    """Moved to the dead-letter queue."""
    CALLBACK = "callback"
    """A callback arrived and got ``status`` (0: none); ``note`` is what was wrong with it, ``count`` its attempt."""


DUPLICATE, UNDELIVERED, STALE = "duplicate", "undelivered", "stale"
"""Notes: delivered while in flight or after its deletion; the answer with the message was cut off; an old handle."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event; ``at`` is seconds on the monotonic clock."""

    at: float
    kind: Kind
    message: str = ""
    worker: str = ""
    count: int = 0
    seconds: int = 0
    status: int = 0
    note: str = ""


class Ledger:
    """Events in the order in which they happened, written by one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.events: list[Event] = []
        self.clock = clock

    def note(
        self,
        kind: Kind,
        message: str = "",
        worker: str = "",
        *,
        count: int = 0,
        seconds: int = 0,
        status: int = 0,
        note: str = "",
    ) -> None:
        """Write down what just happened."""
        self.events.append(Event(self.clock(), kind, message, worker, count, seconds, status, note))
