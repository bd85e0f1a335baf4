"""What the world itself can serve: a worker that does nothing with what it gets.

Ten messages at a time by plain sockets: one receive, ten pictures, ten callbacks, one batch of deletes. Requests of a
kind go out together and are read afterwards, so that the world always has some to work on.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from load.compare.measure import Peer, world
from load.compare.task import LOADS

CLIENTS = 2
"""Threads; reading gives up the GIL, and two keep the world busy."""
TOGETHER = 10
READ = 1 << 20


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Of the world, with a core of its own as far as the client leaves it one."""

    images_s: float
    cpu_ms: float
    """CPU time of the world's process per image."""


def measure_ceiling(seconds: float) -> Ceiling:
    """Run as many messages through a world without latencies as it can serve."""
    with world(LOADS["cpu"]) as peer:
        until = time.monotonic() + seconds
        before = peer.counts()
        clients = [threading.Thread(target=_client, args=(peer, until)) for _ in range(CLIENTS)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        after = peer.counts()
    images = after["deletes"] - before["deletes"]
    return Ceiling(images / (after["at"] - before["at"]), 1000 * (after["cpu"] - before["cpu"]) / images)


class Line:
    """One connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ)
        self._buffer = bytearray(READ)

    def send(self, path: str, body: str | None = None, target: str = "") -> None:
        line = "GET" if body is None else "POST"
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        target = f"X-Amz-Target: AmazonSQS.{target}\r\n" if target else ""
        self._socket.sendall(f"{line} {path} HTTP/1.1\r\nHost: world\r\n{target}{length}\r\n{body or ''}".encode())

    def read(self) -> bytes:
        """The body of the response. It is copied only where it came in one piece, as JSON does."""
        size = self._socket.recv_into(self._buffer)
        end = self._buffer.index(b"\r\n\r\n") + 4
        start = self._buffer.index(b"Content-Length: ") + 16
        whole = end + int(self._buffer[start : end - 4])
        first, got = bytes(self._buffer[end:size]) if size == whole else b"", size
        while got < whole:
            size = self._socket.recv_into(self._buffer)
            if not size:
                raise ConnectionError("the world closed the connection")
            got += size
        return first

    def close(self) -> None:
        self._socket.close()


def _client(peer: Peer, until: float) -> None:
    sqs, lines = Line(peer.port), [Line(peer.port) for _ in range(TOGETHER)]
    while time.monotonic() < until:
        sqs.send("/", json.dumps({"MaxNumberOfMessages": TOGETHER}), "ReceiveMessage")
        messages = json.loads(sqs.read())["Messages"]
        requests = [json.loads(message["Body"]) for message in messages]
        for line, request in zip(lines, requests, strict=True):
            line.send(urlsplit(request["image_url"]).path)
        for line in lines:
            line.read()
        for line, request in zip(lines, requests, strict=True):
            line.send("/callback", json.dumps({"id": request["id"], "status": "ok", "result": {}}))
        for line in lines:
            line.read()
        entries = [{"Id": str(n), "ReceiptHandle": each["ReceiptHandle"]} for n, each in enumerate(messages)]
        sqs.send("/", json.dumps({"Entries": entries}), "DeleteMessageBatch")
        sqs.read()
    for line in (sqs, *lines):
        line.close()
