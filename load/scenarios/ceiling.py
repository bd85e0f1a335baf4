"""What the world around the workers can do by itself, so that nobody takes its limit for theirs.

Measured at the start of each run, before there are workers: pictures served and callbacks taken by plain sockets, and
messages sent, received and deleted, ten a call, by the client that the generator has.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from load.compare.ceiling import Line
from load.scenarios.broker import Broker, connect, create_queue
from load.scenarios.world import QUEUE, Peer, world

from cvworker.sqs.wire import caller

CLIENTS = 2
TOGETHER = 10


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Messages a second. None where it was not measured: a real queue is not loaded to find out."""

    host: float
    """Pictures served, each with a callback taken, without latencies and errors."""
    queue: float | None
    """Sent, received and deleted."""


def measure(broker: Broker, folder: Path, seconds: float) -> Ceiling:
    """Two stretches of ``seconds``, with a world of its own: what the run counts is not touched."""
    with world(folder) as peer:
        host = _host(peer, sorted(path.name for path in folder.iterdir()), seconds)
        if broker.kind == "own":
            return Ceiling(host, None)
        if broker.kind == "fast":
            return Ceiling(host, _queue(peer.base, peer.base + QUEUE, seconds))
    endpoint = broker.environment["AWS_ENDPOINT_URL"]
    return Ceiling(host, _queue(endpoint, create_queue(endpoint, "ceiling"), seconds))


def _host(peer: Peer, names: list[str], seconds: float) -> float:
    done = [0] * CLIENTS
    answer = json.dumps({"id": "ceiling-0", "status": "ok", "result": {}})

    def client(place: int) -> None:
        until, lines = time.monotonic() + seconds, [Line(peer.port) for _ in range(TOGETHER)]
        while time.monotonic() < until:
            for number, line in enumerate(lines):
                line.send(f"/i/{names[(done[place] + number) % len(names)]}" if names else "/counts")
            for line in lines:
                line.read()
            for line in lines:
                line.send("/answers/ceiling", answer)
            for line in lines:
                line.read()
            done[place] += TOGETHER
        for line in lines:
            line.close()

    return _rate(client, done)


def _queue(endpoint: str, url: str, seconds: float) -> float:
    done = [0] * CLIENTS
    call = caller(*connect(endpoint))
    body = json.dumps({"id": "ceiling", "image_url": "http://127.0.0.1:1/i/1", "callback_url": "http://127.0.0.1:1/"})
    entries = [{"Id": str(number), "MessageBody": body} for number in range(TOGETHER)]

    def client(place: int) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            call("SendMessageBatch", {"QueueUrl": url, "Entries": entries})
            got = call("ReceiveMessage", {"QueueUrl": url, "MaxNumberOfMessages": TOGETHER}).get("Messages", [])
            handles = [{"Id": str(n), "ReceiptHandle": each["ReceiptHandle"]} for n, each in enumerate(got)]
            if handles:
                call("DeleteMessageBatch", {"QueueUrl": url, "Entries": handles})
            done[place] += len(handles)

    try:
        return _rate(client, done)
    finally:
        call.close()


def _rate(client: Callable[[int], None], done: list[int]) -> float:
    began = time.monotonic()
    threads = [threading.Thread(target=client, args=(place,)) for place in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - began)
