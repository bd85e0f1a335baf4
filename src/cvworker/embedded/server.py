"""An HTTP server on 127.0.0.1 with a thread of its own: what the image host and the callback receiver share."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from aiohttp import web

HOST = "127.0.0.1"
BACKLOG = 1024
"""Connections that may wait to be accepted: a worker opens hundreds at once."""


class ThreadServer(ABC):
    """An HTTP server on an event loop in a thread of its own, on a free port, for as long as its context lasts."""

    def __init__(self, *, port: int = 0) -> None:
        self._port = port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._failed: BaseException | None = None
        self.url = ""

    @abstractmethod
    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; runs on the server's loop."""

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
