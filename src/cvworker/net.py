"""Which addresses may be spoken to: the one way out for downloads, callbacks and weights.

URLs come from clients, and the worker stands inside a network that they do not. What counts is the address that is
dialled, not the text of the URL: names are resolved here, every answer is checked, and the connection goes to an
address that was checked. The same holds again for each redirect.

One :class:`AddressGuard` decides for all threads; each event loop has a :class:`GuardedSession` of its own.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Self
from urllib.parse import urljoin

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_reqrep import ConnectionKey

from cvworker.addresses import refusal as _refusal
from cvworker.egress import PORTS, port_ranges
from cvworker.errors import DownloadFailed, StartupError, UrlNotAllowed

MAX_REDIRECTS = 5
LOOKUP_TIMEOUT = 5.0  # seconds; libc itself waits 5 s, twice, for each name server
LOOKUPS_AT_ONCE = 64  # per session, and so at most that many threads wait for silent name servers
DNS_CACHE_SECONDS = 10  # how long a checked answer serves new connections to the same host
HOSTS_REMEMBERED = 1000

# Blocking: the addresses of a host name, or OSError. The port is only there for `getaddrinfo`.
Lookup = Callable[[str, int], Sequence[str]]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and lone surrogates
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]+)(?::(?P<port>[0-9]{0,5}))?")
_HOST_NAME = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_ENDS_IN_NUMBER = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)$")
_AS_SENT = re.compile(r"(?:[!$&-;=?-\[\]_a-z~]|%[0-9A-Fa-f]{2})*")  # path and query that need no quoting


def _canonical_host(text: str) -> str:
    """``text`` in the one form that is compared, resolved and sent; ValueError where no host can be called that."""
    if text.startswith("["):
        if "%" in text:
            raise ValueError("a zone identifier names an interface of this machine")
        return f"[{ipaddress.IPv6Address(text[1:-1])}]"
    if len(text) > 254:  # before IDNA, whose cost grows faster than the name
        raise ValueError("longer than a host name can be")
    if not text.isascii():
        text = yarl.URL.build(scheme="http", host=text).raw_host or ""
    host = text.lower().removesuffix(".")
    if not _HOST_NAME.fullmatch(host):
        raise ValueError("characters that no host name has")
    if _ENDS_IN_NUMBER.search(host):
        # getaddrinfo would read 0x7f.1, 0177.0.0.1 and 2130706433 as 127.0.0.1; other parsers read something else.
        ipaddress.IPv4Address(host)
    return host


class AddressGuard:
    """Decides which URLs and addresses may be used. Immutable and without I/O: one for all threads.

    ``allowed_hosts`` are ``host`` or ``host:port``, compared with the URL's own text and exempt from every check of
    address and port. ``allow_private_networks`` lifts these checks for all hosts (development). ``allowed_ports`` are
    ports or ranges of them. ``proxy``, an HTTP proxy's URL, is the operator's and not checked: see GuardedSession.
    Raises StartupError for a host that is neither form.
    """

    def __init__(
        self,
        *,
        allowed_hosts: Collection[str] = (),
        allow_private_networks: bool = False,
        allowed_ports: Collection[str] = PORTS,
        proxy: str | None = None,
    ) -> None:
        self.allow_private_networks = allow_private_networks
        self.proxy = yarl.URL(proxy) if proxy else None
        self._ports = port_ranges(allowed_ports)
        self._ports_shown = ", ".join(allowed_ports) or "those of allowed_hosts"
        self._exempt = frozenset(_exempt_entry(entry) for entry in allowed_hosts)

    def check_url(self, url: str) -> yarl.URL:
        """``url`` as it may be dialled; raises UrlNotAllowed with one line that says why and shows no part of a path.

        The host is lower-cased, IDNA-encoded and without a trailing dot, the fragment is gone. Path and query stay to
        the letter where HTTP can carry them: many image URLs are signed as they are written. Names are not resolved.
        """
        if _UNUSABLE.search(url):
            raise UrlNotAllowed("the URL has characters that no URL can carry")
        scheme, _, rest = url.strip(" ").partition("://")
        scheme = scheme.lower()
        if scheme not in _DEFAULT_PORTS:
            raise UrlNotAllowed("the URL's scheme is not http or https")
        authority, target = _split_authority(rest)
        if "@" in authority:
            raise UrlNotAllowed("the URL has userinfo (user:password@)")
        try:
            host, port = _host_and_port(authority)
        except ValueError:
            raise UrlNotAllowed("the URL's host or port is not a valid one") from None
        if not _AS_SENT.fullmatch(target):
            target = yarl.URL(f"http://h{target}").raw_path_qs
        place = host if port in (None, _DEFAULT_PORTS[scheme]) else f"{host}:{port}"
        checked = yarl.URL(f"{scheme}://{place}{target}", encoded=True)
        if not self.is_unchecked(checked):
            self._check_place(host, port or _DEFAULT_PORTS[scheme])
        return checked

    def is_exempt(self, url: yarl.URL) -> bool:
        """Whether the URL's host, or host and port, are in ``allowed_hosts``."""
        host = (url.raw_host or "").lower().removesuffix(".")
        host = f"[{host}]" if ":" in host else host
        return host in self._exempt or f"{host}:{url.port}" in self._exempt

    def is_unchecked(self, url: yarl.URL) -> bool:
        """Whether addresses of the URL's host are not checked: an exempt host, or private networks are allowed."""
        return self.allow_private_networks or self.is_exempt(url)

    def check_address(self, address: str) -> None:
        """Raises UrlNotAllowed unless ``address``, numeric IPv4 or IPv6, is one of the public internet."""
        if not self.allow_private_networks and (why := _refusal(address)):
            raise UrlNotAllowed(f"{address} is not a public address ({why})")

    def _check_place(self, host: str, port: int) -> None:
        if not any(port in ports for ports in self._ports):
            raise UrlNotAllowed(f"port {port} is not allowed, only {self._ports_shown}")
        if host == "localhost" or host.endswith(".localhost"):
            raise UrlNotAllowed("the URL's host is localhost")
        if host.startswith("[") or _ENDS_IN_NUMBER.search(host):
            self.check_address(host.strip("[]"))


def _split_authority(rest: str) -> tuple[str, str]:
    """The authority of what follows ``://``, and path and query, which begin with a slash."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    target = rest[len(authority) :].partition("#")[0]
    return authority, target if target.startswith("/") else f"/{target}"


@functools.lru_cache(maxsize=HOSTS_REMEMBERED)  # what is not valid raises, and is not kept
def _host_and_port(authority: str) -> tuple[str, int | None]:
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise ValueError("neither host nor host:port")
    port = int(parts["port"]) if parts["port"] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError("no such port")
    return _canonical_host(parts["host"]), port


def _exempt_entry(entry: str) -> str:
    bare_v6 = entry.count(":") > 1 and "[" not in entry
    try:
        host, port = _host_and_port(f"[{entry}]" if bare_v6 else entry)
    except ValueError:
        raise StartupError(f"allowed_hosts: {entry!r} is neither host nor host:port") from None
    return host if port is None else f"{host}:{port}"


def display_url(url: str) -> str:
    """``url`` for logs: without userinfo, query and fragment, on one line. Takes any text."""
    shown = re.split(r"[?#]", url, maxsplit=1)[0]
    shown = re.sub(r"^(?:([A-Za-z][A-Za-z0-9+.-]*:)?([/\\]+))?[^/\\]*@", r"\1\2", shown)
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in shown)


def look_up(host: str, port: int) -> list[str]:
    """The addresses that the operating system has for ``host``."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(address[0]) for *_, address in found]


class _Lookups:
    """Name look-ups within a time limit, each on a daemon thread.

    ``getaddrinfo`` cannot be interrupted. The threads of an executor are joined when the process ends, and would hold
    it up for as long as some name server stays silent.
    """

    def __init__(self, lookup: Lookup, time_limit: float) -> None:
        self._lookup = lookup
        self._time_limit = time_limit
        self._free = asyncio.Semaphore(LOOKUPS_AT_ONCE)

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Raises OSError where the name does not resolve, or not in time."""
        try:
            async with asyncio.timeout(self._time_limit):
                await self._free.acquire()
                found = await self._start(host, port)
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, f"no answer within {self._time_limit:g} s") from None
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        return found

    def _start(self, host: str, port: int) -> asyncio.Future[Sequence[str]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[str]] = loop.create_future()

        def settle(found: Sequence[str], error: Exception | None) -> None:
            self._free.release()  # only now: a thread that nobody waits for any more still counts
            if answer.done():
                return
            if error is None:
                answer.set_result(found)
            else:
                answer.set_exception(error)

        def run() -> None:
            found: Sequence[str] = ()
            error: Exception | None = None
            try:
                found = self._lookup(host, port)
            except Exception as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(settle, found, error)
            except RuntimeError:
                pass  # the loop is closed, and with it everybody who waited

        try:
            threading.Thread(target=run, name="name-lookup", daemon=True).start()
        except RuntimeError as error:
            settle((), OSError(str(error)))  # no more threads to be had
        return answer


class EgressProxyUnknown(aiohttp.ClientConnectionError):
    """The egress proxy's name does not resolve; its name is no business of a client's."""


class _Resolver(AbstractResolver):
    """Gives aiohttp the addresses to dial, or refuses the host if any one of them is refused."""

    def __init__(self, lookups: _Lookups, *, checked: bool) -> None:
        self._lookups = lookups
        self._checked = checked

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await self._lookups.addresses(host, port)
        for address in addresses if self._checked else ():
            if why := _refusal(address):
                # Without the address: the client is sent this text, and our internal names are none of its business.
                raise UrlNotAllowed(f"{host} does not resolve to public addresses only ({why})")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


class GuardedSession:
    """HTTP for one event loop, to what ``guard`` allows. Create it inside the loop; ``async with`` closes it.

    ``limit`` and ``limit_per_host`` count connections, exempt hosts apart. What is refused raises UrlNotAllowed before
    a connection is made; a name that does not resolve within ``lookup_timeout`` seconds raises
    aiohttp.ClientConnectorDNSError; otherwise TimeoutError and aiohttp.ClientError, as aiohttp does.

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
        limit_per_host: int = 0,
        keepalive_timeout: float = 15.0,
        user_agent: str = "cvworker",
        ssl_context: ssl.SSLContext | None = None,
        lookup: Lookup = look_up,
        lookup_timeout: float = LOOKUP_TIMEOUT,
    ) -> None:
        self._guard = guard
        lookups = _Lookups(lookup, lookup_timeout)
        self._resolver = _Resolver(lookups, checked=True)
        self._resolved: dict[str, float] = {}  # hosts to hand to the proxy, and until when that is settled

        def session(*, checked: bool) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(
                limit=limit,
                limit_per_host=limit_per_host,
                keepalive_timeout=keepalive_timeout,
                ssl=ssl_context or True,
                resolver=self._resolver if checked else _Resolver(lookups, checked=False),
                socket_factory=self._open_socket if checked else None,
                ttl_dns_cache=DNS_CACHE_SECONDS,
            )
            return aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity", "User-Agent": user_agent},
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None),  # get and post have their own
                trust_env=False,
            )

        self._checked, self._unchecked = session(checked=True), session(checked=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._checked.close()
        await self._unchecked.close()

    @asynccontextmanager
    async def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - it is asyncio.timeout, which nobody must forget
        https_only: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET, following redirects. ``timeout`` is in seconds, from the first look-up to the end of the ``async with``.

        ``headers`` go to the origin of ``url`` only. ``https_only`` refuses a redirect to plain http. Raises
        DownloadFailed at the sixth redirect.
        """
        async with asyncio.timeout(timeout):
            target = self._guard.check_url(url)
            for _ in range(MAX_REDIRECTS + 1):
                async with await self._request("GET", target, headers) as response:
                    location = response.headers.get("Location")
                    if response.status not in _REDIRECTS or location is None:
                        yield response
                        return
                origin, target = target.origin(), self._redirected(target, location)
                if https_only and target.scheme != "https":
                    raise UrlNotAllowed("redirect refused: it is not to https")
                if target.origin() != origin:
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
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """POST ``data``. A redirect is a response like any other, and not followed."""
        async with asyncio.timeout(timeout):
            async with await self._request("POST", self._guard.check_url(url), headers, data) as response:
                yield response

    async def _request(
        self, method: str, url: yarl.URL, headers: Mapping[str, str] | None, data: bytes | None = None
    ) -> aiohttp.ClientResponse:
        proxy, unchecked = self._guard.proxy, self._guard.is_unchecked(url)
        if proxy is not None and not unchecked:
            await self._check_names(url)
        session = self._unchecked if unchecked or proxy is not None else self._checked
        try:
            return await session.request(method, url, headers=headers, data=data, allow_redirects=False, proxy=proxy)
        except aiohttp.ClientConnectorDNSError:
            if proxy is None:
                raise
            raise EgressProxyUnknown("the egress proxy's name does not resolve") from None

    async def _check_names(self, url: yarl.URL) -> None:
        """Refuse, or fail for, a host to be handed to the proxy, as if it were dialled from here."""
        host, port, now = url.raw_host or "", url.port or 0, asyncio.get_running_loop().time()
        if ":" in host or _ENDS_IN_NUMBER.search(host) or self._resolved.get(host, 0.0) > now:
            return  # an address was checked with the URL
        try:
            await self._resolver.resolve(host, port)
        except OSError as error:
            key = ConnectionKey(host, port, url.scheme == "https", True, None, None, None)
            raise aiohttp.ClientConnectorDNSError(key, error) from None
        if len(self._resolved) >= HOSTS_REMEMBERED:
            self._resolved.clear()
        self._resolved[host] = now + DNS_CACHE_SECONDS

    def _redirected(self, url: yarl.URL, location: str) -> yarl.URL:
        try:
            return self._guard.check_url(urljoin(str(url), location))
        except UrlNotAllowed as refused:
            raise UrlNotAllowed(f"redirect refused: {refused}") from None
        except ValueError:
            raise UrlNotAllowed("redirect refused: the URL is malformed") from None

    def _open_socket(self, where: aiohttp.AddrInfoType) -> socket.socket:
        """The second line: aiohttp asks here for each socket, with the address that it dials, whoever resolved it."""
        family, kind, protocol, _, address = where
        self._guard.check_address(str(address[0]))
        return socket.socket(family=family, type=kind, proto=protocol)
