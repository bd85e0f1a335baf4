"""HTTP/1.1 at the least cost per request: the server shares its cores with what is measured.

Enough of the protocol for well-behaved clients on the loopback: keep-alive, ``Content-Length``, one request at a time
on a connection. An aiohttp server would cost several times as much for each request.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable

SEND_BUFFER = 1 << 20
"""Bytes: a whole picture fits, so that one ``send`` is enough."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_REASONS = {200: b"OK", 204: b"No Content", 400: b"Bad Request", 404: b"Not Found"}

Handler = Callable[["Connection", bytes, bytes, bytes], None]
"""Told of each request: connection, path, head and body. It calls ``respond``, now or later."""


def response(body: bytes, kind: bytes = b"application/json", status: int = 200) -> bytes:
    """A whole response."""
    return (
        b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
        % (status, _REASONS[status], kind, len(body))
    ) + body


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = buffer
            return
        head, length = buffer[:end], 0
        if not head.startswith(b"GET") and (found := _LENGTH.search(head)):
            length = int(found[1])
        after = end + 4 + length
        if len(buffer) < after:
            self._buffer = buffer
            return
        self._buffer = b""
        self._handler(self, head.split(b" ", 2)[1], head, buffer[end + 4 : after])

    def respond(self, data: bytes, after: float = 0.0) -> None:
        """Send a whole response, ``after`` so many seconds; nothing where the client has gone."""
        if after:
            self._loop.call_later(after, self.respond, data)
        elif self._transport is not None:
            self._transport.write(data)


async def serve(handler: Handler, port: int = 0, host: str = "127.0.0.1") -> asyncio.Server:
    """Listen, on the loopback where nothing else is said."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Connection(handler), host, port, backlog=1024)
