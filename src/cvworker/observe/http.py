"""The endpoints: liveness, readiness, metrics, status. Read-only, and the page loads nothing from elsewhere."""

from __future__ import annotations

import errno
import json
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
        if self._runner is not None:
            await self._runner.cleanup()

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
