"""Time, passed in: so that leases, delays and batches can be tested without sleeping."""

from __future__ import annotations

import time


class Clock:
    """The system's time. Tests pass one that they step."""

    def monotonic(self) -> float:
        """Seconds that never jump: for deadlines and durations."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch: for what other machines stamped."""
        return time.time()
