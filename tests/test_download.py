"""Downloads against a real server: what is an image, what is tried again, and that no byte of the arena stays taken."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from aiohttp import web
from botocore.exceptions import ClientError, EndpointConnectionError

from cvworker.arena import PAGE, Arena, Slot
from cvworker.errors import (
    DownloadFailed,
    DownloadInterrupted,
    DownloadTimeout,
    ImageNotFound,
    ImageTooLarge,
    JobError,
    UrlNotAllowed,
)
from cvworker.net import AddressGuard
from cvworker.steps import download
from cvworker.steps.download import TRIES, Fetcher
from fakes import serving

MAX = 3 * PAGE - 100
IMAGE = bytes(range(256)) * 20


class Images:
    """An image host: the handlers in turn, the last for ever."""

    def __init__(self, *handlers: Any) -> None:
        self.handlers = list(handlers)
        self.requests: list[web.BaseRequest] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        handler = self.handlers.pop(0) if len(self.handlers) > 1 else self.handlers[0]
        if isinstance(handler, int):
            return web.Response(status=handler)
        if isinstance(handler, bytes):
            return web.Response(body=handler)
        return handler if isinstance(handler, web.Response) else await handler(request)


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRY_BASE_S", 0.001)


def fetching(
    images: Images,
    scenario: Callable[[Fetcher, Arena, str], Coroutine[Any, Any, Any]],
    *,
    timeout: float = 10,
    private: bool = True,
) -> Any:
    """Run ``scenario``; afterwards everything it took from the arena has gone back."""

    async def main() -> Any:
        arena = Arena(4 * PAGE)
        guard = AddressGuard(allow_private_networks=private)
        async with (
            serving(images) as url,
            Fetcher(guard, arena, max_bytes=MAX, timeout=timeout, connections=4, user_agent="test") as fetcher,
        ):
            try:
                return await asyncio.wait_for(scenario(fetcher, arena, url), 20)
            finally:
                assert arena.used == 0

    return asyncio.run(main())


def fetch(images: Images, *, target: str = "/a.jpg", **more: Any) -> bytes:
    async def scenario(fetcher: Fetcher, arena: Arena, url: str) -> bytes:
        return read(arena, await fetcher.fetch(target if "://" in target else url + target))

    return fetching(images, scenario, **more)


def read(arena: Arena, slot: Slot) -> bytes:
    data = bytes(arena.memory[slot.offset : slot.offset + slot.length])
    assert arena.used == slot.room < len(data) + PAGE, "room that was not needed has gone back"
    slot.free()
    return data


def in_chunks(*parts: bytes) -> Callable[[web.BaseRequest], Any]:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        await response.write_eof()
        return response

    return handler


def breaking_off(length: int | None, after: bytes) -> Callable[[web.BaseRequest], Any]:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        if length is None:
            response.enable_chunked_encoding()
        else:
            response.content_length = length
        await response.prepare(request)
        await response.write(after)
        assert request.transport is not None
        request.transport.close()
        return response

    return handler


async def drip(request: web.BaseRequest) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "5000"})
    await response.prepare(request)
    while True:
        await response.write(b"x")
        await asyncio.sleep(0.02)


async def silence(_request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


def s3_error(code: str, status: int) -> ClientError:
    error = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(error, "GetObject")  # type: ignore[arg-type]


def answer_in_s3(monkeypatch: pytest.MonkeyPatch, *answers: bytes | Exception) -> None:
    """S3 as the fetcher finds it: the answers in turn, the last for ever."""
    rest = list(answers)

    def get_object(**_: str) -> dict[str, Any]:
        answer = rest.pop(0) if len(rest) > 1 else rest[0]
        if isinstance(answer, Exception):
            raise answer
        return {"ContentLength": len(answer), "Body": io.BytesIO(answer)}

    client = SimpleNamespace(get_object=get_object)
    monkeypatch.setattr(boto3, "Session", lambda **_: SimpleNamespace(client=lambda *_, **__: client))


@pytest.mark.parametrize("answer", [IMAGE, in_chunks(IMAGE[:1000], IMAGE[1000:])], ids=["whole", "chunked"])
def test_the_bytes_of_an_image_end_up_in_the_arena(answer: Any) -> None:
    images = Images(answer)
    assert fetch(images) == IMAGE
    assert images.requests[0].headers["User-Agent"] == "test"
    assert images.requests[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("answer", [b"x" * MAX, in_chunks(b"x" * MAX)], ids=["whole", "chunked"])
def test_an_image_of_just_the_allowed_size_is_taken(answer: Any) -> None:
    assert len(fetch(Images(answer))) == MAX


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (404, ImageNotFound),
        (410, ImageNotFound),
        (400, DownloadFailed),
        (401, DownloadFailed),
        (403, DownloadFailed),
        (304, DownloadFailed),
        (web.Response(body=IMAGE, headers={"Content-Encoding": "gzip"}), DownloadFailed),
        (b"x" * (MAX + 1), ImageTooLarge),
        (in_chunks(b"x" * MAX, b"x"), ImageTooLarge),
        (in_chunks(*[b"x" * PAGE] * 100), ImageTooLarge),
    ],
    ids=["404", "410", "400", "401", "403", "304", "gzip", "too large", "chunked too large", "far too large"],
)
def test_what_will_not_get_better_is_told_at_once(answer: Any, error: type[JobError]) -> None:
    images = Images(answer)
    with pytest.raises(error) as raised:
        fetch(images)
    assert (type(raised.value), raised.value.retryable) == (error, False)
    assert len(images.requests) == 1


@pytest.mark.parametrize(
    "passing",
    [500, 502, 503, 504, 429, breaking_off(9000, IMAGE), breaking_off(None, IMAGE), breaking_off(9000, b"")],
    ids=["500", "502", "503", "504", "429", "short", "short chunked", "empty"],
)
def test_what_may_pass_is_tried_again_shortly(passing: Any) -> None:
    images = Images(passing, IMAGE)
    assert fetch(images) == IMAGE
    assert len(images.requests) == 2


@pytest.mark.parametrize("passing", [500, breaking_off(9000, IMAGE)], ids=["500", "short"])
def test_what_does_not_pass_is_left_to_sqs_after_a_few_tries(passing: Any) -> None:
    images = Images(passing)
    with pytest.raises(DownloadInterrupted) as raised:
        fetch(images)
    assert raised.value.retryable
    assert len(images.requests) == TRIES


def test_a_host_that_asks_for_more_time_than_there_is_is_left_to_sqs_with_its_wish() -> None:
    images = Images(web.Response(status=503, headers={"Retry-After": "90"}))
    with pytest.raises(DownloadInterrupted) as raised:
        fetch(images)
    assert (raised.value.retry_after, len(images.requests)) == (90, 1)


@pytest.mark.parametrize("slow", [drip, silence])
def test_the_time_for_the_whole_download_ends_it_whatever_its_pace(slow: Any) -> None:
    images = Images(slow)
    with pytest.raises(DownloadTimeout) as raised:
        fetch(images, timeout=0.3)
    assert raised.value.retryable
    assert len(images.requests) == 1, "a time-out is not tried again in place"


@pytest.mark.parametrize("target", ["", "s3://pictures/a.jpg"], ids=["http", "s3"])
def test_the_wait_for_room_is_not_the_hosts_fault(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_in_s3(monkeypatch, IMAGE)

    async def scenario(fetcher: Fetcher, arena: Arena, url: str) -> bytes:
        taken = await arena.take(arena.size)
        fetching = asyncio.create_task(fetcher.fetch(target or url))
        done, _ = await asyncio.wait([fetching], timeout=0.6)
        assert not done
        taken.free()
        return read(arena, await fetching)

    assert fetching(Images(IMAGE), scenario, timeout=0.3) == IMAGE


@pytest.mark.parametrize("full", [False, True], ids=["reading", "waiting for room"])
def test_a_download_that_is_given_up_leaves_nothing_behind(full: bool) -> None:
    async def scenario(fetcher: Fetcher, arena: Arena, url: str) -> None:
        taken = await arena.take(arena.size) if full else None
        fetching = asyncio.create_task(fetcher.fetch(url))
        await asyncio.wait([fetching], timeout=0.1)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        if taken is not None:
            taken.free()

    fetching(Images(drip), scenario)


def test_many_downloads_share_the_arena_without_harm() -> None:
    async def scenario(fetcher: Fetcher, arena: Arena, url: str) -> list[bool]:
        async def one(n: int) -> bool:
            slot = await fetcher.fetch(f"{url}/{n}")
            data = bytes(arena.memory[slot.offset : slot.offset + slot.length])
            slot.free()
            return data == IMAGE

        return await asyncio.gather(*(one(n) for n in range(40)))

    assert all(fetching(Images(*[IMAGE, in_chunks(IMAGE)] * 20), scenario))


def test_an_address_that_may_not_be_spoken_to_is_not() -> None:
    images = Images(IMAGE)
    with pytest.raises(UrlNotAllowed):
        fetch(images, private=False)
    assert images.requests == []


def test_a_redirect_is_followed_and_its_address_checked_again() -> None:
    moved = web.Response(status=302, headers={"Location": "/b.jpg"})
    assert fetch(Images(moved, IMAGE)) == IMAGE
    with pytest.raises(UrlNotAllowed, match="redirect"):
        fetch(Images(web.Response(status=302, headers={"Location": "file:///etc/passwd"})))


def test_redirects_without_end_are_a_failure() -> None:
    images = Images(lambda _request: asyncio.sleep(0, web.Response(status=302, headers={"Location": "/again"})))
    with pytest.raises(DownloadFailed, match="redirects"):
        fetch(images)


def test_a_name_that_does_not_resolve_may_do_so_later(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    def nowhere(host: str, *_: Any, **__: Any) -> Any:
        looked_up.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(DownloadInterrupted, match=r"the name images\.test does not resolve"):
        fetch(Images(IMAGE), target="http://images.test/a.jpg")
    assert set(looked_up) == {"images.test"}


def test_a_host_that_refuses_connections_may_come_back() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(DownloadInterrupted, match="connection"):
            fetch(Images(IMAGE), target=f"http://127.0.0.1:{taken.getsockname()[1]}/")


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([IMAGE], None),
        ([s3_error("SlowDown", 503), IMAGE], None),
        ([EndpointConnectionError(endpoint_url="http://s3"), IMAGE], None),
        ([s3_error("NoSuchKey", 404)], ImageNotFound),
        ([s3_error("AccessDenied", 403)], DownloadFailed),
        ([s3_error("InternalError", 500)], DownloadInterrupted),
        ([b"x" * (MAX + 1)], ImageTooLarge),
    ],
    ids=["image", "slow down", "connection", "no such key", "denied", "5xx", "too large"],
)
def test_s3_is_read_like_any_host(
    answers: list[Any], error: type[JobError] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_in_s3(monkeypatch, *answers)
    if error is None:
        assert fetch(Images(404), target="s3://pictures/a b#1.jpg") == IMAGE
    else:
        with pytest.raises(error) as raised:
            fetch(Images(404), target="s3://pictures/a b#1.jpg")
        assert type(raised.value) is error
