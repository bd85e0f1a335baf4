"""The endpoints: liveness, readiness, metrics, status. Read-only, and the page loads nothing from elsewhere."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from cvworker.errors import StartupError

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}
EVENT_EVERY_S = 1.0
MOST_STREAMS = 16
"""Pages that are told of each second; a further one asks for itself, as it does where a proxy holds events back."""
ASSETS = {
    "/": ("status.html", "text/html"),
    "/status.css": ("status.css", "text/css"),
    "/status.js": ("status.js", "text/javascript"),
}


class Endpoints:
    """Serves what is wrong (liveness), what is missing (readiness), the status and the metrics, each by a callable.

    ``refresh`` is awaited before each of them.
    """

    def __init__(
        self,
        *,
        problems: Callable[[], list[str]],
        missing: Callable[[], list[str]],
        status: Callable[[], dict[str, Any]],
        metrics: Callable[[], bytes],
        refresh: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._problems = problems
        self._missing = missing
        self._status = status
        self._metrics = metrics
        self._refresh = refresh
        self._runner: web.AppRunner | None = None
        self._streams = 0
        self._closing = asyncio.Event()
        self._telling = asyncio.Lock()
        self._event, self._event_at = b"", float("-inf")
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises StartupError when the port is taken or the address is not this machine's."""
        app = web.Application()
        for path, answer in (
            ("/livez", lambda: _verdict(self._problems())),
            ("/readyz", lambda: _verdict(self._missing())),
            ("/metrics", self._get_metrics),
            ("/status.json", lambda: web.json_response(self._status(), headers=HEADERS)),
        ):
            app.router.add_get(path, self._fresh(answer))
        app.router.add_get("/events", self._get_events)
        for path in ASSETS:
            app.router.add_get(path, _asset)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"http_port: port {port} on {host} is taken; choose another with --http-port (0 picks a free one)"
                ) from None
            raise StartupError(f"http_host: cannot listen on {host}:{port} ({error.strerror})") from None
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _get_events(self, request: web.Request) -> web.StreamResponse:
        """The status once a second, as server-sent events, for as long as somebody listens."""
        if self._streams >= MOST_STREAMS:
            return web.Response(status=503, text="too many listen; /status.json is still there\n", headers=HEADERS)
        event = await self._next_event()
        response = web.StreamResponse(
            headers={**HEADERS, "Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        self._streams += 1
        try:
            while not self._closing.is_set():
                await response.write(event)
                try:
                    async with asyncio.timeout(EVENT_EVERY_S):
                        await self._closing.wait()
                except TimeoutError:
                    event = await self._next_event()
        except ConnectionError:  # the page was closed
            pass
        finally:
            self._streams -= 1
        return response

    async def _next_event(self) -> bytes:
        """The same for all who listen at that moment: ten pages cost what one does."""
        async with self._telling:
            if time.monotonic() - self._event_at > EVENT_EVERY_S / 2:
                if self._refresh is not None:
                    await self._refresh()
                self._event = b"data: " + json.dumps(self._status()).encode() + b"\n\n"
                self._event_at = time.monotonic()
            return self._event

    def _fresh(self, answer: Callable[[], web.Response]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(_request: web.Request) -> web.Response:
            if self._refresh is not None:
                await self._refresh()
            return answer()

        return handle

    def _get_metrics(self) -> web.Response:
        return web.Response(body=self._metrics(), headers={**HEADERS, "Content-Type": CONTENT_TYPE_LATEST})


def _verdict(reasons: list[str]) -> web.Response:
    body = {"ok": not reasons, "reasons": reasons}
    return web.Response(
        text=json.dumps(body) + "\n", status=503 if reasons else 200, content_type="application/json", headers=HEADERS
    )


async def _asset(request: web.Request) -> web.Response:
    name, content_type = ASSETS[request.path]
    text = files("cvworker.observe").joinpath(name).read_text("utf-8")
    return web.Response(text=text, content_type=content_type, headers=HEADERS)
