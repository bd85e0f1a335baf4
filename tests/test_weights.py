"""Weights from a path, a web server and S3: fetched once, whole or not at all, and what is wrong told in one line."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from aiohttp import web

from cvworker import weights
from cvworker.embedded.server import ThreadServer
from cvworker.embedded.sqs import EmbeddedSqs
from cvworker.errors import StartupError
from cvworker.net import AddressGuard, GuardedSession
from cvworker.weights import bucket_of, local, sha256_of
from test_net import _certificate_for

FILE = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(FILE).hexdigest()
GUARD = AddressGuard(allowed_hosts=["127.0.0.1"])


class Host(ThreadServer):
    """Answers with ``pages`` by path, or with what a callable there makes of the request; counts the requests."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[str, bytes | web.Response | Callable[[web.BaseRequest], object]] = {}
        self.requests: list[str] = []
        self.etag: str | None = None

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request.path_qs)
        answer = self.pages.get(request.path, web.Response(status=404))
        if isinstance(answer, bytes):
            return web.Response(body=answer, headers={"ETag": self.etag} if self.etag else {})
        if isinstance(answer, web.Response):
            return web.Response(status=answer.status, headers=answer.headers)
        return await answer(request)  # type: ignore[misc, return-value]


class TlsHost(Host):
    """The same over TLS, as ``localhost``, with a certificate that its own fetches trust."""

    def __init__(self) -> None:
        super().__init__()
        self._tls, self.trusting = _certificate_for("localhost")

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            runner = web.ServerRunner(web.Server(self.handle, access_log=None), shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._tls).start()
            self.url = f"https://localhost:{runner.addresses[0][1]}"
            self._started.set()
            await self._stop.wait()

    def local(self, target: str) -> str:
        session = functools.partial(GuardedSession, ssl_context=self.trusting)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "GuardedSession", session)
            path = local(self.url + target, AddressGuard(allowed_hosts=["localhost", "127.0.0.1"]))
        assert path is not None
        return path


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as running:
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(weights, "RETRY_BASE_S", 0.001)
    return tmp_path / "cache" / "cvworker" / "weights"


def read(place: str) -> bytes:
    path = local(place, GUARD)
    assert path is not None
    return Path(path).read_bytes()


def refused(place: str, guard: AddressGuard = GUARD) -> str:
    with pytest.raises(StartupError) as refusal:
        local(place, guard)
    text = str(refusal.value)
    assert text.startswith("weights: ")
    assert "\n" not in text
    return text


def kept(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix != ".lock"] if cache.exists() else []


# --- paths


def test_a_path_is_used_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model #1.safetensors"
    file.write_bytes(FILE)
    assert local(str(file), GUARD) == str(file)
    assert local(f"{file}#sha256={DIGEST.upper()}", GUARD) == str(file)
    assert sha256_of(file) == f"sha256:{DIGEST}"
    assert local("demo", GUARD) == "demo"
    assert local(None, GUARD) is None


def test_a_path_under_the_home_directory_may_begin_with_a_tilde(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.safetensors").write_bytes(FILE)
    assert read("~/a.safetensors") == FILE


@pytest.mark.parametrize("place", ["missing.safetensors", ".", "~nobody-here/a", "x" * 300, "a\0b"])
def test_a_path_that_is_no_file_is_told(place: str) -> None:
    refused(place)


def test_a_file_of_another_digest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(FILE + b"x")
    assert "is not the file of sha256" in refused(f"{tmp_path}/a.safetensors#sha256={DIGEST}")


@pytest.mark.parametrize("fragment", ["sha256=abc", "sha256=" + "g" * 64, "md5=0", "sha265=" + "0" * 64])
def test_what_follows_the_mark_must_be_a_digest(fragment: str) -> None:
    assert "64 hexadecimal digits" in refused(f"https://models.example/a.safetensors#{fragment}")


# --- web servers


def test_a_file_with_a_digest_is_fetched_once(host: Host, cache: Path) -> None:
    host.pages["/a.safetensors"] = FILE
    place = f"{host.url}/a.safetensors?X-Amz-Signature=geheim#sha256={DIGEST}"
    first = local(place, GUARD)
    assert first is not None
    assert Path(first).read_bytes() == FILE
    assert Path(first).suffix == ".safetensors"
    assert local(place, GUARD) == first
    assert host.requests == ["/a.safetensors?X-Amz-Signature=geheim"]
    assert kept(cache) == [Path(first)]


def test_a_file_without_one_is_fetched_again_only_when_the_host_has_another_version() -> None:
    with TlsHost() as host:
        host.etag, host.pages["/a"] = '"1"', FILE
        first = host.local("/a")
        assert host.local("/a") == first
        host.etag, host.pages["/a"] = '"2"', FILE[1:]
        second = host.local("/a")
        assert Path(second).read_bytes() == FILE[1:]
        assert Path(first).read_bytes() == FILE, "a worker that runs keeps what it has"
        host.etag, host.pages["/a"] = None, b"third"
        assert Path(host.local("/a")).read_bytes() == b"third"
        host.pages["/a"] = b"fourth"
        assert Path(host.local("/a")).read_bytes() == b"fourth"


def test_a_spoilt_file_in_the_cache_is_fetched_anew(host: Host) -> None:
    host.pages["/a"] = FILE
    place = f"{host.url}/a#sha256={DIGEST}"
    path = local(place, GUARD)
    assert path is not None
    Path(path).write_bytes(b"spoilt")
    assert read(place) == FILE


def test_a_file_of_another_digest_does_not_get_into_the_cache(host: Host, cache: Path) -> None:
    host.pages["/a"] = b"other"
    assert "is not the file of sha256" in refused(f"{host.url}/a?geheim#sha256={DIGEST}")
    assert kept(cache) == []
    host.pages["/a"] = FILE
    assert read(f"{host.url}/a?geheim#sha256={DIGEST}") == FILE


async def _broken_off(request: web.BaseRequest) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(FILE))})
    await response.prepare(request)
    await response.write(FILE[:1000])
    assert request.transport is not None
    request.transport.close()
    return response


async def _gzip(_request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(body=FILE, headers={"Content-Encoding": "gzip"})


@pytest.mark.parametrize(
    ("answer", "says", "requests"),
    [
        (web.Response(status=404), "answered 404", 1),
        (web.Response(status=403), "answered 403", 1),
        (web.Response(status=503), "HTTP 503", 3),
        (_broken_off, "could not be fetched", 3),
        (_gzip, "Content-Encoding", 1),
        (web.Response(status=302, headers={"Location": "http://10.0.0.1/geheim"}), "private network", 1),
        (web.Response(status=302, headers={"Location": "file:///etc/passwd"}), "redirect refused", 1),
    ],
    ids=["404", "403", "503", "broken off", "gzip", "inside", "file"],
)
def test_what_cannot_be_fetched_is_told_and_leaves_nothing(
    answer: object, says: str, requests: int, host: Host, cache: Path
) -> None:
    host.pages["/a"] = answer  # type: ignore[assignment]
    text = refused(f"{host.url}/a?geheim#sha256={DIGEST}")
    assert says in text
    assert "geheim" not in text
    assert len(host.requests) == requests
    assert kept(cache) == []


def test_a_failure_that_passes_is_tried_again(host: Host) -> None:
    answers = iter([web.Response(status=503), web.Response(status=500), web.Response(body=FILE)])

    async def answer(_request: web.BaseRequest) -> web.Response:
        return next(answers)

    host.pages["/a"] = answer
    assert read(f"{host.url}/a#sha256={DIGEST}") == FILE


@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_that_is_too_large_is_refused_as_it_comes(
    chunked: bool, host: Host, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def without_length(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(FILE)
        return response

    monkeypatch.setattr(weights, "MAX_BYTES", len(FILE) - 1)
    host.pages["/a"] = without_length if chunked else FILE
    assert "larger than" in refused(f"{host.url}/a#sha256={DIGEST}")
    assert kept(cache) == []


def test_a_host_inside_is_refused_with_the_way_to_exempt_it(host: Host) -> None:
    text = refused(f"{host.url}/a#sha256={DIGEST}", AddressGuard())
    assert "not a public address" in text
    assert "CVWORKER_ALLOWED_HOSTS" in text
    assert host.requests == []


def test_plain_http_needs_a_digest_and_https_without_one_does_not_go_on_over_http() -> None:
    assert "over plain http" in refused("http://models.example/a")
    with TlsHost() as host, Host() as plain:
        plain.pages["/a"] = FILE
        host.pages["/a"] = web.Response(status=302, headers={"Location": plain.url + "/a"})
        with pytest.raises(StartupError, match="not to https"):
            host.local("/a")
        assert plain.requests == []
        assert Path(host.local(f"/a#sha256={DIGEST}")).read_bytes() == FILE


def test_workers_that_start_together_fetch_the_file_once(host: Host) -> None:
    together = threading.Barrier(8)

    def fetch() -> str | None:
        together.wait()
        return local(f"{host.url}/a#sha256={DIGEST}", GUARD)

    host.pages["/a"] = FILE
    with ThreadPoolExecutor(8) as pool:
        places = {each.result() for each in [pool.submit(fetch) for _ in range(8)]}
    assert len(places) == 1
    assert len(host.requests) == 1


def test_what_a_killed_fetch_left_behind_is_removed_in_time(host: Host, cache: Path) -> None:
    cache.mkdir(parents=True)
    for name, age in (("old", 3 * weights.FETCH_TIMEOUT_S), ("young", 0.0)):
        part = cache / f".part-{name}"
        part.write_bytes(b"half")
        os.utime(part, (part.stat().st_mtime - age,) * 2)
    host.pages["/a"] = FILE
    path = local(f"{host.url}/a#sha256={DIGEST}", GUARD)
    assert sorted(kept(cache)) == sorted([Path(path or ""), cache / ".part-young"])


# --- where it is kept


@pytest.mark.parametrize("why", ["a file is in its place", "no home at all", "not to be written"])
def test_a_cache_that_cannot_be_written_is_replaced_by_one_in_the_temporary_directory(
    why: str, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "a file is in its place":
        (tmp_path / "cache").write_text("")
    elif why == "no home at all":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
        monkeypatch.setattr(Path, "expanduser", _homeless)
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    host.pages["/a"] = FILE
    place = f"{host.url}/a#sha256={DIGEST}"
    path = local(place, GUARD)
    assert path is not None
    assert Path(path).parent == tmp_path / "tmp" / f"cvworker-weights-{os.getuid()}"
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    assert local(place, GUARD) == path
    assert len(host.requests) == 1


def _homeless(_path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("theirs", ["open to others", "a link"])
def test_a_temporary_directory_that_others_may_have_prepared_is_not_used(
    theirs: str, host: Host, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("")
    spare = tmp_path / "tmp" / f"cvworker-weights-{os.getuid()}"
    if theirs == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        spare.symlink_to(tmp_path / "elsewhere")
    else:
        spare.mkdir()
        spare.chmod(0o777)
    text = refused(f"{host.url}/a#sha256={DIGEST}")
    assert "XDG_CACHE_HOME" in text
    assert str(spare) in text
    assert host.requests == []


# --- S3


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with EmbeddedSqs() as running:
        yield running.environment()


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    boto3.Session().client("s3").create_bucket(Bucket="models")
    return "models"


def put(bucket: str, key: str, body: bytes) -> None:
    boto3.Session().client("s3").put_object(Bucket=bucket, Key=key, Body=body)


def test_weights_come_from_s3_once_for_each_version(bucket: str, cache: Path) -> None:
    put(bucket, "scene #1.safetensors", FILE)
    place = f"s3://{bucket}/scene #1.safetensors"
    first = local(place, GUARD)
    assert first is not None
    assert Path(first).read_bytes() == FILE
    inode = Path(first).stat().st_ino
    assert local(place, GUARD) == first
    assert Path(first).stat().st_ino == inode, "not fetched again"
    assert read(f"{place}#sha256={DIGEST}") == FILE
    put(bucket, "scene #1.safetensors", b"better")
    assert read(place) == b"better"
    assert not [path for path in kept(cache) if path.name.startswith(".part-")]


def test_what_is_wrong_with_s3_is_told(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, "other", b"other")
    assert "is not the file of" in refused(f"s3://{bucket}/other#sha256={DIGEST}")
    assert "404" in refused(f"s3://{bucket}/missing")
    assert "bucket" in refused("s3:///key")
    assert "key" in refused(f"s3://{bucket}")
    monkeypatch.setattr(weights, "MAX_BYTES", 4)
    assert "larger than 4 bytes" in refused(f"s3://{bucket}/other")
    assert kept(cache) == []


def test_images_may_come_from_the_bucket_of_the_weights() -> None:
    assert bucket_of("s3://models/a.safetensors#sha256=" + DIGEST) == {"models"}
    assert bucket_of("https://models.example/a") == bucket_of("a.safetensors") == bucket_of(None) == set()
