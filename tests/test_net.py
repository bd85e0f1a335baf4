"""net: what may be spoken to, and what not.

Nothing here leaves this machine: where a public address would be dialled, :class:`DiversionLoop` notes it and goes to
a local server instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ipaddress
import pathlib
import socket
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from cryptography import x509
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cvworker.addresses import refusal
from cvworker.errors import DownloadFailed, StartupError, UrlNotAllowed
from cvworker.net import (
    AddressGuard,
    ConnectionFailed,
    GuardedSession,
    Lookup,
    NameUnknown,
    TlsFailed,
    display_url,
    look_up,
)
from cvworker.net.lookups import DNS_CACHE_SECONDS, LOOKUPS_AT_ONCE, Lookups, Resolver
from fakes import self_signed
from hostile_urls import ABSOLUTE, DIRECT, NAMES, PUBLIC_V4, PUBLIC_V6, REFUSED_V4, REFUSED_V6, embeddings

T = TypeVar("T")

PUBLIC = "93.184.216.34"
ELSEWHERE = "8.8.8.8"


class DiversionLoop(asyncio.SelectorEventLoop):
    """Notes every address that is dialled, and connects to the local server on ``port`` in its place."""

    port = 0

    def __init__(self) -> None:
        super().__init__()
        self.dialled: list[str] = []

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        self.dialled.append(address[0])
        if not self.port or sock.family != socket.AF_INET:
            raise ConnectionRefusedError("diverted")
        await super().sock_connect(sock, ("127.0.0.1", self.port))


def dialled() -> list[str]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, DiversionLoop)
    return loop.dialled


def run(scenario: Coroutine[Any, Any, T], *, divert: bool = False) -> T:
    with asyncio.Runner(loop_factory=DiversionLoop if divert else None) as runner:
        return runner.run(scenario)


def page(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return page(status=status, Location=location)


class Server:
    """HTTP on 127.0.0.1: each target in ``pages`` is answered with the bytes given, every other with 200."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.targets: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.pages: dict[str, bytes | None] = {}  # None: no answer, ever

    def url(self, target: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{target}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                request, *fields = head.strip().split("\r\n")
                headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
                self.targets.append(request.split(" ")[1])
                self.headers.append(headers)
                self.bodies.append(await reader.readexactly(int(headers.get("content-length", 0))))
                answer = self.pages.get(self.targets[-1], page(b"picture"))
                if answer is None:
                    await reader.read()
                    return
                writer.write(answer)
                await writer.drain()


@contextlib.asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    if isinstance(loop := asyncio.get_running_loop(), DiversionLoop):
        loop.port = server.port
    try:
        yield server
    finally:
        listener.close()


def libc(host: str, port: int) -> list[str]:
    """Look-ups as the operating system would do them, numbers included, with the zones of this file."""
    with contextlib.suppress(OSError, UnicodeError):
        return [socket.inet_ntoa(socket.inet_aton(host))]
    if host in NAMES:
        return NAMES[host]
    if host.endswith("localhost"):
        return ["127.0.0.1"]
    if host.endswith("example"):
        return [PUBLIC]
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


async def fetch(http: GuardedSession, url: str, **options: Any) -> bytes:
    async with http.get(url, **options) as response:
        return await response.read()


def refused(url: str, guard: AddressGuard | None = None) -> str:
    with pytest.raises(UrlNotAllowed) as refusal:
        (guard or AddressGuard()).check_url(url)
    return str(refusal.value)


# --- addresses


@pytest.mark.parametrize("address", PUBLIC_V4 + PUBLIC_V6)
def test_public_addresses_are_accepted(address: str) -> None:
    AddressGuard().check_address(address)


@pytest.mark.parametrize("address", REFUSED_V4 + REFUSED_V6 + ["fe80::1%eth0", "2606:4700::1%lo%", "", "localhost"])
def test_special_addresses_and_what_is_no_address_are_refused(address: str) -> None:
    with pytest.raises(UrlNotAllowed):
        AddressGuard().check_address(address)


def test_the_lists_do_not_lean_on_what_this_python_happens_to_know() -> None:
    assert [address for address in REFUSED_V4 + REFUSED_V6 if refusal(address) == "special purpose"] == []


@settings(deadline=None)
@given(st.ip_addresses(v=4) | st.sampled_from(REFUSED_V4).map(ipaddress.IPv4Address))
def test_an_ipv4_address_that_is_refused_is_refused_in_every_ipv6_embedding(v4: ipaddress.IPv4Address) -> None:
    if refusal(str(v4)):
        assert [how for how, v6 in embeddings(str(v4)).items() if not refusal(v6)] == []


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_ipv4_through_nat64_is_judged_as_the_ipv4_address_that_it_is(v4: ipaddress.IPv4Address) -> None:
    forms = embeddings(str(v4))
    assert refusal(forms["NAT64"]) == refusal(forms["mapped"]) == refusal(str(v4))


@settings(deadline=None)
@given(st.ip_addresses())
def test_nothing_is_accepted_that_the_standard_library_calls_special(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if address.is_private or address.is_multicast or address.is_reserved or address.is_unspecified:
        forms = embeddings("0.0.0.0")
        networks = [ipaddress.ip_network((forms[how], 96)) for how in ("mapped", "NAT64")]
        assert refusal(str(address)) or any(address in network for network in networks)


def test_allow_private_networks_accepts_every_address() -> None:
    guard = AddressGuard(allow_private_networks=True)
    for address in REFUSED_V4 + REFUSED_V6:
        guard.check_address(address)


# --- URLs


def test_a_url_comes_back_as_it_will_be_dialled() -> None:
    checked = {
        "http://example.com": "http://example.com/",
        "HTTPS://Example.COM./A?b#c": "https://example.com/A?b",
        " http://example.com:80/ ": "http://example.com/",
        "https://example.com:443/": "https://example.com/",
        "http://example.com:/": "http://example.com/",
        "http://example.com:00080?a=b": "http://example.com/?a=b",
        "http://example.com:1025/": "http://example.com:1025/",
        "http://example.com:65535/": "http://example.com:65535/",
        "https://bücher.example/": "https://xn--bcher-kva.example/",
        "https://BÜCHER。example。/": "https://xn--bcher-kva.example/",
        "http://my_bucket.s3.amazonaws.com/": "http://my_bucket.s3.amazonaws.com/",
        "http://8.8.8.8./": "http://8.8.8.8/",
        "http://８.８.８.８/": "http://8.8.8.8/",
        "http://[2606:4700:4700:0::1111]:8080/": "http://[2606:4700:4700::1111]:8080/",
        "http://[64:ff9b::8.8.8.8]/": "http://[64:ff9b::808:808]/",
        "http://example.com/user@host:x": "http://example.com/user@host:x",
        "http://example.com/über uns?q=a|b": "http://example.com/%C3%BCber%20uns?q=a%7Cb",
    }
    assert {url: str(AddressGuard().check_url(url)) for url in checked} == checked


@pytest.mark.parametrize("target", ["/a%2Fb/%7e?x=%2F%3A%2c%2B+&sig=AbC%3d==", "/a//b/../c;d=1/(1)?x[]=~!*'", "/?/?"])
def test_path_and_query_stay_to_the_letter_since_they_may_be_signed(target: str) -> None:
    assert AddressGuard().check_url(f"http://example.com{target}#part").target == target


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/SECRET?SECRET",
        "http://user:SECRET@h/",
        "http://127.0.0.1/SECRET?SECRET#SECRET",
        "http://h:22/?SECRET",
        "http://a..b/?SECRET",
        "http://localhost/?SECRET",
        "http://h/SECRET\n?SECRET",
        "http://h:SECRET/",
        "SECRET",
    ],
)
def test_a_refusal_is_one_line_that_shows_neither_path_nor_query_nor_userinfo(url: str) -> None:
    reason = refused(url)
    assert reason
    assert "SECRET" not in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://a.example/", "scheme"),
        ("http://user@a.example/", "userinfo"),
        ("http://a.example:22/", "port 22"),
        ("http://a..example/", "host"),
        ("http://a.localhost/", "localhost"),
        ("http://10.0.0.1/", "private network"),
        ("http://[::ffff:10.0.0.1]/", "private network"),
        ("http://[::1]/", "not global unicast"),
        ("http://a.example/\x00", "characters"),
    ],
)
def test_a_refusal_says_why(url: str, reason: str) -> None:
    assert reason in refused(url)


def test_a_number_that_is_no_usual_ipv4_address_is_refused_even_where_addresses_are_not_checked() -> None:
    for host in ("127.1", "2130706433", "0x7f.1", "0177.0.0.1", "1.2.3.4.5"):
        refused(f"http://{host}/", AddressGuard(allow_private_networks=True))


def test_ports_are_80_443_and_above_1024() -> None:
    accepted = []
    for port in (*range(1030), 8080, 65535, 65536, 65616):
        with contextlib.suppress(UrlNotAllowed):
            AddressGuard().check_url(f"http://example.com:{port}/")
            accepted.append(port)
    assert accepted == [80, 443, *range(1025, 1030), 8080, 65535]


_PIECES = st.sampled_from(
    [
        *("http", "https", "://", ":", "/", "//", "\\", "@", "?", "#", "[", "]", "%", "%25", "%00", ".", "..", "80"),
        *("127.0.0.1", "0x7f", "::1", "localhost", "example.com", "xn--", "xn--a", "99999", "é", "℀", "。"),
        *("\u200b", "\ud800", "\n"),
    ]
)


@settings(deadline=None)
@given(st.text() | st.lists(_PIECES | st.text(max_size=3)).map("".join) | st.text().map("http://".__add__))
@example("http://xn--\u0378.example/")
@example("http://[::ffff:1.2.3.4%]/")
@example("http://h/%")
def test_any_text_is_either_accepted_or_refused_and_acceptance_is_final(text: str) -> None:
    guard = AddressGuard()
    try:
        url = guard.check_url(text)
    except UrlNotAllowed:
        return
    assert guard.check_url(str(url)) == url
    assert url.scheme in ("http", "https")
    assert url.host
    assert "@" not in url.place
    assert str(url).isascii()


# --- allowed_hosts


@pytest.mark.parametrize(
    ("entry", "url", "exempt"),
    [
        ("127.0.0.1:9000", "http://127.0.0.1:9000/", True),
        ("127.0.0.1:9000", "http://127.0.0.1:9001/", False),
        ("127.0.0.1", "http://127.0.0.1:22/", True),
        ("127.0.0.1", "http://127.0.0.2/", False),
        ("localhost", "http://LOCALHOST.:9/", True),
        ("LocalHost.", "http://localhost/", True),
        ("localhost", "http://a.localhost/", False),
        ("images.internal:80", "http://images.internal/", True),
        ("images.internal:443", "https://images.internal/", True),
        ("images.internal:443", "http://images.internal/", False),
        ("images.internal", "http://images.internal.example/", False),
        ("images.internal", "http://x.images.internal/", False),
        ("bücher.internal", "http://xn--bcher-kva.internal/", True),
        ("xn--bcher-kva.internal", "http://BÜCHER.internal/", True),
        ("::1", "http://[0::1]:9/", True),
        ("[::1]", "http://[::1]/", True),
        ("[::1]:9000", "http://[::1]:9000/", True),
        ("[::1]:9000", "http://[::1]/", False),
        ("127.0.0.1", "http://[::ffff:127.0.0.1]/", False),
    ],
)
def test_allowed_hosts_are_compared_with_the_urls_own_text(entry: str, url: str, exempt: bool) -> None:
    guard = AddressGuard(allowed_hosts=[entry])
    assert guard.is_unchecked(AddressGuard(allow_private_networks=True).check_url(url)) is exempt


def test_an_exempt_host_may_use_any_port_and_still_no_other_scheme_or_userinfo() -> None:
    guard = AddressGuard(allowed_hosts=["localhost", "127.0.0.1:22"])
    assert guard.check_url("http://localhost:1/").port == 1
    assert guard.check_url("http://127.0.0.1:22/").port == 22
    for url in ("ftp://localhost/", "http://user@localhost/", "http://localhost:0/", "http://127.0.0.1:23/"):
        refused(url, guard)


@pytest.mark.parametrize(
    "entry", ["", "http://a.example", "a.example/", "a.example:x", "*.example", "a b", "10.0.0.0/8"]
)
def test_an_entry_that_is_no_host_is_an_error_at_start(entry: str) -> None:
    with pytest.raises(StartupError, match="allowed_hosts"):
        AddressGuard(allowed_hosts=[entry])


# --- hostile URLs, on the wire


def _ids(table: list[tuple[str, str]]) -> list[str]:
    return [f"{why}: {url[:60]!a}" for why, url in table]


@pytest.mark.parametrize(("why", "url"), ABSOLUTE + DIRECT, ids=_ids(ABSOLUTE + DIRECT))
def test_a_hostile_url_is_refused_and_nothing_is_dialled(why: str, url: str) -> None:
    async def scenario() -> None:
        async with serving() as canary, GuardedSession(AddressGuard(), lookup=libc) as http:
            hostile = url.replace("{port}", str(canary.port))
            with pytest.raises(UrlNotAllowed):
                await fetch(http, hostile)
            with pytest.raises(UrlNotAllowed):
                async with http.post(hostile, data=b"answer"):
                    pass
            assert (canary.connections, dialled()) == (0, [])

    run(scenario(), divert=True)


def test_a_redirect_to_a_hostile_url_is_refused_and_not_dialled() -> None:
    async def scenario() -> dict[str, str]:
        accepted = {}
        async with serving() as canary, serving() as images:
            guard = AddressGuard(allowed_hosts=[f"127.0.0.1:{images.port}"])
            async with GuardedSession(guard, lookup=libc) as http:
                for why, url in ABSOLUTE:
                    hostile = url.replace("{port}", str(canary.port))
                    images.pages["/"] = redirect(hostile)
                    try:
                        accepted[hostile] = f"{why}: {await fetch(http, images.url())!r}"
                    except UrlNotAllowed:
                        pass
            assert canary.connections == 0
            assert len(images.targets) == len(ABSOLUTE)
        return accepted

    assert run(scenario()) == {}


def test_a_refused_redirect_is_named_as_one_and_its_url_is_not_shown() -> None:
    async def scenario() -> None:
        async with serving() as images, GuardedSession(AddressGuard(allowed_hosts=["127.0.0.1"])) as http:
            images.pages |= {"/1": redirect("http://a.example:22/SECRET?SECRET"), "/2": redirect("http://[SECRET/")}
            with pytest.raises(UrlNotAllowed, match=r"^redirect refused: port 22 is not allowed[^/?]*$"):
                await fetch(http, images.url("/1"))
            with pytest.raises(UrlNotAllowed, match=r"^redirect refused: the URL is malformed$"):
                await fetch(http, images.url("/2"))

    run(scenario())


def test_everyone_who_waits_for_one_look_up_is_refused_with_it() -> None:
    async def scenario() -> None:
        zone = Zone(["10.0.0.1"])
        async with GuardedSession(AddressGuard(), lookup=zone) as http:
            waiting = (fetch(http, f"http://db.example/{n}") for n in range(5))
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [UrlNotAllowed] * 5
        assert (zone.asked, dialled()) == (1, [])

    run(scenario(), divert=True)


def test_the_canary_would_sing_if_the_check_were_off() -> None:
    async def scenario() -> None:
        guard = AddressGuard(allow_private_networks=True)
        async with serving() as canary, GuardedSession(guard, lookup=libc) as http:
            for host in ("127.0.0.1", "localhost", "a.localhost", "localtest.example"):
                assert await fetch(http, canary.url(host=host)) == b"picture"
            assert canary.connections == 4

    run(scenario())


@pytest.mark.parametrize("host", ["localhost", "0177.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "127.1"])
def test_what_the_operating_system_resolves_to_loopback_is_refused_whatever_its_spelling(host: str) -> None:
    async def scenario() -> None:
        await Resolver(look_up, 5).addresses(host, 80, checked=True)

    with pytest.raises(UrlNotAllowed, match="loopback"):
        run(scenario())


def test_a_refusal_does_not_tell_which_internal_address_a_name_has() -> None:
    async def scenario() -> None:
        async with GuardedSession(AddressGuard(), lookup=lambda host, port: ["10.1.2.3"]) as http:
            await fetch(http, "http://db.internal/?SECRET")

    with pytest.raises(UrlNotAllowed) as refusal:
        run(scenario(), divert=True)
    assert str(refusal.value) == "db.internal does not resolve to public addresses only (private network)"


# --- the address that is dialled is the one that was checked


class Zone:
    """Look-ups that give another answer each time, and the last one from then on."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_a_name_that_changes_to_loopback_after_the_check_is_dialled_where_it_was_checked() -> None:
    async def scenario() -> None:
        zone = Zone([PUBLIC], ["127.0.0.1"])
        async with serving() as server, GuardedSession(AddressGuard(), lookup=zone) as http:
            assert await fetch(http, "http://rebind.example/") == b"picture"
            assert server.headers[0]["host"] == "rebind.example"
            assert (zone.asked, dialled()) == (1, [PUBLIC])

    run(scenario(), divert=True)


def test_a_name_that_changes_to_loopback_before_the_next_look_up_is_refused_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("cvworker.net.lookups.monotonic", lambda: now)

    async def scenario() -> None:
        nonlocal now
        zone = Zone([PUBLIC], ["127.0.0.1"])
        async with serving() as server, GuardedSession(AddressGuard(), lookup=zone) as http:
            server.pages["/"] = page(Connection="close")
            for _ in range(2):
                await fetch(http, "http://rebind.example/")
                now += DNS_CACHE_SECONDS - 1
            with pytest.raises(UrlNotAllowed):
                await fetch(http, "http://rebind.example/")
            assert (zone.asked, dialled()) == (2, [PUBLIC, PUBLIC])

    run(scenario(), divert=True)


def test_a_redirect_to_a_name_that_has_changed_to_loopback_is_refused() -> None:
    async def scenario() -> None:
        zone = Zone([PUBLIC], ["127.0.0.1"])
        async with serving() as server, GuardedSession(AddressGuard(), lookup=zone) as http:
            server.pages["/"] = redirect("http://rebind.example:8080/")  # another port: another look-up
            with pytest.raises(UrlNotAllowed):
                await fetch(http, "http://rebind.example/")
            assert (zone.asked, dialled()) == (2, [PUBLIC])

    run(scenario(), divert=True)


def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    async def scenario() -> None:
        lookup = Zone(["2606:4700:4700::1111", PUBLIC])
        async with serving(), GuardedSession(AddressGuard(), lookup=lookup) as http:
            assert await fetch(http, "http://two.example/") == b"picture"
            assert dialled() == ["2606:4700:4700::1111", PUBLIC]

    run(scenario(), divert=True)


def test_an_unchecked_address_is_refused_at_the_socket_whoever_resolved_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def addresses(self: object, host: str, port: int, *, checked: bool) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(Resolver, "addresses", addresses)

    async def scenario() -> None:
        async with serving() as canary, GuardedSession(AddressGuard()) as http:
            with pytest.raises(UrlNotAllowed):
                await fetch(http, "http://a.example/")
            assert (canary.connections, dialled()) == (0, [])

    run(scenario(), divert=True)


def test_the_certificate_must_still_be_the_hosts_own() -> None:
    serving_tls, trusting = _certificate_for("images.example")
    asked_for: list[str | None] = []
    serving_tls.sni_callback = lambda _socket, name, _context: asked_for.append(name)

    async def scenario() -> None:
        async with serving(serving_tls), GuardedSession(AddressGuard(), lookup=libc, ssl_context=trusting) as http:
            assert await fetch(http, "https://images.example./") == b"picture"
            with pytest.raises(TlsFailed):
                await fetch(http, "https://other.example/")
            with pytest.raises(TlsFailed):
                await fetch(http, f"https://{ELSEWHERE}/")
            assert asked_for == ["images.example", "other.example", None]
            assert dialled() == [PUBLIC, PUBLIC, ELSEWHERE]
        async with serving(serving_tls), GuardedSession(AddressGuard(), lookup=libc) as http:
            with pytest.raises(TlsFailed):
                await fetch(http, "https://images.example/")

    run(scenario(), divert=True)


def _certificate_for(host: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's TLS context with a certificate for ``host``, and a client's that trusts it."""
    pem, secret = self_signed(x509.DNSName(host))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pem + secret)
        file.flush()
        server.load_cert_chain(file.name)
    return server, ssl.create_default_context(cadata=pem.decode())


# --- look-ups


def test_a_name_that_does_not_resolve_is_told_apart_from_one_that_is_refused() -> None:
    async def scenario(lookup: Lookup) -> None:
        async with GuardedSession(AddressGuard(), lookup=lookup) as http:
            await fetch(http, "http://nowhere.invalid/")

    for lookup in (libc, Zone([])):
        with pytest.raises(NameUnknown):
            run(scenario(lookup), divert=True)


@contextlib.contextmanager
def _silence(threads: list[threading.Thread] | None = None) -> Iterator[Lookup]:
    """A look-up that hangs until the block ends, for every name but good.example."""
    end = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        if host != "good.example":
            if threads is not None:
                threads.append(threading.current_thread())
            end.wait()
        return [PUBLIC]

    try:
        yield lookup
    finally:
        end.set()


def test_a_look_up_that_hangs_fails_in_time_and_does_not_hold_up_the_end_of_the_process() -> None:
    async def scenario(lookup: Lookup) -> None:
        async with GuardedSession(AddressGuard(), lookup=lookup, lookup_timeout=0.02) as http:
            with pytest.raises(NameUnknown, match="no answer within"):
                await fetch(http, "http://silent.example/")

    threads: list[threading.Thread] = []
    with _silence(threads) as lookup:
        run(scenario(lookup), divert=True)
        assert [(thread.is_alive(), thread.daemon) for thread in threads] == [(True, True)]


def test_look_ups_that_hang_do_not_hold_up_others() -> None:
    async def scenario(lookup: Lookup) -> None:
        async with serving(), GuardedSession(AddressGuard(), lookup=lookup) as http:
            names = [f"silent-{n}.example" for n in range(LOOKUPS_AT_ONCE - 1)]
            hanging = [asyncio.ensure_future(fetch(http, f"http://{name}/")) for name in names]
            assert await fetch(http, "http://good.example/") == b"picture"
            assert not any(task.done() for task in hanging)
            for task in hanging:
                task.cancel()

    with _silence() as lookup:
        run(scenario(lookup), divert=True)


def test_look_ups_that_hang_take_a_bounded_number_of_threads_and_give_them_back() -> None:
    threads: list[threading.Thread] = []

    async def scenario() -> None:
        with _silence(threads) as lookup:
            lookups = Lookups(lookup, 0.05)
            waiting = (lookups.addresses(f"silent-{n}.example", 80) for n in range(LOOKUPS_AT_ONCE + 10))
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {socket.gaierror}
            assert len(threads) == LOOKUPS_AT_ONCE
        lookups._time_limit = 10
        assert await lookups.addresses("good.example", 80) == [PUBLIC]

    run(scenario())


def test_a_look_up_for_which_there_is_no_thread_fails_like_a_name_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario() -> None:
        async with GuardedSession(AddressGuard(), lookup=libc) as http:
            monkeypatch.setattr(threading.Thread, "start", no_thread)
            for n in range(LOOKUPS_AT_ONCE + 1):
                with pytest.raises(NameUnknown):
                    await fetch(http, f"http://n{n}.example/")

    run(scenario(), divert=True)


# --- what is allowed works


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "a.localhost", "10.0.0.1", "db.internal", "[::ffff:7f00:1]"]
)
def test_an_exempt_host_is_dialled_whatever_its_address(host: str) -> None:
    async def scenario() -> None:
        lookup = Zone(["10.0.0.1", "127.0.0.1"])
        async with serving() as server:
            for entry in (host, f"{host}:{server.port}"):
                async with GuardedSession(AddressGuard(allowed_hosts=[entry]), lookup=lookup) as http:
                    if "[" in host:  # no IPv6 is diverted: that it was dialled is enough
                        with pytest.raises(ConnectionFailed):
                            await fetch(http, server.url(host=host))
                    else:
                        assert await fetch(http, server.url(host=host)) == b"picture"
            assert len(dialled()) == 2

    run(scenario(), divert=True)


def test_an_exempt_host_does_not_open_the_way_to_others_through_the_same_session() -> None:
    async def scenario() -> None:
        async with serving() as allowed, serving() as canary:
            guard = AddressGuard(allowed_hosts=[f"localhost:{allowed.port}"])
            async with GuardedSession(guard, lookup=libc) as http:
                assert await fetch(http, allowed.url(host="localhost")) == b"picture"
                for url in (canary.url(host="localhost"), allowed.url(), canary.url(host="localtest.example")):
                    with pytest.raises(UrlNotAllowed):
                        await fetch(http, url)
            assert (allowed.connections, canary.connections) == (1, 0)

    run(scenario())


def test_connections_and_look_ups_are_used_again() -> None:
    async def scenario() -> None:
        zone = Zone([PUBLIC])
        async with serving() as server, GuardedSession(AddressGuard(), lookup=zone) as http:
            for n in range(5):
                await fetch(http, f"http://images.example/{n}")
            await asyncio.gather(*(fetch(http, f"http://images.example/{n}") for n in range(5)))
            assert zone.asked == 1
            assert server.connections <= 5

    run(scenario(), divert=True)


def test_one_guard_serves_sessions_on_several_loops() -> None:
    guard = AddressGuard(allowed_hosts=["127.0.0.1"])

    async def scenario() -> bytes:
        async with serving() as server, GuardedSession(guard) as http:
            with pytest.raises(UrlNotAllowed):
                await fetch(http, "http://10.0.0.1/")
            return await fetch(http, server.url())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: run(scenario()), range(8))) == [b"picture"] * 8


def test_proxies_and_credentials_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / ".netrc").write_text("default login user password SECRET\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))

    async def scenario() -> None:
        async with serving() as proxy, serving() as server:
            for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.url())
            async with GuardedSession(AddressGuard(allowed_hosts=["127.0.0.1"])) as http:
                await fetch(http, server.url())
            assert (proxy.connections, server.connections) == (0, 1)
            assert "authorization" not in server.headers[0]

    run(scenario())


def test_bodies_come_as_they_were_sent_and_cookies_are_forgotten() -> None:
    async def scenario() -> None:
        async with serving() as server, GuardedSession(AddressGuard(allowed_hosts=["localhost"])) as http:
            packed = gzip.compress(b"x" * 1_000_000)
            server.pages["/"] = page(packed, Content_Encoding="gzip", Set_Cookie="a=b; Path=/")
            for _ in range(2):
                assert await fetch(http, server.url(host="localhost")) == packed
            assert server.headers[0]["accept-encoding"] == "identity"
            assert "cookie" not in server.headers[1]

    run(scenario())


def test_the_time_limit_covers_look_up_redirects_and_body() -> None:
    async def scenario() -> None:
        async with serving() as server, GuardedSession(AddressGuard(allowed_hosts=["127.0.0.1"])) as http:
            server.pages |= {"/silent": None, "/redirect": redirect("/silent"), "/short": page(b"1234567890")[:-5]}
            for path in ("/silent", "/redirect", "/short"):
                with pytest.raises(TimeoutError):
                    await fetch(http, server.url(path), timeout=0.05)
            with pytest.raises(TimeoutError):
                async with http.post(server.url("/silent"), data=b"", timeout=0.05):
                    pass
        with _silence() as lookup:
            async with GuardedSession(AddressGuard(), lookup=lookup) as http:
                with pytest.raises(TimeoutError):
                    await fetch(http, "http://silent.example/", timeout=0.05)

    run(scenario())


# --- redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed_relative_ones_too(status: str) -> None:
    async def scenario() -> None:
        async with serving() as server, GuardedSession(AddressGuard(), lookup=libc) as http:
            server.pages |= {
                "/a/1": redirect("2?x=%2F", status),
                "/a/2?x=%2F": redirect("/b/3", status),
                "/b/3": redirect("//b.example/4", status),
                "/4": redirect("http://C.example:8080/5 5#top", status),
                "/5%205": redirect("?last", status),
            }
            async with http.get("http://a.example/a/1") as response:
                assert str(response.url) == "http://c.example:8080/5%205?last"
                assert await response.read() == b"picture"

    run(scenario(), divert=True)


def test_the_sixth_redirect_is_one_too_many() -> None:
    async def scenario() -> None:
        async with serving() as server, GuardedSession(AddressGuard(allowed_hosts=["127.0.0.1"])) as http:
            server.pages |= {f"/{n}": redirect(f"/{n - 1}") for n in range(1, 7)}
            assert await fetch(http, server.url("/5")) == b"picture"
            with pytest.raises(DownloadFailed, match="redirects"):
                await fetch(http, server.url("/6"))
            assert len(server.targets) == 6 + 6

    run(scenario())


@pytest.mark.parametrize(
    "answer", [page(b"no", status="302 Found"), page(b"no", status="300 Multiple Choices", Location="/x")]
)
def test_what_is_no_redirect_is_returned_as_it_is(answer: bytes) -> None:
    async def scenario() -> None:
        async with serving() as server, GuardedSession(AddressGuard(allowed_hosts=["127.0.0.1"])) as http:
            server.pages["/"] = answer
            async with http.get(server.url()) as response:
                assert response.status in (300, 302)
            assert server.targets == ["/"]

    run(scenario())


@pytest.mark.parametrize(
    ("location", "carried"),
    [
        ("/next", True),
        ("http://a.example/next", True),
        ("http://A.example:80/next", True),
        ("http://b.example/next", False),
        ("http://x.a.example/next", False),
        ("http://a.example:8080/next", False),
    ],
)
def test_headers_are_not_carried_to_another_host(location: str, carried: bool) -> None:
    async def scenario() -> None:
        async with serving() as server, GuardedSession(AddressGuard(), lookup=libc, user_agent="cvworker/1") as http:
            server.pages |= {"/": redirect(location), "/next": redirect("http://a.example/back")}
            await fetch(http, "http://a.example/", headers={"Authorization": "Bearer SECRET", "X-Own": "SECRET"})
            first, *others = server.headers
            assert (first["authorization"], first["x-own"]) == ("Bearer SECRET", "SECRET")
            assert len(others) == 2
            assert all(("SECRET" in str(headers)) is carried for headers in others)
            assert {headers["accept-encoding"] for headers in server.headers} == {"identity"}
            assert {headers["user-agent"] for headers in server.headers} == {"cvworker/1"}

    run(scenario(), divert=True)


def test_post_sends_data_and_headers_and_returns_a_redirect_as_it_is() -> None:
    async def scenario() -> None:
        async with serving() as server, GuardedSession(AddressGuard(), lookup=libc) as http:
            server.pages["/"] = redirect("/elsewhere", "307 Temporary Redirect")
            async with http.post(
                "http://a.example/", data=b"{}", headers={"Content-Type": "application/json"}
            ) as response:
                assert response.status == 307
            assert (server.targets, server.bodies) == (["/"], [b"{}"])
            assert server.headers[0]["content-type"] == "application/json"

    run(scenario(), divert=True)


# --- URLs in logs


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a.example/b?SECRET#c", "https://a.example/b"),
        ("https://user:SECRET@a.example/b@c", "https://a.example/b@c"),
        ("https://user:SEC@RET@a.example", "https://a.example"),
        ("//user:SECRET@a.example/", "//a.example/"),
        ("user:SECRET@a.example/", "a.example/"),
        ("http:user:SECRET@a.example", "a.example"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("http://a.example/\r\nforged line\x1b[2J", "http://a.example/\ufffd\ufffdforged line\ufffd[2J"),
        ("", ""),
    ],
)
def test_a_url_is_logged_without_its_secrets(url: str, shown: str) -> None:
    assert display_url(url) == shown


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_logged_on_one_line(text: str) -> None:
    shown = display_url(text)
    assert shown.isprintable()
    assert not set(shown) & {"?", "#"}
