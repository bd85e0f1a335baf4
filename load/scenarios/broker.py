"""The queue of a load test: MiniStack's, the fast one of the world, or a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from load.scenarios.world import QUEUE, Peer

from cvworker.bench import tree
from cvworker.embedded.demo_worker import free_port
from cvworker.errors import StartupError

KINDS = ("ministack", "fast")
START_S = 60.0
VISIBILITY_S = 30
MAX_RECEIVES = 5


@dataclass(frozen=True, slots=True)
class Broker:
    """A queue that is there: its URL, what a process needs in its environment to speak to it, and its own process."""

    kind: str
    url: str
    environment: Mapping[str, str]
    pid: int | None = None
    note: str = ""


def local(endpoint: str) -> dict[str, str]:
    """With these, boto3 in any process speaks to ``endpoint`` and to nothing else, whatever the user's own say."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_SQS": endpoint,
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "load",
        "AWS_SECRET_ACCESS_KEY": "load",
        "AWS_SESSION_TOKEN": "",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@contextmanager
def broker(kind: str, url: str | None, peer: Peer) -> Iterator[Broker]:
    """The queue that was asked for, as long as the block runs; ``url`` is one's own. Raises StartupError."""
    if url is not None:
        yield Broker("own", url, {})
    elif kind == "fast" or find_spec("ministack") is None:
        note = "" if kind == "fast" else "MiniStack is not installed (pip install ministack): the fast queue is used"
        yield Broker("fast", peer.base + QUEUE, local(peer.base), note=note)
    else:
        with ministack() as (pid, endpoint):
            yield Broker("ministack", create_queue(endpoint, "images"), local(endpoint), pid)


@contextmanager
def ministack() -> Iterator[tuple[int, str]]:
    """MiniStack's SQS, as long as the block runs: its process and its endpoint. Raises StartupError."""
    port = free_port()
    environment = {**os.environ, "SERVICES": "sqs", "GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ministack"],
        env=environment | {"LOG_LEVEL": "ERROR"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START_S
        while not _answers(endpoint):
            if process.poll() is not None or time.monotonic() > until:
                raise StartupError("queue: MiniStack did not start; --queue fast needs nothing installed")
            time.sleep(0.05)
        yield process.pid, endpoint
    finally:
        tree.end(process.pid)
        process.wait()


def connect(endpoint: str) -> tuple[boto3.Session, Any]:
    """A session, and a client made from it, for a queue on this machine."""
    session = boto3.Session("load", "load", region_name="us-east-1")  # emulators take any
    return session, session.client("sqs", endpoint_url=endpoint)


def create_queue(endpoint: str, name: str) -> str:
    """A queue with dead letters; its URL."""
    _, sqs = connect(endpoint)
    dead = sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": str(MAX_RECEIVES)})
    attributes = {"VisibilityTimeout": str(VISIBILITY_S), "RedrivePolicy": policy}
    return str(sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])


def _answers(endpoint: str) -> bool:
    try:
        connect(endpoint)[1].list_queues()
    except (BotoCoreError, ClientError):
        return False
    return True
