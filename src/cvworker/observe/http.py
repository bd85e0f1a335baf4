"""The endpoints: liveness, readiness, metrics, status. Read-only, and the page loads nothing from elsewhere."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
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
    """Serves what three callables tell: what is wrong (liveness), what is missing (readiness), and the status."""

    def __init__(
        self,
        *,
        problems: Callable[[], list[str]],
        missing: Callable[[], list[str]],
        status: Callable[[], dict[str, Any]],
        metrics: Callable[[], bytes],
    ) -> None:
        self._problems = problems
        self._missing = missing
        self._status = status
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises StartupError when the port is taken or the address is not this machine's."""
        app = web.Application()
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/status.json", self._get_status)
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

    async def _livez(self, _request: web.Request) -> web.Response:
        return _verdict(self._problems())

    async def _readyz(self, _request: web.Request) -> web.Response:
        return _verdict(self._missing())

    async def _get_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={**HEADERS, "Content-Type": CONTENT_TYPE_LATEST})

    async def _get_status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._status(), headers=HEADERS)


def _verdict(reasons: list[str]) -> web.Response:
    body = {"ok": not reasons, "reasons": reasons}
    return web.Response(
        text=json.dumps(body) + "\n", status=503 if reasons else 200, content_type="application/json", headers=HEADERS
    )


async def _asset(request: web.Request) -> web.Response:
    name, content_type = ASSETS[request.path]
    text = files("cvworker.observe").joinpath(name).read_text("utf-8")
    return web.Response(text=text, content_type=content_type, headers=HEADERS)
