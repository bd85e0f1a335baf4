"""HTTP to what the guard allows: get with redirects, and post."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Self
from urllib.parse import urljoin

from cvworker.errors import DownloadFailed, UrlNotAllowed
from cvworker.net.connection import Connection, Head
from cvworker.net.failures import ConnectionFailed
from cvworker.net.guard import AddressGuard, Url
from cvworker.net.lookups import LOOKUP_TIMEOUT, Lookup, Resolver, look_up
from cvworker.net.pool import Pool

MAX_REDIRECTS = 5

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class Response:
    """The head of a response, and the way to its body, which comes as it was sent: nothing is decompressed."""

    __slots__ = ("_connection", "_head", "status", "url")

    def __init__(self, url: Url, head: Head, connection: Connection) -> None:
        self.url = url
        self.status = head.status
        self._head = head
        self._connection = connection

    def header(self, name: str, default: str = "") -> str:
        """A header field by its name in lower case; several of one name are joined with commas.

        Hosts send UTF-8 where they may not, in ``Location`` above all; bytes that are none become lone surrogates.
        """
        value = self._head.fields.get(name.encode())
        return default if value is None else value.decode(errors="surrogateescape")

    @property
    def length(self) -> int | None:
        """Bytes of the body that are not read yet, or None where the host did not say how long it is."""
        return self._connection.length

    @property
    def has_come(self) -> bool:
        """Whether the whole body is here already, and its connection free for the next request."""
        return self._connection.complete

    async def read_into(self, target: memoryview) -> None:
        """The next ``len(target)`` bytes of a body with a length, from the socket straight into ``target``."""
        await self._connection.read_into(target)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces as they come; the host has to wait while nobody takes them."""
        while data := await self._connection.read_some():
            yield data

    async def read(self) -> bytes:
        """All of the body, however long."""
        return b"".join([data async for data in self.chunks()])


class GuardedSession:
    """HTTP for one event loop, to what ``guard`` allows. Create it inside the loop; ``async with`` closes it.

    ``limit`` counts connections. What is refused raises UrlNotAllowed before a connection is made; a name that does
    not resolve within ``lookup_timeout`` seconds raises NameUnknown; otherwise TimeoutError and HttpFailed.

    With a proxy of the guard's, every request goes through it: no host has a way round. Names are resolved and checked
    here as ever, and one that does not resolve here is not handed over. But the proxy is given the name, not the
    address, and resolves it again: it has to refuse private addresses by itself, too.

    Bodies are handed over as they came, not decompressed, so that callers can cap them. Cookies are not kept. Proxies
    and credentials in the environment are not used: such a proxy would dial on our behalf, unasked.
    """

    def __init__(
        self,
        guard: AddressGuard,
        *,
        limit: int = 100,
        keepalive_timeout: float = 15.0,
        user_agent: str = "cvworker",
        ssl_context: ssl.SSLContext | None = None,
        lookup: Lookup = look_up,
        lookup_timeout: float = LOOKUP_TIMEOUT,
    ) -> None:
        self._guard = guard
        resolver = Resolver(lookup, lookup_timeout)
        self._pool = Pool(guard, resolver, limit=limit, keepalive=keepalive_timeout, tls=ssl_context)
        self._own_fields = f"User-Agent: {user_agent}\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._pool.close()

    @asynccontextmanager
    async def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - it is asyncio.timeout, which nobody must forget
        https_only: bool = False,
    ) -> AsyncIterator[Response]:
        """GET, following redirects. ``timeout`` is in seconds, from the first look-up to the end of the ``async with``.

        ``headers`` go to the origin of ``url`` only. ``https_only`` refuses a redirect to plain http. Raises
        DownloadFailed at the sixth redirect.
        """
        async with asyncio.timeout(timeout):
            target = self._guard.check_url(url)
            for _ in range(MAX_REDIRECTS + 1):
                response, connection = await self._exchange("GET", target, headers)
                try:
                    location = response.header("location") if response.status in _REDIRECTS else ""
                    if not location:
                        yield response
                        return
                finally:
                    self._pool.give_back(target, connection)
                origin, target = target.origin, self._redirected(target, location)
                if https_only and target.scheme != "https":
                    raise UrlNotAllowed("redirect refused: it is not to https")
                if target.origin != origin:
                    headers = None  # for good: a hop back is some other host's wish
            raise DownloadFailed(f"more than {MAX_REDIRECTS} redirects")

    @asynccontextmanager
    async def post(
        self,
        url: str,
        *,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as in get
    ) -> AsyncIterator[Response]:
        """POST ``data``. A redirect is a response like any other, and not followed."""
        async with asyncio.timeout(timeout):
            target = self._guard.check_url(url)
            response, connection = await self._exchange("POST", target, headers, data)
            try:
                yield response
            finally:
                self._pool.give_back(target, connection)

    async def _exchange(
        self, method: str, url: Url, headers: Mapping[str, str] | None, data: bytes | None = None
    ) -> tuple[Response, Connection]:
        request = self._request(method, url, headers, data)
        if self._guard.proxy is not None and not self._guard.is_unchecked(url) and not url.is_numeric:
            await self._pool.resolve(url, checked=True)
        while True:
            connection = await self._pool.take(url)
            again = connection.used
            try:
                head = await connection.exchange(request)
            except BaseException as error:
                connection.close()
                if again and isinstance(error, ConnectionFailed) and not connection.answered:
                    # The host closed it while it was idle, and has not seen this request: what every client repeats.
                    # A callback carries its webhook-id, so even a host that did see it knows the repeat.
                    self._pool.forget(url)
                    continue
                raise
            return Response(url, head, connection), connection

    def _request(self, method: str, url: Url, headers: Mapping[str, str] | None, data: bytes | None) -> bytes:
        target, fields = url.target, self._own_fields
        if self._guard.proxy is not None and url.scheme == "http":
            target, fields = str(url), fields + self._pool.proxy_credentials()
        for name, value in (headers or {}).items():
            if not _FIELD_VALUE.fullmatch(value):
                raise ValueError(f"the header field {name} has characters that no field can carry")
            fields += f"{name}: {value}\r\n"
        if data is not None:
            fields += f"Content-Length: {len(data)}\r\n"
        head = f"{method} {target} HTTP/1.1\r\nHost: {url.place}\r\n{fields}\r\n".encode("latin-1")
        return head if data is None else head + data

    def _redirected(self, url: Url, location: str) -> Url:
        try:
            return self._guard.check_url(urljoin(str(url), location))
        except UrlNotAllowed as refused:
            raise UrlNotAllowed(f"redirect refused: {refused}") from None
        except ValueError:
            raise UrlNotAllowed("redirect refused: the URL is malformed") from None
