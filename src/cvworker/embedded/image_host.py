"""A host of pictures on 127.0.0.1 for the demo and the tests."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from urllib.parse import quote

from aiohttp import web

from cvworker.embedded.server import ThreadServer


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
