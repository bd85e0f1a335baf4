"""The first stage: requests → the bytes of their images."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cvworker import __version__
from cvworker.bulk.work import Gathered, Work, settle_in, text_of, told
from cvworker.errors import DownloadFailed, ImageNotFound, ImageTooLarge, JobError
from cvworker.messages import Request, parse

if TYPE_CHECKING:
    from cvworker.arena import Slot

Downloaded = tuple[dict[str, Any], "Slot | bytes | None"]
"""A row, and its image where there is one."""
PIECES_AT_ONCE = 4
"""Pieces that one actor works on, so that a slow image holds up its own piece only."""


class Download:
    """Requests → the bytes of their images, many at once on one event loop, with the worker's guard and limits."""

    def __init__(self, work: Work) -> None:
        settle_in(work)
        self._work = work
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="download", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> None:
        from cvworker.arena import Arena
        from cvworker.steps.download import Fetcher

        work = self._work
        self._arena = Arena(work.max_inflight_bytes)
        self._at_once = asyncio.Semaphore(work.download_concurrency)
        self._fetcher = Fetcher(
            work.guard,
            self._arena,
            max_bytes=work.max_image_bytes,
            timeout=work.download_timeout,
            connections=work.download_concurrency,
            user_agent=f"cvworker/{__version__}",
        )

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        done: SimpleQueue[Downloaded] = SimpleQueue()
        rows = table.to_pylist()
        for each in rows:
            request = self._request(each["row"], each["body"])
            asyncio.run_coroutine_threadsafe(self._one(each["row"], request, done), self._loop)
        gathered = Gathered()
        for _ in rows:
            row, image = done.get()
            if image is not None and not isinstance(image, bytes):
                # Only now, by the thread that makes the table: until then the image counts against the arena's limit.
                slot, image = image, bytes(self._arena.memory[image.offset : image.offset + image.length])
                slot.free()
            yield from gathered.add({**row, "payload": image})
        yield from gathered.rest()

    async def _one(self, row: int, request: Request, done: SimpleQueue[Downloaded]) -> None:
        image: Slot | bytes | None = None
        error, took = request.error, None
        if error is None:
            async with self._at_once:
                began = time.perf_counter()
                try:
                    image = await self._image(request.image_url or "")
                except JobError as failure:
                    error = failure
                except Exception as failure:  # this row's, whatever it is: the piece waits for each of its rows
                    error = DownloadFailed(f"the download failed ({type(failure).__name__})")
                took = (time.perf_counter() - began) * 1000
        done.put((_row(row, request, self._work.name, error, took), image))

    def _request(self, row: int, body: str) -> Request:
        """The request as the worker would understand it, except that a path is one to a local file."""
        values = json.loads(body)
        url, buckets = values.get("image_url"), self._work.buckets
        local = isinstance(url, str) and url != "" and "://" not in url
        if local:
            body, buckets = json.dumps({**values, "image_url": "s3://local/file"}), frozenset({"local"})
        [request] = parse(
            body,
            message_id=str(row),
            task=self._work.name,
            default_callback="http://callback.invalid/",
            check_url=self._work.guard.check_url,
            allowed_buckets=buckets,
        )
        return replace(request, image_url=url) if local else request

    async def _image(self, url: str) -> Slot | bytes:
        if "://" in url:
            return await self._fetcher.fetch(url)
        return await asyncio.to_thread(_read_file, url, self._work.base, self._work.max_image_bytes)


def _row(row: int, request: Request, name: str, error: JobError | None, took: float | None) -> dict[str, Any]:
    return {
        "row": row,
        "id": text_of(request.id),
        "task": text_of(request.task or name),
        "image_url": text_of(request.image_url) if request.image_url is not None else None,
        "metadata": json.dumps(request.metadata, separators=(",", ":")),
        "error": told(error),
        "download": took,
    }


def _read_file(name: str, base: Path | None, most: int) -> bytes:
    """A local file that the manifest names. Raises JobError."""
    if base is None and not Path(name).is_absolute():
        raise ImageNotFound("a relative path, in a manifest that is not in a folder")
    path = (base or Path()) / name
    with suppress(OSError, ValueError):
        if not path.exists():
            raise ImageNotFound("there is no such file")
    try:
        if not path.is_file():
            raise DownloadFailed("the path names no file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise DownloadFailed(f"the file cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > most:
        raise ImageTooLarge(f"the image has more than {most} bytes")
    return data
