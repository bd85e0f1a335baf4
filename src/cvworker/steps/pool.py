"""Works on many jobs at once on one event loop: what downloads and callbacks have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from cvworker.queues import QueueClosed

if TYPE_CHECKING:
    from cvworker.job import Job
    from cvworker.queues import JobQueue

RECHECK_S = 0.5

log = structlog.get_logger(__name__)


class JobPool:
    """Takes jobs from ``inbox`` while fewer than ``limit()`` are in hand, and gives each to ``work``.

    ``work`` sees to every end a job can have; whatever it raises all the same goes to ``surprised``, so that no job
    is ever without one.
    """

    def __init__(
        self,
        inbox: JobQueue,
        work: Callable[[Job], Awaitable[None]],
        *,
        limit: Callable[[], int],
        surprised: Callable[[Job, Exception], None],
    ) -> None:
        self._inbox = inbox
        self._work = work
        self._limit = limit
        self._surprised = surprised
        self._in_hand: dict[asyncio.Task[None], float] = {}
        self._freed = asyncio.Event()
        self._given_up = False
        self.jobs: set[Job] = set()
        """Those in hand, for whoever must release them when the time to stop runs out."""

    def __len__(self) -> int:
        return len(self._in_hand)

    def oldest(self) -> float:
        """Seconds that the job longest in hand has been there."""
        return time.monotonic() - min(self._in_hand.values(), default=time.monotonic())

    async def run(self) -> None:
        """Work until the inbox is closed and empty and the last job is done."""
        recheck = asyncio.create_task(self._recheck())
        try:
            while True:
                while (room := self._limit() - len(self._in_hand)) <= 0:
                    self._freed.clear()
                    await self._freed.wait()
                if self._given_up:
                    break
                for job in await self._inbox.aget(room):
                    self._begin(job)
        except QueueClosed:
            pass
        finally:
            recheck.cancel()
        if self._in_hand:
            await asyncio.wait(list(self._in_hand))

    def cancel(self) -> None:
        """Give up the jobs in hand, each of which has been given another end, and take no more."""
        self._given_up = True
        for task in list(self._in_hand):
            task.cancel()

    def _begin(self, job: Job) -> None:
        self.jobs.add(job)
        task = asyncio.create_task(self._one(job))
        self._in_hand[task] = time.monotonic()
        task.add_done_callback(self._let_go)

    async def _recheck(self) -> None:
        """The limit may have grown meanwhile."""
        while True:
            await asyncio.sleep(RECHECK_S)
            self._freed.set()

    async def _one(self, job: Job) -> None:
        try:
            await self._work(job)
        except Exception as error:
            log.exception("a step raised", message_id=job.lease.message_id)
            self._surprised(job, error)
        finally:
            self.jobs.discard(job)

    def _let_go(self, task: asyncio.Task[None]) -> None:
        self._in_hand.pop(task, None)
        self._freed.set()
