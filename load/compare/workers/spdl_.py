"""The same as a pipeline of SPDL's: it brings the event loop, the threads and the queues between the steps.

Needs ``pip install spdl-core``, which is in no requirement of this repository.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import torch
from load.compare.task import BATCH, decode, make_model, preprocess
from load.compare.workers import Options, answer, client, options
from spdl.pipeline import PipelineBuilder

AT_ONCE = 32
"""Downloads, and callbacks, under way."""
DECODERS = 2

Message = dict[str, Any]


class Steps:
    """What the pipeline is built of; each step gives the next what it needs."""

    def __init__(self, given: Options) -> None:
        self._url = given.queue_url
        self._model = make_model(given.load)
        self._deleting = client()
        self._session: aiohttp.ClientSession | None = None

    def receive(self) -> Iterator[list[Message]]:
        sqs = client()
        while True:
            found = sqs.receive_message(QueueUrl=self._url, MaxNumberOfMessages=10, WaitTimeSeconds=20)
            yield [{"receipt": each["ReceiptHandle"], **json.loads(each["Body"])} for each in found.get("Messages", [])]

    async def download(self, message: Message) -> tuple[Message, bytes]:
        async with self._http().get(message["image_url"]) as response:
            response.raise_for_status()
            return message, await response.read()

    def decode(self, item: tuple[Message, bytes]) -> tuple[Message, torch.Tensor]:
        message, data = item
        return message, preprocess(decode(data))

    def infer(self, items: list[tuple[Message, torch.Tensor]]) -> list[tuple[Message, dict[str, Any]]]:
        results = self._model(torch.stack([sample for _, sample in items]))
        return [(message, result) for (message, _), result in zip(items, results, strict=True)]

    async def call_back(self, item: tuple[Message, dict[str, Any]]) -> str:
        message, result = item
        async with self._http().post(message["callback_url"], json=answer(message, result)) as response:
            response.raise_for_status()
        return str(message["receipt"])

    def delete(self, receipts: list[str]) -> int:
        entries = [{"Id": str(n), "ReceiptHandle": receipt} for n, receipt in enumerate(receipts)]
        self._deleting.delete_message_batch(QueueUrl=self._url, Entries=entries)
        return len(receipts)

    def _http(self) -> aiohttp.ClientSession:
        """Made at the first use, because it belongs to the pipeline's event loop."""
        if self._session is None:
            asyncio.get_running_loop()
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._session


def main() -> None:
    """Work until the process is ended."""
    steps = Steps(options(__doc__))
    decoders = ThreadPoolExecutor(DECODERS, initializer=torch.set_num_threads, initargs=(1,))
    pipeline = (
        PipelineBuilder()
        .add_source(steps.receive())
        .disaggregate()
        .pipe(steps.download, concurrency=AT_ONCE)
        .pipe(steps.decode, concurrency=DECODERS, executor=decoders)
        .aggregate(BATCH)
        .pipe(steps.infer, executor=ThreadPoolExecutor(1))
        .disaggregate()
        .pipe(steps.call_back, concurrency=AT_ONCE)
        .aggregate(10)
        .pipe(steps.delete, executor=ThreadPoolExecutor(1))
        .add_sink(4)
        .build(num_threads=2)
    )
    with pipeline.auto_stop():
        for _ in pipeline:
            pass


if __name__ == "__main__":
    main()
