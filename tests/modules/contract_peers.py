"""Peers of the contract tests: a host that misbehaves by path, and a proxy between a worker and its queue."""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

Behaviour = Callable[["Exchange"], None]


class Exchange(BaseHTTPRequestHandler):
    """One request to a server of these tests, with the answers an honest server would not give."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.peer.handle(self)

    do_POST = do_GET

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        os.close(self.connection.detach())

    def drip(self, body: bytes, pause: float) -> None:
        """Send a body so slowly that every single read succeeds in time."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(len(body)):
            self.wfile.write(body[start : start + 1])
            self.wfile.flush()
            if self.server.peer.closed.wait(pause):
                break
        self.hang_up()

    def chunked_without_end(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.server.peer.closed.is_set():
            self.wfile.write(b"1000\r\n" + b"\xff" * 0x1000 + b"\r\n")

    def never(self) -> None:
        self.server.peer.closed.wait(60)
        self.hang_up()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    peer: Peer

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what several tests are about."""


class Peer(ABC):
    """A server on 127.0.0.1 and a free port."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), Exchange)
        self._server.peer = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    @abstractmethod
    def handle(self, exchange: Exchange) -> None:
        """Answer one request, or do worse."""


class OddHost(Peer):
    """Does at each path what it was told; a list is used up first to last, and its last one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.behaviours: dict[str, list[Behaviour]] = {}
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    def on(self, path: str, *behaviours: Behaviour) -> str:
        self.behaviours[path] = list(behaviours)
        return self.url + path

    def picture(self, path: str, body: bytes) -> str:
        return self.on(path, lambda exchange: exchange.reply(200, body))

    def handle(self, exchange: Exchange) -> None:
        path = urlsplit(exchange.path).path
        exchange.body()
        with self._lock:
            behaviours = self.behaviours.get(path, [lambda each: each.reply(404)])
            number = min(self.requests[path], len(behaviours) - 1)
            self.requests[path] += 1
        behaviours[number](exchange)


class SqsProxy(Peer):
    """Passes a worker's calls on to the queue, keeps them, and loses those deletes that a test names."""

    def __init__(self, sqs: Any) -> None:
        super().__init__()
        self.sqs = sqs
        self.calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.messages: dict[str, dict[str, Any]] = {}  # by receipt handle
        self.lose_delete_of: set[str] = set()  # MessageIds
        self.lost: list[str] = []
        self.down = False
        self._upstream = sqs.endpoint.removeprefix("http://")

    def client(self) -> Any:
        return self.sqs.client()

    def create_queue(self, *args: Any, **kwargs: Any) -> str:
        return str(self.sqs.create_queue(*args, **kwargs))

    def environment(self) -> Mapping[str, str]:
        names = {name: self.url for name in self.sqs.environment() if name.startswith("AWS_ENDPOINT_URL")}
        return {**self.sqs.environment(), **names}

    def receives(self, message_id: str) -> list[str]:
        """The receipt handles that one message was received with, oldest first."""
        return [handle for handle, message in self.messages.items() if message["MessageId"] == message_id]

    def operations(self, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(request, answer) for operation, request, answer in list(self.calls) if operation == name]

    def handle(self, exchange: Exchange) -> None:
        body = exchange.body()
        if self.down:
            exchange.hang_up()
            return
        operation = exchange.headers["X-Amz-Target"].rpartition(".")[2]
        request = json.loads(body)
        lost = self._take_lost(operation, request)
        status, raw = 200, json.dumps({"Successful": lost, "Failed": []}).encode()
        if request.get("Entries") != []:
            status, raw = self._pass_on(exchange, json.dumps(request).encode())
            answer = json.loads(raw)
            if lost:
                answer.setdefault("Successful", []).extend(lost)
                raw = json.dumps(answer).encode()
        answer = json.loads(raw)
        for message in answer.get("Messages") or []:
            self.messages[message["ReceiptHandle"]] = message
        self.calls.append((operation, request, answer))
        exchange.reply(status, raw, Content_Type="application/x-amz-json-1.0")

    def _take_lost(self, operation: str, request: dict[str, Any]) -> list[dict[str, str]]:
        """Remove the entries that this proxy pretends to have deleted, once each."""
        if operation != "DeleteMessageBatch":
            return []
        kept, lost = [], []
        for entry in request["Entries"]:
            message_id = self.messages[entry["ReceiptHandle"]]["MessageId"]
            if message_id in self.lose_delete_of:
                self.lose_delete_of.discard(message_id)
                self.lost.append(message_id)
                lost.append({"Id": entry["Id"]})
            else:
                kept.append(entry)
        request["Entries"] = kept
        return lost

    def _pass_on(self, exchange: Exchange, body: bytes) -> tuple[int, bytes]:
        headers = {
            name: value for name, value in exchange.headers.items() if name.lower() not in ("host", "content-length")
        }
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request("POST", exchange.path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def closed_port() -> int:
    """A port of 127.0.0.1 where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
