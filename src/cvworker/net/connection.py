"""One HTTP/1.1 connection: a request out, a head and a body in, the body where its reader wants it.

Most responses have a ``Content-Length``. Their bodies go from the socket straight into the reader's memory; heads, and
bodies that are framed otherwise, go through llhttp. An image of 130 kB costs a fifth of what a general client takes
for it, and that is what bounds a worker whose model is fast (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Final

import httptools

from cvworker.net.failures import BadResponse, BodyCut, ConnectionFailed, HttpFailed

MAX_HEAD_BYTES: Final = 64 * 1024
HELD_BYTES: Final = 256 * 1024
"""Of a body that its reader has not asked for yet; then the host has to wait."""

_END_OF_HEAD: Final = b"\r\n\r\n"


class Head:
    """Status and header fields of a response; what llhttp calls while it parses one, and the body if it is framed."""

    def __init__(self, body: bytearray) -> None:
        self.status = 0
        self.fields: dict[bytes, bytes] = {}
        self.complete = False
        self._body = body
        self.parser = httptools.HttpResponseParser(self)
        # As browsers and other clients do: what a host gets wrong here can harm no connection but its own.
        self.parser.set_dangerous_leniencies(lenient_headers=True, lenient_spaces_after_chunk_size=True)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        known = self.fields.get(name)
        self.fields[name] = value if known is None else known + b", " + value

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self.complete = True


class Connection(asyncio.BufferedProtocol):
    """The protocol of one connection. ``scratch`` is shared by all of a loop, since nothing stays in it."""

    def __init__(self, scratch: bytearray) -> None:
        self.used = False
        """Whether it has carried an exchange: its host may then have closed it without our knowing."""
        self.idle_until = 0.0
        self.on_lost: Callable[[], object] = lambda: None
        self._scratch = scratch
        self._view = memoryview(scratch)
        self._transport: asyncio.Transport | None = None
        self._lost: HttpFailed | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._begin()

    def _begin(self) -> None:
        self._started = bytearray()  # of a head
        self._head: Head | None = None
        self._held = bytearray()  # of the body, in order, that nobody has taken
        self._left: int | None = None  # of a body with a length: what is still to come
        self._into: memoryview | None = None
        self._paused = False
        self._keep = False
        self.answered = False  # whether any byte of this response has come

    # ---- what the session does

    async def exchange(self, request: bytes) -> Head:
        """Send ``request`` and wait for the head of its response."""
        self._begin()
        self._raise_if_lost()
        assert self._transport is not None
        self._transport.write(request)
        while self._head is None:
            await self._wait()
        self.used = True
        return self._head

    @property
    def length(self) -> int | None:
        """Of the body, as far as it has not come yet or lies here; None where the host does not say."""
        return None if self._left is None else self._left + len(self._held)

    @property
    def complete(self) -> bool:
        """Whether the whole body has come, be it taken or not."""
        return self._left == 0 or (self._head is not None and self._head.complete)

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return self.complete and self._keep and not self.is_closing

    @property
    def is_closing(self) -> bool:
        return self._lost is not None or self._transport is None or self._transport.is_closing()

    async def read_into(self, target: memoryview) -> None:
        """The next ``len(target)`` bytes of a body that has a length and at least as much left."""
        assert self._left is not None
        begun = min(len(self._held), len(target))
        target[:begun] = self._held[:begun]
        del self._held[:begun]
        if begun == len(target):
            return
        self._into = target[begun:]
        left_then = self._left - len(self._into)
        try:
            self._resume()
            while self._left > left_then:
                await self._wait()
        finally:
            self._into = None  # whoever gave the memory may take it back at once

    async def read_some(self) -> bytes:
        """What has come of the body, at least one byte; nothing at its end."""
        while not self._held and not self.complete:
            self._resume()
            await self._wait()
        data = bytes(self._held)
        self._held.clear()
        return data

    def close(self) -> None:
        self._lost = self._lost or ConnectionFailed("the connection is closed")
        self._into = None
        if self._transport is not None:
            self._transport.abort()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Go on with TLS, inside the tunnel that a proxy has opened."""
        assert self._transport is not None
        self._begin()
        loop = asyncio.get_running_loop()
        moved = await loop.start_tls(self._transport, self, context, server_hostname=host)
        assert moved is not None
        self._transport = moved

    async def _wait(self) -> None:
        self._raise_if_lost()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost.with_traceback(None)

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            assert self._transport is not None
            self._transport.resume_reading()

    # ---- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view if self._into is None else self._into

    def buffer_updated(self, nbytes: int) -> None:
        self.answered = True
        if self._into is not None:
            self._body_came_in_place(nbytes)
        elif self._head is None:
            self._head_came(self._view[:nbytes])
        else:
            self._body_came(self._view[:nbytes])

    def eof_received(self) -> bool:
        self._end(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)
        self.on_lost()

    def _body_came_in_place(self, count: int) -> None:
        assert self._into is not None
        assert self._left is not None
        self._left -= count
        if count == len(self._into):
            self._into = None
            self._wake()
        else:
            self._into = self._into[count:]

    def _head_came(self, data: memoryview) -> None:
        if self._waiter is None:  # nobody asked for anything
            self.close()
            return
        seen = max(0, len(self._started) - len(_END_OF_HEAD))  # so that a host that dribbles costs no more than others
        self._started += data
        while self._head is None and (end := self._started.find(_END_OF_HEAD, seen)) >= 0:
            end, seen = end + len(_END_OF_HEAD), 0
            head, rest = self._started[:end], self._started[end:]
            self._started = bytearray()
            self._understand(head)
            if self._lost is not None:
                return
            if self._head is None:
                self._started = rest  # behind an interim response
            else:
                self._body_came(memoryview(rest))
        if len(self._started) > MAX_HEAD_BYTES:
            self._fail(BadResponse(f"the head of the response is longer than {MAX_HEAD_BYTES} bytes"))

    def _understand(self, data: bytearray) -> None:
        head = Head(self._held)
        try:
            head.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(BadResponse("the host changed the protocol, unasked"))
            return
        except httptools.HttpParserError as error:
            self._fail(BadResponse(f"the response is not HTTP/1 ({type(error).__name__})"))
            return
        head.status = head.parser.get_status_code()
        if head.status < 200:
            return
        self._head = head
        self._keep = head.parser.should_keep_alive()
        if head.complete or head.status in (204, 304):
            self._left = 0
        elif b"transfer-encoding" not in head.fields and b"content-length" in head.fields:
            self._left = int(head.fields[b"content-length"])  # llhttp has seen that it is one number
        self._wake()

    def _body_came(self, data: memoryview) -> None:
        head = self._head
        assert head is not None
        if self._left is None:
            self._framed_body_came(head, data)
        elif data:
            count = min(len(data), self._left)
            self._held += data[:count]
            self._left -= count
            if count < len(data):
                self._keep = False  # more than was announced: whatever follows, it is no response of ours
        self._wake()
        if len(self._held) > HELD_BYTES and not (self.complete or self._paused or self.is_closing):
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def _framed_body_came(self, head: Head, data: memoryview) -> None:
        if head.complete:
            self._keep = self._keep and not data
            return
        try:
            head.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BadResponse(f"the body is not framed as HTTP/1 has it ({type(error).__name__})"))

    def _end(self, error: Exception | None) -> None:
        head = self._head
        self._keep = False
        if head is not None and self._left is None and b"transfer-encoding" not in head.fields and error is None:
            head.complete = True  # a body without any framing ends with the connection
            self._wake()
        elif head is not None and not self.complete:
            self._fail(BodyCut("the connection ended before the body was complete"))
        else:
            reason = "" if error is None else f" ({type(error).__name__})"
            self._fail(ConnectionFailed(f"the host hung up before it answered{reason}"))

    def _fail(self, failure: HttpFailed) -> None:
        self._lost = self._lost or failure
        self._into = None
        self._wake()
        if self._transport is not None:
            self._transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
