"""Which URLs and addresses may be used at all.

URLs come from clients, and the worker stands inside a network that they do not. What counts is the address that is
dialled, not the text of the URL: see :mod:`cvworker.net.lookups` and :mod:`cvworker.net.pool`.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Collection
from typing import NamedTuple

import yarl

from cvworker.addresses import refusal
from cvworker.egress import PORTS, port_ranges
from cvworker.errors import StartupError, UrlNotAllowed

HOSTS_REMEMBERED = 1000

_DEFAULT_PORTS = {"http": 80, "https": 443}

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and lone surrogates
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]+)(?::(?P<port>[0-9]{0,5}))?")
_END_OF_AUTHORITY = re.compile(r"[/?#]|\Z")
_HOST_NAME = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_ENDS_IN_NUMBER = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)$")
_AS_SENT = re.compile(r"(?:[!$&-;=?-\[\]_a-z~]|%[0-9A-Fa-f]{2})*")  # path and query that need no quoting


class Url(NamedTuple):
    """A URL as it is dialled and sent: ``host`` is canonical, IPv6 in brackets; ``target`` is path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """What connections are shared by, and headers are kept within."""
        return self.scheme, self.host, self.port

    @property
    def place(self) -> str:
        """Host and port as a ``Host`` header has them."""
        return self.host if self.port == _DEFAULT_PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def is_numeric(self) -> bool:
        """Whether the host is an address rather than a name."""
        return is_numeric(self.host)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}{self.target}"


def is_numeric(host: str) -> bool:
    """Whether a canonical host is an address rather than a name."""
    return host.startswith("[") or _ENDS_IN_NUMBER.search(host) is not None


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

    def check_url(self, url: str) -> Url:
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
        checked = Url(scheme, host, port or _DEFAULT_PORTS[scheme], target)
        if not self.is_unchecked(checked):
            self._check_place(checked)
        return checked

    def is_unchecked(self, url: Url) -> bool:
        """Whether addresses of the URL's host are not checked: an exempt host, or private networks are allowed."""
        if self.allow_private_networks:
            return True
        return bool(self._exempt) and (url.host in self._exempt or f"{url.host}:{url.port}" in self._exempt)

    def check_address(self, address: str) -> None:
        """Raises UrlNotAllowed unless ``address``, numeric IPv4 or IPv6, is one of the public internet."""
        if not self.allow_private_networks and (why := refusal(address)):
            raise UrlNotAllowed(f"{address} is not a public address ({why})")

    def _check_place(self, url: Url) -> None:
        if not any(url.port in ports for ports in self._ports):
            raise UrlNotAllowed(f"port {url.port} is not allowed, only {self._ports_shown}")
        if url.host == "localhost" or url.host.endswith(".localhost"):
            raise UrlNotAllowed("the URL's host is localhost")
        if url.is_numeric:
            self.check_address(url.host.strip("[]"))


def _split_authority(rest: str) -> tuple[str, str]:
    """The authority of what follows ``://``, and path and query, which begin with a slash."""
    end = _END_OF_AUTHORITY.search(rest)
    assert end is not None
    authority, target = rest[: end.start()], rest[end.start() :].partition("#")[0]
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
