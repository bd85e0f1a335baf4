"""How much the worker holds: queue bounds and download concurrency that follow the measured pace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cvworker.queues import JobQueue

NUM_QUEUES = 3
HOLD_S = 3.0
"""Seconds of work held with ``auto``: enough to ride out a slow call, little enough to leave to other workers."""
LEAST_DOWNLOADS, MOST_DOWNLOADS = 32, 256
MOST_WORKERS = 8
SMOOTHING = 0.3


class Pace:
    """The rate the worker can do, in messages a second: what it does while work is waiting, or the most it has done.

    What happens to arrive says nothing of that, so a quiet queue leaves the estimate as it is.
    """

    def __init__(self) -> None:
        self.rate = 0.0

    def observe(self, done: int, seconds: float, *, saturated: bool) -> None:
        now = done / seconds
        if saturated and self.rate:
            self.rate += SMOOTHING * (now - self.rate)
        else:
            self.rate = max(self.rate, now)


def preprocess_workers(cores: int, pipelines: int = 1) -> int:
    """DataLoader processes for each pipeline with ``auto``: one for each core.

    The I/O and model processes take the rest of the cores' time, not cores of their own. Measured on two cores, two
    answer a fifth more than one.
    """
    return max(1, min(cores // pipelines, MOST_WORKERS))


def download_threads(cores: int) -> int:
    """Threads of the pool with ``auto``: each carries many downloads, and another mostly waits for Python's lock."""
    return max(1, min(cores // 4, 4))


def queue_limit(rate: float, *, visibility: float, batch_size: int, downloads: int) -> int:
    """The bound of each of the three queues.

    About :data:`HOLD_S` seconds of work in all; never more than ``rate x visibility / NUM_QUEUES`` each, beyond which
    messages time out in the worker and are processed over and over; never less than two batches and the downloads
    under way in all, below which steps starve.
    """
    wanted = rate * HOLD_S / NUM_QUEUES
    rule = rate * visibility / NUM_QUEUES
    least = (2 * batch_size + downloads) / NUM_QUEUES
    return max(1, math.ceil(max(min(wanted, rule), least)))


def download_concurrency(now: int, *, in_hand: int, waiting: int, next_hungry: bool) -> int:
    """How many downloads may be under way next: more when all are in use and the next step starves, less when idle."""
    if in_hand >= now and waiting and next_hungry:
        return min(MOST_DOWNLOADS, now * 2)
    if in_hand < now // 3:
        return max(LEAST_DOWNLOADS, now * 3 // 4)
    return now


class Tuner:
    """Looks once a second and sets the queues' bounds and the downloads' concurrency, where they are ``auto``."""

    def __init__(
        self,
        queues: Sequence[JobQueue],
        *,
        max_queue_size: int | Literal["auto"],
        concurrency: int | Literal["auto"],
        visibility: float,
        batch_size: int,
    ) -> None:
        self._queues = queues
        self._fixed_limit = max_queue_size
        self._fixed_concurrency = concurrency
        self._visibility = visibility
        self.batch_size = batch_size
        """Set anew where it is known only once the model is warm."""
        self.pace = Pace()
        self.downloads = LEAST_DOWNLOADS if concurrency == "auto" else concurrency
        self._set_limits()

    def look(self, *, done: int, seconds: float, downloading: int) -> None:
        """Take in one period: messages done in it, its length, and the downloads under way at its end."""
        to_download, to_infer, _ = self._queues
        self.pace.observe(done, seconds, saturated=len(to_download) > 0)
        if self._fixed_concurrency == "auto":
            self.downloads = download_concurrency(
                self.downloads,
                in_hand=downloading,
                waiting=len(to_download),
                next_hungry=len(to_infer) < to_infer.limit / 2,
            )
        self._set_limits()

    def _set_limits(self) -> None:
        limit = self._fixed_limit
        if limit == "auto":
            limit = queue_limit(
                self.pace.rate, visibility=self._visibility, batch_size=self.batch_size, downloads=self.downloads
            )
        for queue in self._queues:
            if queue.limit != limit:
                queue.limit = limit
