"""What a good engineer writes in a day: asyncio for the network, threads for SQS and decoding, batches for the model.

Everything is compared with this one. Downloads and callbacks share an event loop, decoding runs on two threads (the
decoder and the resize give up the GIL), the model on another, messages come and are deleted ten at a time.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import torch
from load.compare.task import BATCH, Results, decode, make_model, preprocess
from load.compare.workers import Options, answer, client, options

HELD = 200
"""Messages in hand at once; at 150 ms a download and 50 ms a callback that is enough for 1,000 a second."""
RECEIVERS = 3
DECODERS = 2
DOWNLOADS = 100
MAX_WAIT_S = 0.02
Sample = tuple[torch.Tensor, asyncio.Future[dict[str, Any]]]


class Worker:
    """All of it; create it inside the event loop."""

    def __init__(self, given: Options) -> None:
        self._url = given.queue_url
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(HELD)
        self._downloads = asyncio.Semaphore(DOWNLOADS)
        self._samples: asyncio.Queue[Sample] = asyncio.Queue(4 * BATCH)
        self._deletes: queue.Queue[str] = queue.Queue()
        self._inference = ThreadPoolExecutor(1, "inference")
        self._model = self._inference.submit(make_model, given.load).result()  # warm before a decoder sets its threads
        self._decoders = ThreadPoolExecutor(DECODERS, "decode", initializer=torch.set_num_threads, initargs=(1,))
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Work until the process is ended."""
        for _ in range(RECEIVERS):
            threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._delete, daemon=True).start()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            await self._batches()

    def _receive(self) -> None:
        sqs = client()
        while True:
            for _ in range(10):
                self._room.acquire()
            messages = sqs.receive_message(QueueUrl=self._url, MaxNumberOfMessages=10, WaitTimeSeconds=20).get(
                "Messages", []
            )
            for _ in range(10 - len(messages)):
                self._room.release()
            self._loop.call_soon_threadsafe(self._start, messages)

    def _start(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            task = self._loop.create_task(self._one(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, message: dict[str, Any]) -> None:
        """One message from receive to delete; whatever fails, SQS brings it again."""
        try:
            request = json.loads(message["Body"])
            async with self._downloads, self._session.get(request["image_url"]) as response:
                response.raise_for_status()
                data = await response.read()
            sample = await self._loop.run_in_executor(self._decoders, _decode, data)
            done: asyncio.Future[dict[str, Any]] = self._loop.create_future()
            await self._samples.put((sample, done))
            result = await done
            async with self._session.post(request["callback_url"], json=answer(request, result)) as response:
                response.raise_for_status()
            self._deletes.put(message["ReceiptHandle"])
        except Exception as error:
            print(f"{message['MessageId']}: {error!r}", flush=True)
        finally:
            self._room.release()

    async def _batches(self) -> None:
        """Full batches under load; otherwise what came within the wait. The next is gathered while one is computed."""
        running: asyncio.Future[None] | None = None
        while True:
            batch = [await self._samples.get()]
            try:
                async with asyncio.timeout(MAX_WAIT_S):
                    while len(batch) < BATCH:
                        batch.append(await self._samples.get())
            except TimeoutError:
                pass
            if running is not None:
                await running
            running = asyncio.ensure_future(self._process(batch))

    async def _process(self, batch: list[Sample]) -> None:
        try:
            results = await self._loop.run_in_executor(self._inference, self._infer, [sample for sample, _ in batch])
        except Exception as error:
            for _, done in batch:
                done.set_exception(error)
            return
        for (_, done), result in zip(batch, results, strict=True):
            done.set_result(result)

    def _infer(self, samples: list[torch.Tensor]) -> Results:
        return self._model(torch.stack(samples))

    def _delete(self) -> None:
        """Ten at a time, or what there is after half a second."""
        sqs = client()
        while True:
            receipts = [self._deletes.get()]
            try:
                while len(receipts) < 10:
                    receipts.append(self._deletes.get(timeout=0.5))
            except queue.Empty:
                pass
            entries = [{"Id": str(n), "ReceiptHandle": receipt} for n, receipt in enumerate(receipts)]
            sqs.delete_message_batch(QueueUrl=self._url, Entries=entries)


def _decode(data: bytes) -> torch.Tensor:
    return preprocess(decode(data))


async def main() -> None:
    await Worker(options(__doc__)).run()


if __name__ == "__main__":
    asyncio.run(main())
