"""Hosts that send as slowly as they can: each costs one download its time, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest

from cvworker.arena import PAGE, Arena
from cvworker.errors import DownloadTimeout, JobError
from cvworker.net import AddressGuard
from cvworker.steps.download import Fetcher
from world import World, picture, poll

PAUSE_S = 0.5
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
MAX = 16 * PAGE

SLOW = {  # what comes at once, and what comes every half second for ever
    "one byte of the body": (HEAD + b"Content-Length: 5000\r\n\r\n", b"x"),
    "one byte of the status line": (b"", b"HTTP/1.1 200 " + b"O" * 100),
    "headers without end": (HEAD, b"X-More: 1\r\n"),
    "one byte of a header": (HEAD + b"X-Long: ", b"x"),
    "chunks without end": (CHUNKED, b"1\r\nx\r\n"),
    "a chunk that does not begin": (CHUNKED, b"0"),
    "trailers without end": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X-More: 1\r\n"),
    "a promised length that is not kept": (HEAD + b"Content-Length: 5000\r\n\r\n" + b"x" * 4999, b""),
    "nothing at all": (b"", b""),
    "another hop of a redirect": (b"HTTP/1.1 302 Found\r\nLocation: /again\r\nX-Long: ", b"x"),
}


class SlowHost:
    """Answers ``/N`` as the Nth of ``SLOW`` says, on 127.0.0.1; every other path with a picture, at once."""

    def __init__(self) -> None:
        self.url = ""
        self.connections = 0
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None] | None] = set()

    async def start(self) -> None:
        self.arrived = asyncio.Semaphore(0)
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in self._tasks:
            assert task is not None
            task.cancel()
        await asyncio.gather(*(task for task in self._tasks if task), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.arrived.release()
        self._tasks.add(asyncio.current_task())
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode().lstrip("/")
            if not path.isdigit():
                body = picture(7)
                writer.write(HEAD + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
                await writer.drain()
                return
            at_once, for_ever = list(SLOW.values())[int(path) % len(SLOW)]
            writer.write(at_once)
            pieces = itertools.cycle(
                [for_ever] if for_ever.endswith(b"\n") else [bytes([b]) for b in for_ever] or [b""]
            )
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(PAUSE_S)
                if reader.at_eof():
                    return


@asynccontextmanager
async def slow_host() -> AsyncIterator[SlowHost]:
    host = SlowHost()
    await host.start()
    try:
        yield host
    finally:
        await host.close()


@contextmanager
def hosts_in_a_thread(count: int) -> Iterator[list[SlowHost]]:
    """Slow hosts for a worker of its own, on one event loop beside the test."""
    hosts, started = [SlowHost() for _ in range(count)], threading.Event()
    loop, over = asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        for host in hosts:
            await host.start()
        started.set()
        await over.wait()
        for host in hosts:
            await host.close()

    thread = threading.Thread(target=lambda: asyncio.Runner(loop_factory=lambda: loop).run(main()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield hosts
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)


async def timed(fetcher: Fetcher, url: str) -> tuple[float, JobError | None]:
    began, error = time.monotonic(), None
    try:
        (await fetcher.fetch(url)).free()
    except JobError as raised:
        error = raised
    return time.monotonic() - began, error


@pytest.mark.parametrize("how", SLOW)
def test_a_slow_sender_is_given_up_when_its_time_is_over(how: str) -> None:
    async def main() -> None:
        arena = Arena(MAX)
        async with (
            slow_host() as host,
            Fetcher(
                AddressGuard(allow_private_networks=True),
                arena,
                max_bytes=MAX,
                timeout=1.0,
                connections=4,
                user_agent="test",
            ) as fetcher,
        ):
            took, error = await timed(fetcher, f"{host.url}/{list(SLOW).index(how)}")
            assert isinstance(error, DownloadTimeout)
            assert 1.0 <= took < 2.0
            assert host.connections == 1, "a time-out is not tried again in place"
        assert arena.used == 0

    asyncio.run(main())


@pytest.mark.parametrize("room", [64, 2], ids=["room for all", "room for two large ones"])
def test_32_slow_senders_at_once_hold_up_no_other_download_longer_than_their_time(room: int) -> None:
    async def main() -> None:
        arena = Arena(room * MAX)
        timeout = 1.5
        async with (
            slow_host() as host,
            Fetcher(
                AddressGuard(allow_private_networks=True),
                arena,
                max_bytes=MAX,
                timeout=timeout,
                connections=64,
                user_agent="test",
            ) as fetcher,
        ):
            slow = [asyncio.create_task(timed(fetcher, f"{host.url}/{n}")) for n in range(32)]
            for _ in slow:
                await host.arrived.acquire()
            good = await asyncio.gather(*(timed(fetcher, f"{host.url}/good-{n}") for n in range(16)))
            assert [error for _, error in good if error] == []
            assert max(took for took, _ in good) < timeout + 1
            for took, error in await asyncio.gather(*slow):
                assert isinstance(error, DownloadTimeout)
                assert took < timeout + 1
        assert arena.used == 0

    asyncio.run(main())


@pytest.mark.parametrize("hosts", [1, 32], ids=["one host", "32 hosts"])
def test_a_worker_with_32_slow_senders_answers_the_others_within_their_time(fast_world: World, hosts: int) -> None:
    here, timeout = fast_world, 4.0
    with ExitStack() as stack:
        slow = stack.enter_context(hosts_in_a_thread(hosts))
        worker = here.worker("--download-timeout", str(timeout)).ready()
        here.send(*({**here.request(n), "image_url": f"{slow[n % hosts].url}/{n}"} for n in range(32)))
        poll(lambda: sum(host.connections for host in slow) >= 16, 20, "the slow ones are under way")
        good = [here.request(n) for n in range(100, 120)]
        began = time.monotonic()
        here.send(*good)
        poll(lambda: len(here.receiver.answers) >= len(good), 60, "the good ones are answered")
        took = max(each.monotonic for each in here.receiver.accepted) - began
        assert all(here.right(answer) for answer in here.receiver.answers.values())
        poll(lambda: worker.status()["errors"].get("download_failed", 0) >= 32, 60, "the slow ones are given up")
        counted = worker.metric("cvworker_stage_duration_seconds_count", stage="download")
        in_time = worker.metric("cvworker_stage_duration_seconds_bucket", stage="download", le="5.0")
        assert counted == in_time, "each ended within its time and a second"
        assert took < timeout + 1, f"the others were held up for {took:.1f} s"
