"""The operator's word on what leaves: allowed ports, a proxy for everything, and secrets that lie in files."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from cvworker import settings as settings_module
from cvworker.arena import PAGE, Arena
from cvworker.egress import check_proxy, port_ranges, without_credentials
from cvworker.errors import DownloadInterrupted, UrlNotAllowed
from cvworker.net import AddressGuard, GuardedSession, NameUnknown, TlsFailed
from cvworker.settings import Settings, unknown_variables
from cvworker.signing import Signer
from cvworker.steps.download import Fetcher
from cvworker.worker import guard_of
from test_net import _certificate_for, libc, redirect, serving
from world import BIN, World

PASSWORD = "geheim@:%"
CREDENTIALS = "operator:geheim%40%3A%25"
AUTHORIZATION = "Basic " + base64.b64encode(f"operator:{PASSWORD}".encode()).decode()
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Proxy:
    """An HTTP proxy that notes what it is asked for, and goes to ``upstream`` on 127.0.0.1 whatever that is.

    Without ``upstream`` it goes to the port asked for.
    """

    def __init__(self, upstream: int | None = None, status: int = 200) -> None:
        self.upstream = upstream
        self.status = status
        self.port = 0
        self.asked: list[str] = []
        self.authorizations: list[str | None] = []

    def url(self, credentials: str = "") -> str:
        return f"http://{credentials}{'@' if credentials else ''}127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            self.asked.append(f"{method} {target}")
            sent = re.search(rb"(?im)^proxy-authorization: (.*?)\r$", head)
            self.authorizations.append(sent and sent[1].decode())
            if self.status != 200:
                writer.write(f"HTTP/1.1 {self.status} No\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
                return
            place = re.sub(r"^http://", "", target).partition("/")[0]
            port = self.upstream or int(place.rpartition(":")[2])
            there, back = await asyncio.open_connection("127.0.0.1", port)
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Established\r\n\r\n")
            else:  # as a proxy does, with the path alone, and one exchange for a connection
                path = b"/" + target.split("/", 3)[3].encode()
                head = re.sub(rb"(?im)^(proxy-authorization|connection): .*?\r\n", b"", head)
                back.write(
                    head.replace(target.encode(), path, 1).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
                )
            with contextlib.closing(back):
                await asyncio.wait(
                    [asyncio.ensure_future(_pump(there, writer)), asyncio.ensure_future(_pump(reader, back))],
                    return_when=asyncio.FIRST_COMPLETED,
                )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        listener = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()


def through_proxy(
    scenario: Callable[[GuardedSession, Proxy, Any], Coroutine[Any, Any, None]],
    *,
    credentials: str = "",
    status: int = 200,
    **guard: Any,
) -> None:
    """Run ``scenario`` with a proxy behind which one server stands for the whole internet."""

    async def main() -> None:
        async with serving() as server, Proxy(server.port, status).running() as proxy:
            judge = AddressGuard(proxy=proxy.url(credentials), **guard)
            async with GuardedSession(judge, lookup=libc) as http:
                await scenario(http, proxy, server)

    asyncio.run(main())


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- ports


@pytest.mark.parametrize(
    ("entries", "inside", "outside"),
    [
        (["443"], [443], [80, 442, 444]),
        (["8000-8999", "22"], [22, 8000, 8500, 8999], [21, 7999, 9000]),
        (["1 - 65535"], [1, 65535], []),
        ([], [], [80, 443]),
    ],
)
def test_ports_are_single_ones_and_ranges(entries: list[str], inside: list[int], outside: list[int]) -> None:
    guard = AddressGuard(allowed_ports=entries)
    for port in inside:
        guard.check_url(f"http://example.com:{port}/")
    for port in outside:
        with pytest.raises(UrlNotAllowed, match=f"port {port} is not allowed"):
            guard.check_url(f"http://example.com:{port}/")


@pytest.mark.parametrize("entry", ["", "http", "0", "65536", "90-80", "1-", "-1", "80:90", "٨٠", "1-65536"])
def test_what_is_no_port_is_refused_in_the_settings_by_name(entry: str) -> None:
    with pytest.raises(ValueError, match="neither a port nor a range"):
        port_ranges([entry])
    with pytest.raises(ValidationError) as refused:
        Settings(allowed_ports=[entry])
    assert [error["loc"] for error in refused.value.errors()] == [("allowed_ports",)]


def test_the_settings_reach_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVWORKER_ALLOWED_PORTS", "443, 8000-8999")
    monkeypatch.setenv("CVWORKER_ALLOWED_HOSTS", "images.internal")
    monkeypatch.setenv("CVWORKER_EGRESS_PROXY", "http://proxy.internal:3128")
    guard = guard_of(Settings())
    assert guard.check_url("https://example.com:8443/").port == 8443
    assert guard.check_url("http://images.internal:22/").port == 22
    assert str(guard.proxy) == "http://proxy.internal:3128"
    with pytest.raises(UrlNotAllowed):
        guard.check_url("http://example.com/")


# --- the proxy


def test_downloads_and_callbacks_go_through_the_proxy_by_their_names() -> None:
    async def scenario(http: GuardedSession, proxy: Proxy, server: Any) -> None:
        server.pages["/moved"] = redirect("http://cdn.example:8080/a.jpg?sig=%2F")
        async with http.get("http://images.example/moved") as response:
            assert await response.read() == b"picture"
        async with http.post("http://client.example/answers", data=b"answer") as response:
            assert response.status == 200
        assert proxy.asked == [
            "GET http://images.example/moved",
            "GET http://cdn.example:8080/a.jpg?sig=%2F",
            "POST http://client.example/answers",
        ]
        assert server.bodies[-1] == b"answer"
        assert proxy.authorizations == [None] * 3

    through_proxy(scenario)


def test_https_goes_through_a_tunnel_and_the_certificate_must_be_the_hosts_own() -> None:
    async def main() -> None:
        ours, trusting = _certificate_for("images.example")
        async with serving(ours) as server, Proxy(server.port).running() as proxy:
            guard = AddressGuard(proxy=proxy.url(CREDENTIALS))
            async with GuardedSession(guard, lookup=libc, ssl_context=trusting) as http:
                async with http.get("https://images.example/a.jpg") as response:
                    assert await response.read() == b"picture"
                with pytest.raises(TlsFailed):
                    async with http.get("https://other.example/a.jpg"):
                        pass
        assert proxy.asked == ["CONNECT images.example:443", "CONNECT other.example:443"]
        assert proxy.authorizations == [AUTHORIZATION] * 2
        assert "proxy-authorization" not in server.headers[0], "what is for the proxy is not for the host"

    asyncio.run(main())


def test_the_proxy_is_told_the_credentials_of_its_url() -> None:
    async def scenario(http: GuardedSession, proxy: Proxy, _server: Any) -> None:
        async with http.get("http://images.example/a.jpg"):
            pass
        assert proxy.authorizations == [AUTHORIZATION]

    through_proxy(scenario, credentials=CREDENTIALS)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/",
        "http://images.example:22/",
        "http://user@images.example/",
        "ftp://images.example/",
        "http://rebinding.localhost/",
    ],
)
def test_what_is_refused_without_a_proxy_is_refused_with_one(url: str) -> None:
    async def scenario(http: GuardedSession, proxy: Proxy, server: Any) -> None:
        server.pages["/moved"] = redirect(url)
        for asked in (url, "http://images.example/moved"):
            with pytest.raises(UrlNotAllowed):
                async with http.get(asked):
                    pass
        assert proxy.asked == ["GET http://images.example/moved"]

    through_proxy(scenario)


def test_a_name_of_a_private_address_or_of_none_is_not_handed_to_the_proxy() -> None:
    async def main() -> None:
        async with Proxy().running() as proxy:
            names = {"inside.test": ["93.184.216.34", "10.0.0.1"], "nowhere.test": []}
            guard = AddressGuard(proxy=proxy.url())
            async with GuardedSession(guard, lookup=lambda host, _port: names[host]) as http:
                with pytest.raises(UrlNotAllowed, match="does not resolve to public addresses only"):
                    async with http.get("http://inside.test/"):
                        pass
                with pytest.raises(NameUnknown) as unknown:
                    async with http.get("http://nowhere.test/"):
                        pass
                assert unknown.value.host == "nowhere.test"
            assert proxy.asked == []

    asyncio.run(main())


@pytest.mark.parametrize("guard", [{"allowed_hosts": ["images.internal"]}, {"allow_private_networks": True}])
def test_a_host_that_is_exempt_is_not_looked_up_and_has_no_way_round_the_proxy(guard: dict[str, Any]) -> None:
    async def scenario(http: GuardedSession, proxy: Proxy, _server: Any) -> None:
        async with http.get("http://images.internal/a.jpg") as response:  # nobody resolves this one
            assert await response.read() == b"picture"
        assert proxy.asked == ["GET http://images.internal/a.jpg"]

    through_proxy(scenario, **guard)


def test_a_name_is_looked_up_once_in_a_while_and_not_for_each_request() -> None:
    looked_up: list[str] = []

    def lookup(host: str, _port: int) -> list[str]:
        looked_up.append(host)
        return ["127.0.0.1"] if host == "proxy.internal" else ["93.184.216.34"]

    async def main() -> None:
        async with serving() as server, Proxy(server.port).running() as proxy:
            guard = AddressGuard(proxy=f"http://proxy.internal:{proxy.port}")
            async with GuardedSession(guard, lookup=lookup) as http:
                for _ in range(5):
                    async with http.get("http://images.example/a.jpg"):
                        pass
        assert sorted(looked_up) == ["images.example", "proxy.internal"]

    asyncio.run(main())


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("trouble", ["closed", "unknown", "refuses"])
def test_a_proxy_in_trouble_may_be_back_later_and_is_not_named_to_the_client(scheme: str, trouble: str) -> None:
    async def main() -> None:
        async with Proxy(status=503).running() as proxy:
            place = {
                "closed": f"127.0.0.1:{unused_port()}",
                "unknown": "proxy.invalid:3128",
                "refuses": f"127.0.0.1:{proxy.port}",
            }[trouble]
            guard = AddressGuard(proxy=f"http://{CREDENTIALS}@{place}", allowed_hosts=["images.example"])
            async with Fetcher(
                guard, Arena(PAGE), max_bytes=PAGE, timeout=10, connections=2, user_agent="test"
            ) as fetcher:
                with pytest.raises(DownloadInterrupted) as raised:
                    await fetcher.fetch(f"{scheme}://images.example/a.jpg")
            for internal in ("geheim", "operator", "127.0.0.1", "proxy.invalid"):
                assert internal not in str(raised.value)

    asyncio.run(main())


@pytest.mark.parametrize(
    "url",
    [
        "proxy.internal:3128",
        "http://proxy.internal",
        "https://geheim@proxy.internal:3128",
        "http://:3128",
        "http://proxy.internal:0",
        "http://proxy.internal:99999",
        "http://proxy.internal:3128/geheim",
        "http://proxy.internal:3128?geheim",
        "http://proxy internal:3128",
        "socks5://proxy.internal:1080",
    ],
)
def test_what_is_no_http_proxy_is_refused_by_name_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="must be http://host:port"):
        check_proxy(url)
    with pytest.raises(ValidationError) as refused:
        Settings(egress_proxy=url)
    assert [error["loc"] for error in refused.value.errors()] == [("egress_proxy",)]
    assert url not in str(refused.value)


def test_the_proxys_credentials_are_shown_nowhere() -> None:
    settings = Settings(egress_proxy=f"http://{CREDENTIALS}@proxy.internal:3128")
    assert settings.proxy == f"http://{CREDENTIALS}@proxy.internal:3128"
    assert settings.shown()["egress_proxy"] == "http://***@proxy.internal:3128"
    for text in (str(settings), repr(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "geheim" not in text
    assert without_credentials("http://a@b:c@proxy.internal:1") == "http://***@proxy.internal:1"
    assert Settings(egress_proxy="http://proxy.internal:3128").shown()["egress_proxy"] == "http://proxy.internal:3128"


def test_a_worker_downloads_and_answers_through_the_proxy_and_shows_no_credentials(fast_world: World) -> None:
    here = fast_world
    started, over = threading.Event(), threading.Event()
    proxy = Proxy()

    async def serve() -> None:
        async with proxy.running():
            started.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert started.wait(10)
        worker = here.worker("--log-level", "debug", CVWORKER_EGRESS_PROXY=proxy.url(CREDENTIALS)).ready()
        here.send(*(here.request(n) for n in range(3)))
        assert here.receiver.wait_for(3, 60), worker.text()
        assert all(here.right(answer) for answer in here.receiver.answers.values())
        assert sum(each.startswith(f"GET {here.images.url}/") for each in proxy.asked) == 3
        assert f"POST {here.receiver.url}/answers" in proxy.asked
        assert set(proxy.authorizations) == {AUTHORIZATION}
        shown = worker.status()["settings"]["egress_proxy"]
        assert shown == f"http://***@127.0.0.1:{proxy.port}"
        assert "geheim" not in worker.text() + str(worker.status())
    finally:
        over.set()
        thread.join(10)


# --- secrets in files


def test_a_secret_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cvworker_callback_secret").write_text(f"{SECRET}\n{SECRET[:-1]}A\n")
    (tmp_path / "cvworker_egress_proxy").write_text("http://a:b@proxy.internal:3128\n")
    (tmp_path / "unrelated").mkdir()
    monkeypatch.setenv("CVWORKER_SECRETS_DIR", str(tmp_path))
    settings = Settings()
    assert settings.secrets == [SECRET, f"{SECRET[:-1]}A"]
    assert settings.proxy == "http://a:b@proxy.internal:3128"
    assert settings.shown()["callback_secret"] == ["***", "***"]
    Signer(settings.secrets)
    assert unknown_variables(set(Settings.model_fields)) == []
    monkeypatch.setenv("CVWORKER_CALLBACK_SECRET", SECRET)
    assert Settings().secrets == [SECRET], "a variable wins over a file"


def test_the_usual_directory_is_read_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "SECRETS_DIR", tmp_path / "secrets")
    assert Settings().secrets == []
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "cvworker_callback_secret").write_text(SECRET)
    assert Settings().secrets == [SECRET]


@pytest.mark.parametrize("wrong", ["missing", "file", "not text"])
def test_secrets_that_cannot_be_read_are_told_in_one_line(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "secrets"
    if wrong == "file":
        place.write_text(SECRET)
    elif wrong == "not text":
        place.mkdir()
        (place / "cvworker_callback_secret").write_bytes(b"whsec_\xff\xfe")
    monkeypatch.setenv("CVWORKER_SECRETS_DIR", str(place))
    with pytest.raises(SettingsError, match="CVWORKER_SECRETS_DIR") as refused:
        Settings()
    assert "\n" not in str(refused.value)
    assert "whsec_" not in str(refused.value)
    done = subprocess.run([BIN / "cvworker", "check"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
