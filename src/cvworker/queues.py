"""The bounded queue between two steps, shared by threads and event loops."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from cvworker.job import Job

_RECHECK_S = 1.0
"""A waiting thread looks again this often, so that a wake-up that went astray delays, never hangs."""
LOW = 4
"""A queue filled to less than this fraction of its limit takes what it can get."""
RESERVED_AT_ONCE = 10
"""Places worth waking somebody up for: what one receive call can bring."""


class QueueClosed(Exception):
    """The queue is closed and empty."""


class JobQueue:
    """First in, first out, at most ``limit`` jobs; the limit may change while jobs wait.

    Threads use :meth:`put` and :meth:`get`, coroutines :meth:`aput` and :meth:`aget`. A waiter is only woken and then
    looks for itself, so a wake-up too many is harmless.
    """

    def __init__(self, name: str, limit: int, clock: Callable[[], float]) -> None:
        self.name = name
        self._limit = limit
        self._clock = clock
        self._jobs: deque[Job] = deque()
        self._reserved = 0
        self._closed = False
        self._lock = threading.Lock()
        self._getters: deque[Future[None]] = deque()
        self._putters: deque[Future[None]] = deque()
        self._reservers: deque[Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        with self._lock:
            grown, self._limit = value > self._limit, value
            if grown:
                self._room_came_free(len(self._putters))

    def close(self) -> None:
        """Let getters take what is left and then raise :class:`QueueClosed`; nobody waits for room any more."""
        with self._lock:
            self._closed = True
            self._wake(self._getters, len(self._getters))
            self._wake(self._putters, len(self._putters))
            self._wake(self._reservers, len(self._reservers))

    def drain(self) -> list[Job]:
        """Take out everything that waits."""
        with self._lock:
            jobs = list(self._jobs)
            self._jobs.clear()
            self._room_came_free(len(self._putters))
            return jobs

    def reserve(self, at_most: int, *, timeout: float) -> int:
        """Keep up to ``at_most`` places for :meth:`fill`, as many as can be had at once and not one by one.

        Fewer when the queue runs low, or after ``timeout`` seconds; 0 when none is free even then.
        """
        until = time.monotonic() + timeout
        while True:
            with self._lock:
                left = until - time.monotonic()
                if left <= 0 or self._reservable(at_most):
                    taken = max(0, min(self._free(), at_most))
                    self._reserved += taken
                    return taken
                waiter = self._wait(self._reservers)
            self._wait_thread(waiter, left)

    def fill(self, jobs: list[Job], reserved: int) -> None:
        """Put jobs into ``reserved`` places and give back those not used (a message may hold several jobs)."""
        with self._lock:
            self._reserved -= reserved
            self._append(jobs)
            unused = reserved - len(jobs)
            if unused > 0:
                self._room_came_free(unused)

    def put(self, job: Job) -> None:
        """Add a job, waiting for room."""
        while (waiter := self._try_put(job)) is not None:
            self._wait_thread(waiter, _RECHECK_S)

    async def aput(self, job: Job) -> None:
        """Add a job, waiting for room."""
        while (waiter := self._try_put(job)) is not None:
            await self._wait_task(waiter)

    def get(self, at_most: int = 1, *, timeout: float | None = None) -> list[Job]:
        """Take up to ``at_most`` jobs, waiting for the first; empty after ``timeout`` seconds.

        Raises:
            QueueClosed: closed and empty.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while isinstance(taken := self._try_get(at_most), Future):
            left = until - time.monotonic()
            if left <= 0:
                self._give_up(taken)
                return []
            self._wait_thread(taken, min(left, _RECHECK_S))
        return taken

    async def aget(self) -> Job:
        """Take one job, waiting for it. Raises QueueClosed as :meth:`get` does."""
        while isinstance(taken := self._try_get(1), Future):
            await self._wait_task(taken)
        return taken[0]

    def _try_put(self, job: Job) -> Future[None] | None:
        with self._lock:
            if self._free() > 0 or self._closed:
                self._append([job])
                return None
            return self._wait(self._putters)

    def _try_get(self, at_most: int) -> list[Job] | Future[None]:
        with self._lock:
            if self._jobs:
                count = min(at_most, len(self._jobs))
                taken = [self._jobs.popleft() for _ in range(count)]
                self._room_came_free(count)
                return taken
            if self._closed:
                raise QueueClosed(self.name)
            return self._wait(self._getters)

    def _free(self) -> int:
        return self._limit - len(self._jobs) - self._reserved

    def _reservable(self, at_most: int) -> bool:
        """Whether it is time for another call that fills places: each costs the same for one message as for ten."""
        if self._closed:
            return True
        free, coming = self._free(), len(self._jobs) + self._reserved
        return free >= min(at_most, max(1, self._limit // 2)) or (free > 0 and coming <= self._limit // LOW)

    def _room_came_free(self, places: int) -> None:
        self._wake(self._putters, places)
        if self._reservers and self._reservable(RESERVED_AT_ONCE):
            self._wake(self._reservers, 1)

    def _append(self, jobs: list[Job]) -> None:
        now = self._clock()
        for job in jobs:
            job.queued_at = now
            self._jobs.append(job)
        self._wake(self._getters, len(jobs))

    @staticmethod
    def _wait(waiters: deque[Future[None]]) -> Future[None]:
        waiter: Future[None] = Future()
        waiters.append(waiter)
        return waiter

    @staticmethod
    def _wake(waiters: deque[Future[None]], count: int) -> None:
        while count > 0 and waiters:
            waiter = waiters.popleft()
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)
                count -= 1

    def _wait_thread(self, waiter: Future[None], timeout: float) -> None:
        try:
            waiter.result(timeout)
        except FutureTimeout:
            self._give_up(waiter)

    async def _wait_task(self, waiter: Future[None]) -> None:
        try:
            await asyncio.wrap_future(waiter)
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def _give_up(self, waiter: Future[None]) -> None:
        """Wait no more: an idle worker must not pile up waiters, and a wake-up just given is for somebody else."""
        with self._lock:
            for waiters in (self._getters, self._putters, self._reservers):
                if waiter in waiters:
                    waiters.remove(waiter)
                    return
            self._wake(self._getters, min(1, len(self._jobs)))
            self._wake(self._putters, 1)
            self._wake(self._reservers, 1)
