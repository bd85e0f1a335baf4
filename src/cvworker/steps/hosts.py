"""Fair shares and circuit breakers by host: one that is dead or slow must not hold up the answers to others."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

OPENS_AFTER = 5
"""Failures one after the other, until a host is left alone for a while."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
RECENT_S = 60.0
"""A host is one of several for this long after its last request."""
QUEUE_AT_SLOW = 4
"""How many may wait for a host that is slow but well, for each that may be under way at all."""
REMEMBERED = 1000
"""Hosts whose failures are remembered; the least recently used is forgotten first."""


@dataclass(slots=True)
class _Host:
    used_at: float = 0.0
    in_hand: int = 0
    under_way: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    failures: int = 0
    pauses: int = 0
    closed_until: float = 0.0
    probing: bool = False


class Hosts:
    """At most ``limit()`` requests at once, and no more than half of them to one host while others want some.

    A host that fails again and again is *paused*: requests to it are refused for a while, then one is let through to
    see, and the pause doubles each time that fails. State is kept for :data:`REMEMBERED` hosts at most.
    """

    def __init__(self, limit: Callable[[], int], clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._under_way = 0
        self._queued: dict[int, _Host] = {}
        """Those that somebody waits for, by identity."""

    @property
    def under_way(self) -> int:
        return self._under_way

    def paused_for(self, name: str) -> float:
        """Seconds until ``name`` may be tried again; 0 when it may be now."""
        host = self._hosts.get(name)
        if host is None or not host.closed_until:
            return 0.0
        left = host.closed_until - self._clock()
        if left > 0:
            return left
        return FIRST_PAUSE_S if host.probing else 0.0

    def paused(self) -> dict[str, float]:
        """The hosts left alone just now, with the seconds each still is."""
        return {name: left for name in self._hosts if (left := self.paused_for(name)) > 0}

    def one_and_well(self) -> bool:
        """Whether there is one host at most, and it is not paused: nobody would be in anybody's way."""
        last = next(reversed(self._hosts.values()), None)
        return last is None or not (last.closed_until or self._others(last))

    def crowded(self, name: str, *, patient: bool = False) -> bool:
        """Whether so many wait for this host already that more would only be in the way of others.

        A host that is only slow may have a longer queue, and who is ``patient`` joins it however long it is.
        """
        host = self._hosts.get(name)
        if host is None or host.in_hand < self._limit():
            return False
        if self.paused_for(name) > 0:
            return True
        return not patient and host.in_hand >= QUEUE_AT_SLOW * self._limit() and self._others(host)

    @contextmanager
    def in_hand(self, name: str) -> Iterator[None]:
        """Count one that is on its way to this host, for :meth:`crowded`."""
        host = self._host(name)
        host.in_hand += 1
        try:
            yield
        finally:
            host.in_hand -= 1

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[None]:
        """Wait for this host's turn, and hold it for the block."""
        host = self._host(name)
        probe = host.probing = bool(host.closed_until)  # the one that finds out whether it is back
        try:
            await self._turn(host)
            try:
                yield
            finally:
                self._leave(host)
        finally:
            if probe:  # whatever came of it: one that says nothing of the host leaves the next to find out
                host.probing = False

    async def _turn(self, host: _Host) -> None:
        self._hand_out()  # the limit may have grown since the last one left
        if host.waiting or not self._may(host):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            host.waiting.append(turn)
            self._queued[id(host)] = host
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave(host)
                elif turn in host.waiting:
                    host.waiting.remove(turn)
                    self._unqueue(host)
                raise
        else:
            self._enter(host)

    def succeeded(self, name: str) -> None:
        """The host answered as a host that is well."""
        host = self._host(name)
        host.failures, host.pauses, host.closed_until, host.probing = 0, 0, 0.0, False

    def failed(self, name: str) -> None:
        """The host did not answer, or said that it cannot."""
        host = self._host(name)
        host.failures += 1
        if host.probing or host.failures >= OPENS_AFTER:
            host.probing = False
            if host.closed_until <= self._clock():  # those that were under way when it was paused count once
                host.pauses += 1
                host.closed_until = self._clock() + min(FIRST_PAUSE_S * 2.0 ** (host.pauses - 1), LONGEST_PAUSE_S)

    def _others(self, host: _Host) -> bool:
        """Whether another host was used lately: one that is well has nothing under way most of the time."""
        latest = itertools.islice(reversed(self._hosts.values()), 2)
        return any(each is not host and self._clock() - each.used_at < RECENT_S for each in latest)

    def _host(self, name: str) -> _Host:
        host = self._hosts.setdefault(name, _Host())
        self._hosts.move_to_end(name)
        host.used_at = self._clock()
        if len(self._hosts) > REMEMBERED:
            for other, state in self._hosts.items():
                if not state.in_hand and not state.under_way and not state.waiting and state is not host:
                    del self._hosts[other]
                    break
        return host

    def _may(self, host: _Host) -> bool:
        limit = self._limit()
        if self._under_way >= limit:
            return False
        return host.under_way < max(1, limit // 2) or not self._others(host)

    def _enter(self, host: _Host) -> None:
        host.under_way += 1
        self._under_way += 1

    def _leave(self, host: _Host) -> None:
        host.under_way -= 1
        self._under_way -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Give free slots to who waits: first where the fewest are under way, so nobody's backlog is everybody's."""
        while self._queued and self._under_way < self._limit():
            ready = [each for each in self._queued.values() if self._may(each)]
            if not ready:
                return
            chosen = min(ready, key=lambda each: each.under_way)
            turn = chosen.waiting.popleft()
            self._unqueue(chosen)
            if not turn.done():
                self._enter(chosen)
                turn.set_result(None)

    def _unqueue(self, host: _Host) -> None:
        if not host.waiting:
            self._queued.pop(id(host), None)


def host_of(url: str) -> str:
    """The part of a URL that fails or is slow as one: host and port (for ``s3://`` the bucket)."""
    return urlsplit(url).netloc.lower()
