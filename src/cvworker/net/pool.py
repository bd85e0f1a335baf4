"""Connections of one event loop: dialled to checked addresses, kept open for a while, and used again."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from urllib.parse import unquote

import aiohappyeyeballs

from cvworker.net.connection import Connection
from cvworker.net.failures import ConnectionFailed, HttpFailed, NameUnknown, TlsFailed
from cvworker.net.guard import AddressGuard, Url, is_numeric
from cvworker.net.lookups import Resolver

SCRATCH_BYTES = 64 * 1024
HAPPY_EYEBALLS_S = 0.25
"""The next address is tried beside one that has not answered for so long (RFC 8305)."""


class Pool:
    """At most ``limit`` connections at once; those that are idle are closed after ``keepalive`` seconds."""

    def __init__(
        self, guard: AddressGuard, resolver: Resolver, *, limit: int, keepalive: float, tls: ssl.SSLContext | None
    ) -> None:
        self._guard = guard
        self._resolver = resolver
        self._limit = limit
        self._keepalive = keepalive
        self._tls = tls
        self._scratch = bytearray(SCRATCH_BYTES)
        self._open: set[Connection] = set()
        self._dialling = 0
        self._idle: dict[tuple[str, str, int], list[Connection]] = {}
        self._line: deque[asyncio.Future[None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def take(self, url: Url) -> Connection:
        """A connection to the URL's origin: one that is open already, or else a new one.

        Raises UrlNotAllowed before anything is dialled, HttpFailed where nobody can be reached.
        """
        while True:
            idle = self._idle.get(url.origin)
            while idle:
                connection = idle.pop()  # the one used last: the others may then grow old
                if connection.reusable and connection.idle_until > self._loop.time():
                    return connection
                connection.close()
            if len(self._open) + self._dialling < self._limit or self._close_an_idle_one():
                return await self._dial(url)
            await self._turn()

    def give_back(self, url: Url, connection: Connection) -> None:
        """Take a connection back; it is closed where no other request may follow on it."""
        if not connection.reusable:
            connection.close()
            return
        connection.idle_until = self._loop.time() + self._keepalive
        self._idle.setdefault(url.origin, []).append(connection)
        self._next_in_line()
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._keepalive, self._sweep)

    def forget(self, url: Url) -> None:
        """Close the idle connections to the URL's origin: its host has closed one, and may have closed them all."""
        for connection in self._idle.pop(url.origin, ()):
            connection.close()

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._idle.clear()
        for connection in list(self._open):
            connection.close()
        await asyncio.sleep(0)  # transports close their sockets in the loop's next round

    # ---- room

    def _close_an_idle_one(self) -> bool:
        for idle in self._idle.values():
            if idle:
                self._open.discard(idle[0])  # at once, and for the caller: nobody in line is woken
                idle.pop(0).close()
                return True
        return False

    async def _turn(self) -> None:
        turn: asyncio.Future[None] = self._loop.create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next_in_line()
            raise
        finally:
            if turn in self._line:
                self._line.remove(turn)

    def _next_in_line(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _lost(self, connection: Connection) -> None:
        if connection in self._open:
            self._open.discard(connection)
            self._next_in_line()

    def _sweep(self) -> None:
        now, soonest = self._loop.time(), 0.0
        for origin, idle in list(self._idle.items()):
            while idle and (idle[0].idle_until <= now or not idle[0].reusable):
                idle.pop(0).close()
            if not idle:
                del self._idle[origin]
            elif not soonest or idle[0].idle_until < soonest:
                soonest = idle[0].idle_until
        self._sweeper = self._loop.call_at(soonest, self._sweep) if soonest else None

    # ---- a new connection

    async def _dial(self, url: Url) -> Connection:
        self._dialling += 1
        connection = Connection(self._scratch)
        try:
            await (self._dial_host(url, connection) if self._guard.proxy is None else self._dial_proxy(url, connection))
        except BaseException as error:
            connection.close()
            self._dialling -= 1
            self._next_in_line()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise _failure(error) from None
            raise
        self._dialling -= 1
        self._open.add(connection)
        connection.on_lost = lambda: self._lost(connection)
        if connection.is_closing:
            self._lost(connection)
        return connection

    async def _dial_host(self, url: Url, connection: Connection) -> None:
        host = url.host.strip("[]")
        checked = not self._guard.is_unchecked(url)
        if is_numeric(url.host):
            addresses: Sequence[str] = [host]
        else:
            addresses = await self.resolve(url, checked=checked)
        if checked:  # the second line: whoever resolved them, nothing else than what is checked here is dialled
            for address in addresses:
                self._guard.check_address(address)
        sock = await self._connect(addresses, url.port)
        tls = self._tls_context() if url.scheme == "https" else None
        await self._start(connection, sock, tls, host)

    async def resolve(self, url: Url, *, checked: bool) -> Sequence[str]:
        """The addresses of a host; raises NameUnknown and, if they are ``checked``, UrlNotAllowed."""
        try:
            return await self._resolver.addresses(url.host, url.port, checked=checked)
        except OSError as error:
            raise NameUnknown(url.host, str(error)) from None

    async def _dial_proxy(self, url: Url, connection: Connection) -> None:
        """The egress proxy is the operator's, and not checked; for https it gives a tunnel to the host's own TLS.

        Its names and addresses are no business of a client's: they are in no error.
        """
        proxy = self._guard.proxy
        assert proxy is not None
        host, port = proxy.raw_host or "", proxy.port or 0
        try:
            numeric = is_numeric(host) or ":" in host
            addresses = [host] if numeric else await self._resolver.addresses(host, port, checked=False)
        except OSError:
            raise ConnectionFailed("the egress proxy's name does not resolve") from None
        try:
            sock = await self._connect(addresses, port)
        except OSError:
            raise ConnectionFailed("the egress proxy cannot be reached") from None
        await self._start(connection, sock, None, None)
        if url.scheme == "https":
            place = f"{url.host}:{url.port}"
            request = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{self.proxy_credentials()}\r\n"
            head = await connection.exchange(request.encode("latin-1"))
            if head.status != 200:
                raise ConnectionFailed(f"the egress proxy answered {head.status}")
            connection.used = False
            await connection.start_tls(self._tls_context(), url.host.strip("[]"))

    def proxy_credentials(self) -> str:
        """The header line that tells the proxy who we are, or nothing."""
        proxy = self._guard.proxy
        if proxy is None or proxy.raw_user is None:
            return ""
        plain = f"{unquote(proxy.raw_user)}:{unquote(proxy.raw_password or '')}"
        return f"Proxy-Authorization: Basic {base64.b64encode(plain.encode()).decode()}\r\n"

    async def _connect(self, addresses: Sequence[str], port: int) -> socket.socket:
        where = [_address_info(address, port) for address in addresses]
        return await aiohappyeyeballs.start_connection(
            where, happy_eyeballs_delay=HAPPY_EYEBALLS_S, interleave=1, loop=self._loop
        )

    async def _start(
        self, connection: Connection, sock: socket.socket, tls: ssl.SSLContext | None, host: str | None
    ) -> None:
        try:
            await self._loop.create_connection(
                lambda: connection, sock=sock, ssl=tls, server_hostname=host if tls else None
            )
        except BaseException:
            sock.close()
            raise

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


def _address_info(address: str, port: int) -> aiohappyeyeballs.AddrInfoType:
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)


def _failure(error: OSError) -> HttpFailed:
    if isinstance(error, ssl.SSLError):
        return TlsFailed(f"TLS failed ({error.reason or type(error).__name__})")
    return ConnectionFailed(f"the connection failed ({type(error).__name__})")
