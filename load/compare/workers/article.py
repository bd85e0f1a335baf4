"""The worker that the article behind this project arrives at: threads for I/O, a DataLoader, batches of 8.

Ten threads download, three receive and three post and delete, a DataLoader of two processes decodes and preprocesses,
one thread runs the model, and queues of 300 stand between them.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import requests
import torch
from load.compare.task import BATCH, decode, make_model, preprocess
from load.compare.workers import Options, answer, client, options
from torch.utils.data import DataLoader, IterableDataset

QUEUE_SIZE = 300
DOWNLOADERS = 10
RECEIVERS = CALLBACKS = 3
LOADER_WORKERS = 2

Message = dict[str, Any]


class Images(IterableDataset[dict[str, Any]]):
    """Samples, from the bytes that the download threads put into a queue between processes."""

    def __init__(self, source: multiprocessing.Queue[tuple[str, bytes]]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            message, data = self._source.get()
            yield {"message": message, "sample": preprocess(decode(data)).contiguous()}


class Worker:
    """The queues, and the loops of the threads between them."""

    def __init__(self, given: Options) -> None:
        self._url, self._load = given.queue_url, given.load
        self._messages: queue.Queue[Message] = queue.Queue(QUEUE_SIZE)
        self._images: multiprocessing.Queue[tuple[str, bytes]] = multiprocessing.Queue(QUEUE_SIZE)
        self._results: queue.Queue[tuple[Message, dict[str, Any]]] = queue.Queue(QUEUE_SIZE)

    def run(self) -> None:
        """Work until the process is ended."""
        loader = DataLoader(Images(self._images), batch_size=BATCH, num_workers=LOADER_WORKERS)
        batches = iter(loader)  # forks its processes, while there are no threads yet
        loops = [self._receive] * RECEIVERS + [self._download] * DOWNLOADERS + [self._call_back] * CALLBACKS
        for loop in loops:
            threading.Thread(target=_forever, args=(loop,), daemon=True).start()
        model = make_model(self._load)
        for batch in batches:
            for message, result in zip(batch["message"], model(batch["sample"]), strict=True):
                self._results.put((json.loads(message), result))

    def _receive(self) -> None:
        sqs = client()
        while True:
            found = sqs.receive_message(QueueUrl=self._url, MaxNumberOfMessages=10, WaitTimeSeconds=20)
            for message in found.get("Messages", []):
                self._messages.put({"receipt": message["ReceiptHandle"], **json.loads(message["Body"])})

    def _download(self) -> None:
        http = requests.Session()
        while True:
            message = self._messages.get()
            image = http.get(message["image_url"], timeout=20)
            image.raise_for_status()
            self._images.put((json.dumps(message), image.content))

    def _call_back(self) -> None:
        sqs, http = client(), requests.Session()
        while True:
            message, result = self._results.get()
            http.post(message["callback_url"], json=answer(message, result), timeout=15).raise_for_status()
            sqs.delete_message(QueueUrl=self._url, ReceiptHandle=message["receipt"])


def _forever(loop: Callable[[], None]) -> None:
    """A message that fails comes again by itself; its thread goes on."""
    while True:
        try:
            loop()
        except Exception as error:
            print(repr(error), flush=True)


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("fork")
    Worker(options(__doc__)).run()
