"""A host of pictures on 127.0.0.1 for the demo and the tests, and the server thread it shares with the receiver."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from urllib.parse import quote

from aiohttp import web

HOST = "127.0.0.1"
BACKLOG = 1024
"""Connections that may wait to be accepted: a worker opens hundreds at once."""


class ThreadServer:
    """An HTTP server on an event loop in a thread of its own, on a free port, for as long as its context lasts."""

    def __init__(self, *, port: int = 0) -> None:
        self._port = port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._failed: BaseException | None = None
        self.url = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; runs on the server's loop."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread and return once it accepts connections; raises what kept it from doing so."""
        self._started.clear()
        self._failed = None
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failed is not None:
            self._thread = None
            raise self._failed

    def close(self) -> None:
        """End the server and drop what it has not answered; harmless when called twice."""
        thread, self._thread = self._thread, None
        if thread is None or self._loop is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.is_set():
                raise
            self._failed = error
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        # The low-level server: routing costs a third of the requests a second, and there is nothing to route.
        runner = web.ServerRunner(web.Server(self.handle, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, HOST, self._port, backlog=BACKLOG)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.url = f"http://{host}:{port}"
            self._started.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()


class ImageHost(ThreadServer):
    """Serves bytes by path, with keep-alive; a path it does not have is 404.

    ``latency`` (seconds before each answer) and ``fail`` may be changed while it runs. ``fail[path]`` is a status
    that every request for the path gets, or a list of them, one for each request until it is used up.
    """

    def __init__(
        self,
        images: Mapping[str, tuple[bytes, str]] | None = None,
        *,
        latency: float = 0.0,
        fail: Mapping[str, int | list[int]] | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(port=port)
        self._images: dict[str, tuple[bytes, str]] = {}
        self._requests: Counter[str] = Counter()
        self.latency = latency
        self.fail: dict[str, int | list[int]] = {_absolute(path): status for path, status in (fail or {}).items()}
        for path, (body, content_type) in (images or {}).items():
            self._images[_absolute(path)] = body, content_type

    def add(self, path: str, body: bytes, content_type: str = "image/jpeg") -> str:
        """Serve ``body`` at ``path`` from now on, and return its URL once the host is started."""
        self._images[_absolute(path)] = body, content_type
        return self.url_of(path)

    def url_of(self, path: str) -> str:
        """The URL of ``path``, whether it is served or not."""
        return self.url + quote(_absolute(path))

    @property
    def requests(self) -> int:
        """How many requests have come in, for whatever path."""
        return self._requests.total()

    def requests_for(self, path: str) -> int:
        """How many requests have come in for ``path``."""
        return self._requests[_absolute(path)]

    async def handle(self, request: web.BaseRequest) -> web.Response:
        path = request.path
        self._requests[path] += 1
        if self.latency:
            await asyncio.sleep(self.latency)
        status = self.fail.get(path)
        if isinstance(status, list):
            status = status.pop(0) if status else None
        if status is not None:
            return web.Response(status=status)
        body, content_type = self._images.get(path, (None, None))
        if body is None:
            return web.Response(status=404, text="no such picture")
        return web.Response(body=body, content_type=content_type)


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"/{path}"
