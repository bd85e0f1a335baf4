"""URL → bytes in the arena, within limits of time and size."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cvworker import aws
from cvworker.arena import Arena, Slot
from cvworker.errors import (
    DownloadFailed,
    DownloadInterrupted,
    DownloadTimeout,
    ImageNotFound,
    ImageTooLarge,
)
from cvworker.messages import is_s3_url, split_s3_url
from cvworker.net import AddressGuard, BodyCut, GuardedSession, HttpFailed, NameUnknown, Response, TlsFailed
from cvworker.retry_after import retry_after

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

TRIES = 3
"""In place, for failures that may pass at once; after them SQS tries again, much later."""
RETRY_BASE_S = 0.25
S3_THREADS = 16
READ_BYTES = 256 * 1024


class Fetcher:
    """Downloads on one event loop. Create it inside the loop; ``async with`` closes it."""

    def __init__(
        self, guard: AddressGuard, arena: Arena, *, max_bytes: int, timeout: float, connections: int, user_agent: str
    ) -> None:
        self._session = GuardedSession(guard, limit=connections, user_agent=user_agent)
        self._arena = arena
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._s3 = _S3(max_bytes, timeout)

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Slot:
        """Download one image, trying passing failures again shortly, all within ``download_timeout``.

        Raises:
            ImageNotFound, ImageTooLarge, UrlNotAllowed: at once.
            DownloadFailed: permanent; DownloadInterrupted, DownloadTimeout: may pass.
        """
        try:
            async with asyncio.timeout(self._timeout) as limit:
                for tries_left in range(TRIES - 1, -1, -1):
                    try:
                        return await (self._from_s3 if is_s3_url(url) else self._from_http)(url, limit)
                    except DownloadInterrupted as error:
                        pause = RETRY_BASE_S * 4.0 ** (TRIES - 1 - tries_left) * random.uniform(0.5, 1.5)  # noqa: S311
                        pause = max(pause, error.retry_after or 0.0)
                        when = limit.when()
                        remains = 0.0 if when is None else when - asyncio.get_running_loop().time()
                        if not tries_left or pause > remains / 2:
                            raise
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise DownloadTimeout(f"the download took longer than {self._timeout:g} s") from None
        raise AssertionError("the last try returns or raises")

    async def _from_http(self, url: str, limit: asyncio.Timeout) -> Slot:
        try:
            async with self._session.get(url) as response:
                _check(response)
                return await self._read(response, limit)
        except NameUnknown as error:
            raise DownloadInterrupted(f"the name {error.host} does not resolve") from None
        except TlsFailed:
            raise DownloadFailed("TLS failed: the host's certificate or protocol was not accepted") from None
        except BodyCut:
            raise DownloadInterrupted("the body ended before it was complete") from None
        except HttpFailed as error:
            raise DownloadInterrupted(str(error)) from None

    async def _read(self, response: Response, limit: asyncio.Timeout) -> Slot:
        length = response.length
        if length is None:
            return await self._read_to_its_end(response, limit)
        if length > self._max_bytes:
            raise _too_large(length, self._max_bytes)
        slot = await self._room(length, limit)
        try:
            await response.read_into(slot.next(length))
        except BaseException:
            slot.free()
            raise
        slot.seal()
        return slot

    async def _read_to_its_end(self, response: Response, limit: asyncio.Timeout) -> Slot:
        """A body of unknown length: room for the largest image allowed, and most of it given back."""
        body = response.chunks()
        begun, whole = await _beginning(body)
        slot = await self._room(len(begun) if whole else self._max_bytes, limit)
        try:
            self._append(slot, begun)
            async for data in body:
                self._append(slot, data)
        except BaseException:
            slot.free()
            raise
        slot.seal()
        return slot

    def _append(self, slot: Slot, data: bytes) -> None:
        if slot.length + len(data) > self._max_bytes:
            raise ImageTooLarge(f"the image has more than {self._max_bytes} bytes")
        slot.write(data)

    async def _from_s3(self, url: str, limit: asyncio.Timeout) -> Slot:
        data = await self._s3.read(url)
        slot = await self._room(len(data), limit)
        slot.write(data)
        slot.seal()
        return slot

    async def _room(self, length: int, limit: asyncio.Timeout) -> Slot:
        """Wait for room with the clock stopped: a full arena is not the image host's fault."""
        when = limit.when()
        limit.reschedule(None)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await self._arena.take(length)
        finally:
            if when is not None:
                limit.reschedule(when + loop.time() - began)


class _S3:
    """S3 through boto3, on plain threads. The client is made at the first use: most workers never need one."""

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._client: S3Client | None = None

    async def read(self, url: str) -> bytes:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(S3_THREADS, "s3")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, url)

    def _read(self, url: str) -> bytes:
        bucket, key = split_s3_url(url)
        until = time.monotonic() + self._timeout
        try:
            answer: Any = self._connect().get_object(Bucket=bucket, Key=key)
            if answer["ContentLength"] > self._max_bytes:
                raise _too_large(answer["ContentLength"], self._max_bytes)
            parts = bytearray()
            with answer["Body"] as body:
                while part := body.read(READ_BYTES):
                    parts += part
                    if time.monotonic() > until:
                        raise DownloadTimeout(f"the download took longer than {self._timeout:g} s")
            return bytes(parts)
        except ClientError as error:
            raise _s3_error(error, bucket) from None
        except BotoCoreError as error:
            raise DownloadInterrupted(f"S3 could not be read ({type(error).__name__})") from None

    def _connect(self) -> S3Client:
        with self._lock:
            if self._client is None:
                config = Config(
                    connect_timeout=min(5.0, self._timeout),
                    read_timeout=self._timeout,
                    max_pool_connections=S3_THREADS,
                    retries={"total_max_attempts": 1},
                )
                self._client = aws.session().client("s3", config=config)
            return self._client


def _s3_error(error: ClientError, bucket: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in {"NoSuchKey", "404", "NotFound"}:
        return ImageNotFound(f"bucket {bucket} has no such key")
    if status >= 500 or status == 429 or code in {"SlowDown", "RequestTimeout", "Throttling"}:
        return DownloadInterrupted(f"S3 answered {code}")
    return DownloadFailed(f"S3 answered {code} for bucket {bucket}")


def _too_large(length: int, most: int) -> ImageTooLarge:
    return ImageTooLarge(f"the image has {length} bytes; at most {most} are allowed")


async def _beginning(body: AsyncIterator[bytes]) -> tuple[bytes, bool]:
    """The first bytes of a body of unknown length, and whether they are all of it.

    Without a length the arena must keep room for the largest image allowed. Most are small, and a host that sends
    slowly would take that room from others for as long as it likes: it is taken once there is something to keep in it.
    """
    begun = bytearray()
    async for data in body:
        begun += data
        if len(begun) > READ_BYTES:
            return bytes(begun), False
    return bytes(begun), True


def _check(response: Response) -> None:
    status = response.status
    if status in (404, 410):
        raise ImageNotFound(f"the image host answered {status}")
    if status == 429 or status >= 500:
        raise DownloadInterrupted(f"the image host answered {status}", retry_after(response.header("retry-after")))
    if not 200 <= status < 300:
        raise DownloadFailed(f"the image host answered {status}")
    encoding = response.header("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise DownloadFailed(f"the image host sent Content-Encoding {encoding[:40]!r}, which was not asked for")


class DownloadThreads:
    """The thread pool: each thread runs an event loop that carries many downloads."""

    def __init__(self, count: int, main: Callable[[], Any], failed: Callable[[BaseException], None]) -> None:
        self._main = main
        self._failed = failed
        self.threads = [threading.Thread(target=self._run, name=f"download-{n}", daemon=True) for n in range(count)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def join(self, timeout: float) -> bool:
        until = time.monotonic() + timeout
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failed(error)
