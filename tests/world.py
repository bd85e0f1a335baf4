"""What end-to-end tests run in: a queue over a socket, an image host, a callback receiver, and worker processes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from load.scenarios.broker import ministack
from PIL import Image

from cvworker.embedded.image_host import ImageHost
from cvworker.embedded.receiver import CallbackReceiver
from cvworker.embedded.sqs import EmbeddedSqs

BIN = Path(sys.executable).parent
MODULES = Path(__file__).parent / "modules"
MEAN = f"{MODULES / 'mean.py'}:Mean"


def poll(condition: Callable[[], Any], timeout: float, what: str = "") -> Any:
    """Wait until ``condition()`` is true, and return what it gave; fail after ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        time.sleep(0.02)
    return found


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour for each of 65,536 pictures: what their answers must show."""
    return number % 256, number // 256 % 256, 77


def picture(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour_of(number)).save(file, "PNG")
    return file.getvalue()


class MiniStack:
    """MiniStack's SQS: a second peer, fast at any depth."""

    def __enter__(self) -> MiniStack:
        self._running = ministack()
        _, self.endpoint = self._running.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        return boto3.Session().client(
            "sqs",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(max_pool_connections=16),
        )

    def create_queue(self, name: str, *, visibility_timeout: int = 30, max_receives: int | None = 5) -> str:
        client = self.client()
        attributes = {"VisibilityTimeout": str(visibility_timeout)}
        if max_receives is not None:
            dead = client.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
            arn = client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
            attributes["RedrivePolicy"] = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": max_receives})
        return str(client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])


class WorkerProcess:
    """A ``cvworker run`` of its own, as a user starts it."""

    def __init__(self, environment: Mapping[str, str], *flags: str, log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [BIN / "cvworker", "run", "--http-port", "0", *flags],
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
            )

    def url(self) -> str:
        found = poll(lambda: re.search(r'"url": "(http[^"]+)"', self.text()) or self._ended(), 60, "an address")
        return str(found[1])

    def ready(self, timeout: float = 90) -> WorkerProcess:
        url = self.url()
        poll(lambda: status_of(url + "readyz") == 200 or self._ended(), timeout, "ready")
        return self

    def status(self) -> dict[str, Any]:
        return dict(json.loads(fetch(self.url() + "status.json")))

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 where it is not there yet."""
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        for line in fetch(self.url() + "metrics").splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and (match[1] or "") == wanted:
                return float(match[2])
        return 0.0

    def lines(self, event: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [row for row in rows if row.get("event") == event]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text()[-4000:]}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ended(self) -> None:
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}:\n{self.text()[-4000:]}")


class World:
    """One queue, one image host, one receiver; workers started here end with it."""

    def __init__(self, sqs: Any, queue_url: str, images: ImageHost, receiver: CallbackReceiver, folder: Path) -> None:
        self.sqs = sqs
        self.client = sqs.client()
        self.queue_url = queue_url
        self.images = images
        self.receiver = receiver
        self.folder = folder
        self._workers: list[WorkerProcess] = []

    def worker(self, *flags: str, module: str = MEAN, **environment: str) -> WorkerProcess:
        base = {
            **self.sqs.environment(),
            "CVWORKER_QUEUE_URL": self.queue_url,
            "CVWORKER_MODULE": module,
            "CVWORKER_ALLOW_PRIVATE_NETWORKS": "true",
            "CVWORKER_LOG_FORMAT": "json",
            **environment,
        }
        started = WorkerProcess(base, *flags, log=self.folder / f"worker-{len(self._workers)}.log")
        self._workers.append(started)
        return started

    def request(self, number: int, **more: Any) -> dict[str, Any]:
        """A request for picture ``number``, which the host serves from now on."""
        url = self.images.add(f"/{number}.png", picture(number), "image/png")
        return {"id": f"req-{number}", "image_url": url, "callback_url": self.receiver.url + "/answers", **more}

    def send(self, *bodies: Any) -> None:
        for start in range(0, len(bodies), 10):
            entries = [
                {"Id": str(n), "MessageBody": body if isinstance(body, str) else json.dumps(body)}
                for n, body in enumerate(bodies[start : start + 10])
            ]
            answer = self.client.send_message_batch(QueueUrl=self.queue_url, Entries=entries)
            assert not answer.get("Failed"), answer

    def counts(self, url: str | None = None) -> tuple[int, int]:
        """Messages visible and hidden, as the queue says."""
        attributes = self.client.get_queue_attributes(QueueUrl=url or self.queue_url, AttributeNames=["All"])[
            "Attributes"
        ]
        return (
            int(attributes["ApproximateNumberOfMessages"]),
            int(attributes["ApproximateNumberOfMessagesNotVisible"]),
        )

    def right(self, answer: dict[str, Any]) -> bool:
        """Whether an answer of the module ``mean`` belongs to the picture its id names."""
        number = int(answer["id"].removeprefix("req-"))
        return answer["status"] == "ok" and answer["result"]["mean"] == list(colour_of(number))

    def close(self) -> None:
        for each in self._workers:
            if each.process.poll() is None:
                each.kill()


@contextmanager
def world(
    folder: Path, *, sqs: Any = None, name: str = "images", visibility: int = 30, max_receives: int | None = 5
) -> Iterator[World]:
    with ExitStack() as stack:
        peer = stack.enter_context(EmbeddedSqs()) if sqs is None else sqs
        images = stack.enter_context(ImageHost())
        receiver = stack.enter_context(CallbackReceiver())
        queue = peer.create_queue(name, visibility_timeout=visibility, max_receives=max_receives)
        here = World(peer, queue, images, receiver, folder)
        stack.callback(here.close)
        yield here


def fetch(url: str, timeout: float = 10) -> str:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        return str(response.read().decode())


def status_of(url: str, timeout: float = 10) -> int:
    """The status of a GET; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
