"""Answer → HTTP POST to the client's callback, tried again in place for a while."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cvworker.errors import CvworkerError, UrlNotAllowed
from cvworker.net import HttpFailed, NameUnknown, Response
from cvworker.retry_after import retry_after
from cvworker.steps.hosts import Hosts, host_of

if TYPE_CHECKING:
    from cvworker.clock import Clock
    from cvworker.net import GuardedSession
    from cvworker.signing import Signer

TRIES = 4
RETRY_BASE_S = 0.5
RETRY_IN_PLACE_S = 15.0
"""A longer wish of the host is left to SQS: the result would only occupy memory."""
MAX_RESPONSE_BYTES = 16 * 1024
"""Read of a response, so that its connection can be used again; more is cut off with the connection."""
DRAIN_S = 1.0
RESULT_WAIT_S = 120.0
"""A result waits this long in memory for a host that fails, before SQS and another computation take over."""
IN_HAND_ALONE, IN_HAND = 2, 16
"""Answers on their way for each that can be under way, with one host and with several."""


class CallbackRefused(CvworkerError):
    """The callback was not accepted: SQS tries again, not before ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Sent:
    """An exchange that settles the message: 2xx, or 410."""

    status: int


class CallbackSender:
    """Posts answers on one event loop."""

    def __init__(
        self,
        session: GuardedSession,
        *,
        signer: Signer | None,
        timeout: float,
        clock: Clock,
        concurrency: int,
        called: Callable[[str, float], None] = lambda _code_class, _seconds: None,
    ) -> None:
        self._session = session
        self._signer = signer
        self._timeout = timeout
        self._clock = clock
        self._concurrency = concurrency
        self.hosts = Hosts(lambda: concurrency, clock.monotonic)
        self._called = called

    def in_hand_limit(self) -> int:
        """How many answers may be on their way: with several hosts more than can be under way, so that those to one
        that is paused or slow wait here, and the others pass them by."""
        return (IN_HAND_ALONE if self.hosts.one_and_well() else IN_HAND) * self._concurrency

    def crowded(self, url: str, *, last: bool) -> bool:
        """Whether an answer to ``url`` would only join a crowd: then the work for it had better wait, too.

        On the ``last`` allowed receive it waits for a host that is well however slow: putting it off would lose it.
        """
        return self.hosts.crowded(host_of(url), patient=last)

    def paused_for(self, url: str) -> float:
        """Seconds that the host of ``url`` is left alone for, after failures."""
        return self.hosts.paused_for(host_of(url))

    async def post(
        self, url: str, webhook_id: str, body: bytes, *, last: bool = False, headers: Mapping[str, str] | None = None
    ) -> Sent:
        """Post ``body`` until it is accepted, as often and as long as is worth it in place.

        ``headers`` are sent besides our own.

        Raises:
            CallbackRefused: not accepted; UrlNotAllowed: this URL may not be called at all.
        """
        host = host_of(url)
        if self.crowded(url, last=last):
            raise CallbackRefused("too many answers wait for this host", self.hosts.paused_for(host))
        with self.hosts.in_hand(host):
            return await self._try(url, host, webhook_id, body, headers or {})

    async def _try(self, url: str, host: str, webhook_id: str, body: bytes, headers: Mapping[str, str]) -> Sent:
        give_up_at = self._clock.monotonic() + RESULT_WAIT_S
        tries_left = TRIES
        while True:
            await self._until_resumed(host, give_up_at)
            tries_left -= 1
            pause = RETRY_BASE_S * 2.0 ** (TRIES - 1 - tries_left) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
            try:
                async with self.hosts.slot(host):
                    status, wished = await self._once(url, webhook_id, body, headers)
            except (HttpFailed, TimeoutError) as error:
                self.hosts.failed(host)
                if isinstance(error, TimeoutError) or not tries_left:
                    raise CallbackRefused(_what(error)) from None
            else:
                passing = status == 429 or status >= 500
                (self.hosts.failed if passing else self.hosts.succeeded)(host)
                if 200 <= status < 300 or status == 410:
                    return Sent(status)
                pause = max(pause, wished)
                if not passing or not tries_left or pause > RETRY_IN_PLACE_S:
                    raise CallbackRefused(f"HTTP {status}", wished)
            await asyncio.sleep(pause)

    async def _until_resumed(self, host: str, give_up_at: float) -> None:
        """Let the result wait while its host is paused: computing it again would cost more than keeping it."""
        while (paused := self.hosts.paused_for(host)) > 0:
            if self._clock.monotonic() + paused > give_up_at:
                raise CallbackRefused("the host fails again and again", paused)
            await asyncio.sleep(paused * random.uniform(1.0, 1.2))  # noqa: S311 - jitter

    async def _once(self, url: str, webhook_id: str, body: bytes, extra: Mapping[str, str]) -> tuple[int, float]:
        """One exchange: its status, and for how many seconds the host wishes to be left alone."""
        headers = {"webhook-id": webhook_id, "Content-Type": "application/json", **extra}
        began = self._clock.monotonic()
        if self._signer is not None:  # at each try: receivers refuse old timestamps
            headers |= self._signer.headers(webhook_id, int(self._clock.wall()), body)
        outcome, answered = "error", None
        try:
            async with self._session.post(url, data=body, headers=headers, timeout=self._timeout) as response:
                wished = retry_after(response.header("retry-after")) if response.status in (429, 503) else None
                outcome, answered = f"{response.status // 100}xx", (response.status, wished or 0.0)
                if not response.has_come:
                    await _drain(response)
        except UrlNotAllowed:
            outcome = "refused"
            raise
        except (HttpFailed, TimeoutError) as error:
            if answered is None:
                outcome = "timeout" if isinstance(error, TimeoutError) else outcome
                raise
        finally:
            self._called(outcome, self._clock.monotonic() - began)
        return answered


async def _drain(response: Response) -> None:
    """Read a short body, for the connection's sake: the answer was given with the status, whatever comes after it."""
    size = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            async for data in response.chunks():
                size += len(data)
                if size > MAX_RESPONSE_BYTES:
                    return
    except (HttpFailed, TimeoutError):
        pass


def _what(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, NameUnknown):
        return f"the name {error.host} does not resolve"
    return str(error)
