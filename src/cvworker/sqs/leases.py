"""The one table of messages held: what expires when, and what must be extended now."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from cvworker.sqs.outcome import Outcome


@dataclass(slots=True, eq=False)
class Lease:
    """One message held, from its receive until it is settled."""

    message_id: str
    receipt: str
    attempt: int
    sent_at: float
    received_at: float
    """``sent_at`` and ``received_at`` are seconds since the epoch."""
    deadline: float
    """When SQS would show the message again, on the monotonic clock, as far as calls that succeeded tell."""
    ends: float
    """When it is let go whatever happens (``max_lease``), on the monotonic clock."""
    jobs_left: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    lost: bool = False
    ending: bool = False
    """Its visibility is being set to what its outcome asks for: an extension would undo that."""
    spans: list[Any] = field(default_factory=list)
    """Its jobs' spans, where there are traces."""


class LeaseTable:
    """Every message held, extended while at least half of its visibility timeout is left.

    Half, because an extension that fails then has the other half to be tried again.
    """

    def __init__(self, visibility: float, max_lease: float, clock: Callable[[], float]) -> None:
        self.visibility = visibility
        self._max_lease = max_lease
        self._clock = clock
        self.visibility_calls = threading.Lock()
        """Held from deciding on a visibility until SQS has it: the last decision must also be the last call."""
        self._leases: dict[str, Lease] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._leases)

    def add(
        self, message_id: str, receipt: str, *, attempt: int = 1, sent_at: float = 0.0, received_at: float = 0.0
    ) -> Lease | None:
        """Hold a message just received; ``None`` if it is held already, whose newest handle is then kept."""
        now = self._clock()
        with self._lock:
            held = self._leases.get(message_id)
            if held is not None:
                held.receipt, held.deadline, held.attempt = receipt, now + self.visibility, attempt
                held.lost = False
                return None
            lease = Lease(
                message_id, receipt, attempt, sent_at, received_at, now + self.visibility, now + self._max_lease
            )
            self._leases[message_id] = lease
            return lease

    def remove(self, lease: Lease) -> bool:
        """Stop holding a message: the one place that does; False if it was not held any more."""
        with self._lock:
            if self._leases.get(lease.message_id) is not lease:
                return False
            del self._leases[lease.message_id]
            return True

    def due(self) -> list[tuple[Lease, str]]:
        """The leases to extend now with the handles to use, the one that expires first in front."""
        now = self._clock()
        with self._lock:
            due = [x for x in self._leases.values() if self._extendable(x) and now < x.ends and self._when(x) <= now]
            return [(lease, lease.receipt) for lease in sorted(due, key=lambda lease: lease.deadline)]

    def still(self, due: list[tuple[Lease, str]]) -> list[tuple[Lease, str]]:
        """Those held by the same handle now: an extension would undo the delay of one settled since."""
        with self._lock:
            return [
                (lease, receipt)
                for lease, receipt in due
                if self._leases.get(lease.message_id) is lease and lease.receipt == receipt and not lease.ending
            ]

    def next_due(self) -> float | None:
        """When :meth:`due` will have something next, on the monotonic clock."""
        with self._lock:
            times = [min(self._when(lease), lease.ends) for lease in self._leases.values() if self._extendable(lease)]
            return min(times, default=None)

    def extended(self, lease: Lease, receipt: str, called_at: float) -> None:
        """Record an extension that succeeded: it counts from the call, and only for the handle it was made with."""
        with self._lock:
            if lease.receipt == receipt:
                lease.deadline = max(lease.deadline, called_at + self.visibility)

    def lose(self, lease: Lease, receipt: str) -> bool:
        """SQS no longer knows ``receipt``; False if a newer handle came in the meantime."""
        with self._lock:
            if lease.receipt != receipt or lease.lost:
                return False
            lease.lost = True
            return True

    def alive(self, lease: Lease) -> bool:
        """Whether work on the message is still worth doing: no other worker can have it."""
        return not lease.lost and self._clock() < lease.deadline

    def let_go(self) -> list[Lease]:
        """Stop holding what has been held for ``max_lease``: a hung step must not keep a message for ever."""
        now = self._clock()
        with self._lock:
            gone = [lease for lease in self._leases.values() if now >= lease.ends]
            for lease in gone:
                lease.lost = True
                del self._leases[lease.message_id]
            return gone

    def oldest_age(self, now: float) -> float:
        """Seconds since the oldest message held was sent; ``now`` is in seconds since the epoch."""
        with self._lock:
            return max((now - lease.sent_at for lease in self._leases.values()), default=0.0)

    def held(self) -> list[Lease]:
        with self._lock:
            return list(self._leases.values())

    @staticmethod
    def _extendable(lease: Lease) -> bool:
        return not lease.lost and not lease.ending

    def _when(self, lease: Lease) -> float:
        return lease.deadline - self.visibility / 2
