"""One picture on its way through the worker."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvworker.arena import Slot
    from cvworker.errors import JobError
    from cvworker.messages import Request
    from cvworker.sqs.leases import Lease

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way: each step replaces the payload, and exactly one outcome ends it."""

    request: Request
    lease: Lease
    number: int = field(default_factory=lambda: next(_numbers))
    image: Slot | None = None
    result: Mapping[str, Any] | None = None
    error: JobError | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    queued_at: float = 0.0
    kills: int = 0
    """Model processes that ended while this image was in ``process``."""

    ended: bool = False
    trace: Any = None
    """Its span, where there are traces."""

    @property
    def alone(self) -> bool:
        """Whether it must not share a batch: it may have ended a process, or failed receive after receive."""
        return self.kills > 0 or self.lease.attempt > SUSPECT_AFTER_RECEIVES

    def drop_image(self) -> None:
        image, self.image = self.image, None
        if image is not None:
            image.free()


SUSPECT_AFTER_RECEIVES = 3
"""A message received this often without an answer is run apart from other messages' batches from then on."""
