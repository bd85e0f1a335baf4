"""Where the demo's and the tests' answers arrive: a callback endpoint that remembers every POST."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from cvworker.embedded.server import ThreadServer

Reply = int | tuple[int, Mapping[str, str]]
"""A status, or a status and headers."""


@dataclass(frozen=True, slots=True)
class Received:
    """One POST as it arrived, whatever it was answered with."""

    path: str
    headers: Mapping[str, str]
    """Found whatever the case of the name."""
    body: bytes
    json: Any
    """The parsed body; None where it is not JSON."""
    at: float
    """When the whole body had arrived, in seconds since the epoch."""
    monotonic: float = field(repr=False)
    """The same moment on the clock for durations."""

    @property
    def webhook_id(self) -> str | None:
        """The same on every attempt to deliver one message's answer."""
        return self.headers.get("webhook-id")

    @property
    def id(self) -> str | None:
        """The client's own id, as the answer echoes it."""
        return self.json.get("id") if isinstance(self.json, dict) else None


def accept(received: Received) -> Reply:
    """The reply to every POST unless a test wants another."""
    return 204


class CallbackReceiver(ThreadServer):
    """Accepts answers at every path, and keeps what came in order of arrival.

    ``respond`` chooses the reply to each POST (on the server's loop: it must not block; what it raises is a 500).
    ``delay`` is how many seconds each reply is held back. Both may be changed while it runs. An answer counts as
    accepted when its reply, if any gets through, is 2xx: a worker that gave up waiting will send it again.
    """

    def __init__(
        self, *, respond: Callable[[Received], Reply] | None = None, delay: float = 0.0, port: int = 0
    ) -> None:
        super().__init__(port=port)
        self.respond = respond or accept
        self.delay = delay
        self._changed = threading.Condition()
        self._received: list[Received] = []
        self._accepted: list[Received] = []
        self._deliveries: Counter[str] = Counter()
        self._anonymous = 0

    @property
    def received(self) -> list[Received]:
        """Every POST so far, accepted or not."""
        with self._changed:
            return list(self._received)

    @property
    def accepted(self) -> list[Received]:
        """The POSTs that were answered with 2xx, repeats included."""
        with self._changed:
            return list(self._accepted)

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        """The answers accepted so far, by the client's id; of several with one id the newest."""
        return {answer.id: answer.json for answer in self.accepted if isinstance(answer.id, str)}

    @property
    def count(self) -> int:
        """How many answers have been accepted, repeats not counted."""
        with self._changed:
            return self._count()

    @property
    def duplicates(self) -> dict[str, int]:
        """How often each answer was accepted, by webhook-id, for those that were accepted more than once."""
        with self._changed:
            return {key: times for key, times in self._deliveries.items() if times > 1}

    def wait_for(self, n: int, timeout: float) -> bool:
        """Wait until ``n`` answers have been accepted, repeats not counted; False if ``timeout`` seconds pass first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count() >= n, timeout)

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``condition`` holds, looking after each POST; False if ``timeout`` seconds pass first."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def clear(self) -> None:
        """Forget everything received so far."""
        with self._changed:
            self._received.clear()
            self._accepted.clear()
            self._deliveries.clear()
            self._anonymous = 0

    async def handle(self, request: web.BaseRequest) -> web.Response:
        body = await request.content.read()  # not request.read(), which refuses more than 1 MiB
        if request.method != "POST":
            return web.Response(status=405, headers={"Allow": "POST"})
        received = Received(request.path, request.headers, body, _parsed(body), time.time(), time.monotonic())
        with self._changed:
            self._received.append(received)
            self._changed.notify_all()
        if self.delay:
            await asyncio.sleep(self.delay)
        reply = self.respond(received)
        status, headers = (reply, {}) if isinstance(reply, int) else reply
        if 200 <= status < 300:
            self._accept(received)
        return web.Response(status=status, headers=headers)

    def _accept(self, received: Received) -> None:
        with self._changed:
            self._accepted.append(received)
            if received.webhook_id is None:
                self._anonymous += 1
            else:
                self._deliveries[received.webhook_id] += 1
            self._changed.notify_all()

    def _count(self) -> int:
        return len(self._deliveries) + self._anonymous


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
