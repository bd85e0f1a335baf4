"""HTTP/1.1 as hosts speak it: framings, pieces of any size, connections that are kept and such that end early."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cvworker.net import AddressGuard, BadResponse, BodyCut, ConnectionFailed, GuardedSession, Response
from cvworker.net.connection import HELD_BYTES, MAX_HEAD_BYTES
from test_net import _certificate_for, page, run

BODY = bytes(range(256)) * 4

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n" + BODY
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"1f;name=value\r\n" + BODY[:31] + b"\r\n3E1\r\n" + BODY[31:] + b"\r\n0\r\nTrailer: x\r\n\r\n"
)
TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\n" + BODY
OLD = b"HTTP/1.0 200 OK\r\nContent-Length: 1024\r\n\r\n" + BODY
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + PLAIN
FRAMINGS = {"length": PLAIN, "chunked": CHUNKED, "to the end": TO_THE_END, "1.0": OLD, "interim": INTERIM}

Answer = Callable[[asyncio.StreamWriter], Awaitable[object]]


class Host:
    """Reads requests and gives to each connection the answers in turn; after the last one it hangs up."""

    def __init__(self, *connections: list[Answer | bytes]) -> None:
        self.connections = list(connections)
        self.requests: list[int] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(0)
        mine = len(self.requests) - 1
        answers = self.connections[min(mine, len(self.connections) - 1)]
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            for answer in answers:
                await reader.readuntil(b"\r\n\r\n")
                self.requests[mine] += 1
                if isinstance(answer, bytes):
                    writer.write(answer)
                    await writer.drain()
                else:
                    await answer(writer)


@contextlib.asynccontextmanager
async def host(*connections: list[Answer | bytes]) -> AsyncIterator[Host]:
    serving = Host(*connections)
    listener = await asyncio.start_server(serving.serve, "127.0.0.1", 0)
    serving.port = listener.sockets[0].getsockname()[1]
    try:
        yield serving
    finally:
        listener.close()


def session(**options: Any) -> GuardedSession:
    return GuardedSession(AddressGuard(allowed_hosts=["127.0.0.1"]), **options)


async def body_of(response: Response) -> bytes:
    return await response.read()


async def in_place(response: Response) -> bytes:
    memory = bytearray(response.length or 0)
    await response.read_into(memoryview(memory))
    return bytes(memory)


def pieces(answer: bytes, cuts: list[int]) -> Answer:
    async def write(writer: asyncio.StreamWriter) -> None:
        places = sorted({cut % len(answer) for cut in cuts})
        for start, end in zip([0, *places], [*places, len(answer)], strict=True):
            writer.write(answer[start:end])
            await writer.drain()
            await asyncio.sleep(0)  # a round of the loop, in which the other side may read

    return write


# --- framings


@pytest.mark.parametrize("framing", FRAMINGS)
@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 5000), max_size=12))
@example(cuts=list(range(200)))
def test_a_response_is_the_same_in_whatever_pieces_it_comes(framing: str, cuts: list[int]) -> None:
    async def scenario() -> None:
        answer = pieces(FRAMINGS[framing], cuts)
        async with host([answer]) as images, session() as http, http.get(images.url) as response:
            assert response.status == 200
            assert await body_of(response) == BODY

    run(scenario())


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 5000), max_size=12))
def test_a_body_with_a_length_can_be_read_in_place(cuts: list[int]) -> None:
    async def scenario() -> None:
        answer = pieces(PLAIN, cuts)
        async with host([answer]) as images, session() as http, http.get(images.url) as response:
            assert response.length == len(BODY)
            assert await in_place(response) == BODY

    run(scenario())


@pytest.mark.parametrize("framing", ["chunked", "to the end"])
def test_a_body_whose_host_does_not_say_its_length_has_none(framing: str) -> None:
    async def scenario() -> None:
        async with host([FRAMINGS[framing]]) as images, session() as http, http.get(images.url) as response:
            assert response.length is None

    run(scenario())


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_some_responses_have_no_body_and_the_connection_goes_on(status: str) -> None:
    empty = f"HTTP/1.1 {status}\r\n\r\n".encode()

    async def scenario() -> None:
        async with host([empty, PLAIN]) as images, session() as http:
            for expected in (b"", BODY):
                async with http.get(images.url) as response:
                    assert await body_of(response) == expected
            assert images.requests == [2]

    run(scenario())


def test_a_large_body_comes_whole_through_tls_too() -> None:
    picture = BODY * 4096  # 4 MiB
    serving_tls, trusting = _certificate_for("127.0.0.1")

    async def scenario() -> None:
        serving = Host([page(picture), page(picture)])
        listener = await asyncio.start_server(serving.serve, "127.0.0.1", 0, ssl=serving_tls)
        trusting.check_hostname = False
        url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
        async with session(ssl_context=trusting) as http:
            for read in (in_place, body_of):
                async with http.get(url) as response:
                    assert await read(response) == picture
        assert serving.requests == [2]
        listener.close()

    run(scenario())


# --- what is no answer


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 4 * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a number\r\n",
    ],
)
def test_what_is_not_http_fails_and_is_named_as_that(answer: bytes) -> None:
    async def scenario() -> None:
        async with host([answer]) as images, session() as http:
            with pytest.raises(BadResponse):
                async with http.get(images.url) as response:
                    await body_of(response)

    run(scenario())


@pytest.mark.parametrize("read", [body_of, in_place])
def test_a_body_that_ends_early_is_cut(read: Callable[[Response], Awaitable[bytes]]) -> None:
    async def scenario() -> None:
        async with host([PLAIN[:-1]]) as images, session() as http, http.get(images.url) as response:
            with pytest.raises(BodyCut):
                await read(response)

    run(scenario())


def test_chunks_that_end_early_are_a_cut_body_and_not_a_short_one() -> None:
    async def scenario() -> None:
        async with host([CHUNKED[:-20]]) as images, session() as http, http.get(images.url) as response:
            with pytest.raises(BodyCut):
                await body_of(response)

    run(scenario())


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200"])
def test_a_host_that_hangs_up_before_the_head_is_whole_has_not_answered(answer: bytes) -> None:
    async def scenario() -> None:
        async with host([answer]) as images, session() as http:
            with pytest.raises(ConnectionFailed):
                async with http.get(images.url):
                    pass
            assert images.requests == [1], "on a new connection that is an answer of a kind, and not repeated"

    run(scenario())


def test_what_no_header_can_carry_is_not_sent() -> None:
    async def scenario() -> None:
        async with host([PLAIN]) as images, session() as http:
            with pytest.raises(ValueError, match="x-own"):
                async with http.get(images.url, headers={"x-own": "a\r\nHost: elsewhere"}):
                    pass
            assert images.requests == []

    run(scenario())


# --- connections


@pytest.mark.parametrize("method", ["get", "post"])
def test_a_connection_that_was_closed_while_idle_costs_nothing_but_a_new_one(method: str) -> None:
    async def scenario() -> None:
        async with host([PLAIN], [PLAIN, PLAIN]) as images, session() as http:
            for _ in range(3):
                asking = http.get(images.url) if method == "get" else http.post(images.url, data=b"")
                async with asking as response:
                    assert await body_of(response) == BODY
            assert images.requests == [1, 2]

    run(scenario())


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def test_a_request_that_meets_a_closing_connection_is_sent_again_on_a_new_one() -> None:
    async def scenario() -> None:
        async with host([PLAIN, _hang_up], [PLAIN]) as images, session() as http:
            for _ in range(2):
                async with http.get(images.url) as response:
                    assert await body_of(response) == BODY
            assert images.requests == [2, 1]

    run(scenario())


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN + b"more",
        page(BODY, Connection="close"),
        OLD,
        CHUNKED + b"more",
    ],
)
def test_a_connection_is_not_used_again_where_another_response_cannot_follow(answer: bytes) -> None:
    async def scenario() -> None:
        async with host([answer, PLAIN]) as images, session() as http:
            for _ in range(2):
                async with http.get(images.url) as response:
                    assert await body_of(response) == BODY
                await asyncio.sleep(0.01)  # what is too much may come later than the rest
            assert images.requests == [1, 1]

    run(scenario())


def test_a_connection_is_closed_where_its_body_was_not_wanted() -> None:
    picture = BODY * 4096

    async def scenario() -> None:
        async with host([page(picture), PLAIN], [PLAIN]) as images, session() as http:
            async with http.get(images.url):
                pass
            async with http.get(images.url) as response:
                assert await body_of(response) == BODY
            assert images.requests == [1, 1]

    run(scenario())


def test_no_more_connections_than_allowed_and_everybody_gets_a_turn() -> None:
    async def scenario() -> None:
        async with host([PLAIN] * 50) as images, session(limit=3) as http:

            async def one() -> bytes:
                async with http.get(images.url) as response:
                    return await body_of(response)

            assert await asyncio.gather(*(one() for _ in range(40))) == [BODY] * 40
            assert len(images.requests) <= 3

    run(scenario())


def test_an_idle_connection_makes_room_for_one_to_another_host() -> None:
    async def scenario() -> None:
        async with host([PLAIN, PLAIN]) as here, host([PLAIN, PLAIN]) as there, session(limit=1) as http:
            for images in (here, there, here):
                async with http.get(images.url) as response:
                    assert await body_of(response) == BODY
            assert (here.requests, there.requests) == ([1, 1], [1])

    run(scenario())


def test_one_who_gives_up_in_the_line_does_not_take_the_turn_with_him() -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def later(writer: asyncio.StreamWriter) -> None:
            await release.wait()
            writer.write(PLAIN)
            await writer.drain()

        async with host([later, PLAIN, PLAIN]) as images, session(limit=1) as http:

            async def one() -> bytes:
                async with http.get(images.url) as response:
                    return await body_of(response)

            first, given_up, last = (asyncio.ensure_future(one()) for _ in range(3))
            await asyncio.sleep(0.01)
            given_up.cancel()
            release.set()
            assert await asyncio.gather(first, last) == [BODY, BODY]

    run(scenario())


def test_idle_connections_are_closed_after_a_while() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(PLAIN)
            await reader.read()
            ended.set()
            writer.close()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
        async with session(keepalive_timeout=0.02) as http:
            async with http.get(url) as response:
                await body_of(response)
            async with asyncio.timeout(5):
                await ended.wait()
        listener.close()

    run(scenario())


# --- memory


def test_a_host_has_to_wait_while_nobody_takes_what_it_sends() -> None:
    picture = BODY * 16384  # 16 MiB
    written = asyncio.Event()

    async def all_of_it(writer: asyncio.StreamWriter) -> None:
        writer.write(page(picture))
        await writer.drain()
        written.set()

    async def scenario() -> None:
        async with host([all_of_it]) as images, session() as http, http.get(images.url) as response:
            await asyncio.sleep(0.1)
            assert not written.is_set()
            assert len(response._connection._held) <= 2 * HELD_BYTES
            assert await in_place(response) == picture

    run(scenario())


def test_a_body_that_came_whole_before_it_was_asked_for_leaves_the_connection_usable() -> None:
    picture = bytes(HELD_BYTES + 1000)

    async def the_end_apart(writer: asyncio.StreamWriter) -> None:
        for part in (page(picture)[:-1000], page(picture)[-1000:]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)

    async def scenario() -> None:
        async with host([the_end_apart, PLAIN]) as images, session() as http:
            async with http.get(images.url) as response:
                async with asyncio.timeout(10):
                    while not response.has_come:  # noqa: ASYNC110 - nobody reads, so nothing tells
                        await asyncio.sleep(0)
                assert await in_place(response) == picture
            async with http.get(images.url, timeout=10) as response:
                assert await body_of(response) == BODY
            assert images.requests == [2]

    run(scenario())


def test_nothing_is_written_into_memory_that_its_reader_has_given_up() -> None:
    async def scenario() -> None:
        go_on = asyncio.Event()

        async def in_two_parts(writer: asyncio.StreamWriter) -> None:
            writer.write(PLAIN[:-500])
            await writer.drain()
            await go_on.wait()
            writer.write(PLAIN[-500:])
            await writer.drain()

        async with host([in_two_parts]) as images, session() as http:
            memory = bytearray(len(BODY))
            async with http.get(images.url) as response:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await response.read_into(memoryview(memory))
                before = bytes(memory)
                go_on.set()
                await asyncio.sleep(0.05)
                assert bytes(memory) == before
                memory.clear()  # nobody holds a view of it any more

    run(scenario())
