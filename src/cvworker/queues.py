"""The bounded queue between two steps, shared by threads and event loops."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from cvworker.job import Job

_RECHECK_S = 1.0
"""A waiting thread looks again this often, so that a wake-up that went astray delays, never hangs."""
LOW = 4
"""A queue filled to less than this fraction of its limit takes what it can get."""
RESERVED_AT_ONCE = 10
"""Places worth waking somebody up for: what one receive call can bring."""


class QueueClosed(Exception):
    """The queue is closed and empty."""


class _Thread:
    """A thread that waits: on a bare lock, as each message passes here several times."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        self._lock.release()

    def wait(self, timeout: float) -> bool:
        return self._lock.acquire(timeout=max(0.0, timeout))


class _Task:
    """A coroutine that waits, on its event loop."""

    __slots__ = ("_loop", "woken")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.woken = self._loop.create_future()

    def wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._set)
        except RuntimeError:  # the loop has ended, and whoever waited with it
            pass

    def _set(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


_Waiter = _Thread | _Task
"""Woken once at most."""
_W = TypeVar("_W", _Thread, _Task)


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
        self._getters: deque[_Waiter] = deque()
        self._putters: deque[_Waiter] = deque()
        self._reservers: deque[_Waiter] = deque()

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
                self._reservers.append(waiter := _Thread())
            self._wait_thread(waiter, left)

    def fill(self, jobs: list[Job], reserved: int) -> None:
        """Put jobs into ``reserved`` places and give back those not used (a message may hold several jobs)."""
        with self._lock:
            self._reserved -= reserved
            self._append(jobs)
            unused = reserved - len(jobs)
            if unused > 0:
                self._room_came_free(unused)

    def put(self, *jobs: Job) -> None:
        """Add jobs, as many at once as there is room for, waiting for more."""
        left = list(jobs)
        while (waiter := self._try_put(left, _Thread)) is not None:
            self._wait_thread(waiter, _RECHECK_S)

    async def aput(self, job: Job) -> None:
        """Add a job, waiting for room."""
        left = [job]
        while (waiter := self._try_put(left, _Task)) is not None:
            await self._wait_task(waiter)

    def get(self, at_most: int = 1, *, timeout: float | None = None) -> list[Job]:
        """Take up to ``at_most`` jobs, waiting for the first; empty after ``timeout`` seconds.

        Raises:
            QueueClosed: closed and empty.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not isinstance(taken := self._try_get(at_most, _Thread), list):
            left = until - time.monotonic()
            if left <= 0:
                self._give_up(taken)
                return []
            self._wait_thread(taken, min(left, _RECHECK_S))
        return taken

    async def aget(self, at_most: int = 1) -> list[Job]:
        """Take up to ``at_most`` jobs, waiting for the first. Raises QueueClosed as :meth:`get` does."""
        while not isinstance(taken := self._try_get(at_most, _Task), list):
            await self._wait_task(taken)
        return taken

    def _try_put(self, left: list[Job], waiter: Callable[[], _W]) -> _W | None:
        """Put what fits, which is then no longer ``left``; what to wait with for the rest."""
        with self._lock:
            count = len(left) if self._closed else max(0, min(self._free(), len(left)))
            self._append(left[:count])
            del left[:count]
            if not left:
                return None
            self._putters.append(waits := waiter())
            return waits

    def _try_get(self, at_most: int, waiter: Callable[[], _W]) -> list[Job] | _W:
        with self._lock:
            if self._jobs:
                count = min(at_most, len(self._jobs))
                taken = [self._jobs.popleft() for _ in range(count)]
                self._room_came_free(count)
                return taken
            if self._closed:
                raise QueueClosed(self.name)
            self._getters.append(waits := waiter())
            return waits

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
    def _wake(waiters: deque[_Waiter], count: int) -> None:
        for _ in range(min(count, len(waiters))):
            waiters.popleft().wake()

    def _wait_thread(self, waiter: _Thread, timeout: float) -> None:
        if not waiter.wait(timeout):
            self._give_up(waiter)

    async def _wait_task(self, waiter: _Task) -> None:
        try:
            await waiter.woken
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def _give_up(self, waiter: _Waiter) -> None:
        """Wait no more: an idle worker must not pile up waiters, and a wake-up just given is for somebody else."""
        with self._lock:
            for waiters in (self._getters, self._putters, self._reservers):
                if waiter in waiters:
                    waiters.remove(waiter)
                    return
            self._wake(self._getters, min(1, len(self._jobs)))
            self._wake(self._putters, 1)
            self._wake(self._reservers, 1)
