"""What stands around the proof's workers: an SQS over a socket, an image host and a receiver of callbacks."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from botocore.config import Config
from load.proof.queue import FairQueue
from numpy.typing import NDArray
from PIL import Image

from cvworker.embedded.demo_worker import DemoWorker, free_port
from cvworker.embedded.image_host import ImageHost
from cvworker.embedded.receiver import CallbackReceiver

Floats = NDArray[np.float64]

ROOT = Path(__file__).parents[2]
MODULE = f"{Path(__file__).with_name('module.py')}:Waiting"
WIDTH, HEIGHT = 640, 480
SENDERS = 16
READY_S = 120.0
VISIBILITY_S = 60
_AWS = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "proof",
    "AWS_SECRET_ACCESS_KEY": "proof",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class World:
    """One queue, one host, one receiver; :meth:`workers` run as long as their block does."""

    def __init__(self, queue: FairQueue, images: ImageHost, receiver: CallbackReceiver, folder: Path) -> None:
        self._endpoint, self._queue = queue.url, queue.queue_url
        self._receiver, self._folder = receiver, folder
        self._client = boto3.session.Session().client(
            "sqs",
            endpoint_url=queue.url,
            region_name=_AWS["AWS_DEFAULT_REGION"],
            aws_access_key_id=_AWS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_AWS["AWS_SECRET_ACCESS_KEY"],
            config=Config(max_pool_connections=SENDERS),
        )
        self._image = images.add("/picture.jpg", _picture())
        self._sent = 0

    @contextmanager
    def workers(self, count: int) -> Iterator[None]:
        """So many ``cvworker run``, ready when the block begins, and gone when it ends."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("CVWORKER_", "AWS_"))}
        settings = {
            "QUEUE_URL": self._queue,
            "MODULE": MODULE,
            "DEVICE": "cpu",
            "PRECISION": "fp32",
            "OPTIMIZE": "off",
            "PREPROCESS_WORKERS": "1",
            "ALLOWED_HOSTS": "127.0.0.1",
            "LOG_FORMAT": "json",
        }
        with ExitStack() as stack:
            started = []
            for number in range(count):
                port = free_port()
                environment = {
                    **own,
                    **_AWS,
                    "AWS_ENDPOINT_URL_SQS": self._endpoint,
                    "PYTHONPATH": str(ROOT),
                    **{f"CVWORKER_{name}": value for name, value in settings.items()},
                    "CVWORKER_HTTP_PORT": str(port),
                }
                worker = DemoWorker(
                    environment, log=self._folder / f"worker-{number}.log", url=f"http://127.0.0.1:{port}/"
                )
                stack.callback(worker.close, 30.0)
                started.append(worker)
            for worker in started:
                _until(lambda worker=worker: worker.check() or worker.ready(), READY_S, "a worker is ready")
            yield

    def offer(self, arrivals: Sequence[float]) -> tuple[Floats, Floats, list[dict[str, Any]]]:
        """Send a message at each of these times, seconds from now, whatever becomes of the others.

        Seconds from the intended times until the callbacks came, and by how much each was sent late, in order; and the
        answers. Returns when all are answered.
        """
        self._receiver.clear()
        base, self._sent = self._sent, self._sent + len(arrivals)
        late = np.zeros(len(arrivals))
        began = time.monotonic() + 0.5

        def send(number: int) -> None:
            body = {"id": str(number), "image_url": self._image, "callback_url": self._receiver.url + "/answers"}
            late[number - base] = time.monotonic() - began - arrivals[number - base]
            self._client.send_message(QueueUrl=self._queue, MessageBody=json.dumps(body))

        with ThreadPoolExecutor(SENDERS) as pool:
            for offset, at in enumerate(arrivals):
                time.sleep(max(0.0, began + at - time.monotonic()))
                pool.submit(send, base + offset)
        if not self._receiver.wait_for(len(arrivals), 300):
            raise RuntimeError(f"{self._receiver.count} of {len(arrivals)} were answered; logs in {self._folder}")
        answered = np.full(len(arrivals), np.nan)
        found = self._receiver.accepted
        for each in found:
            place = int(each.id or 0) - base
            answered[place] = np.fmin(answered[place], each.monotonic - began)
        return answered - np.asarray(arrivals), late, [each.json for each in found]


@contextmanager
def world(folder: Path, seed: int) -> Iterator[World]:
    """Everything but the workers; ``seed`` is of the queue's chance."""
    with FairQueue(visibility=VISIBILITY_S, seed=seed) as queue, ImageHost() as images, CallbackReceiver() as receiver:
        yield World(queue, images, receiver, folder)


def _picture() -> bytes:
    """A photo-like JPEG: smooth shades, some noise."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    shades = np.stack([x * 255 / WIDTH, y * 255 / HEIGHT, (x + y) * 255 / (WIDTH + HEIGHT)], axis=2)
    noisy = shades + np.random.default_rng(1).normal(0, 6, shades.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def _until(condition: Any, seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)
