"""The world around a worker, in one process: queue, image host and callback receiver.

``python -m load.compare.world`` prints its port and serves until its standard input ends, so it cannot outlive the run
that started it. ``GET /counts`` tells what happened, with this process's own CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field

from load.compare.envelope import celery
from load.compare.http import Connection, response, serve
from load.compare.pictures import COUNT, pictures
from load.compare.sqs import ACCOUNT, Queue

QUEUE = f"/{ACCOUNT}/images"
MOST_TIMED = 1000
"""Answers whose timings are kept: enough for a median, and nothing where pace is measured."""


@dataclass(slots=True)
class Receiver:
    """Where answers go: accepts all of them, and counts."""

    callbacks: int = 0
    errors: int = 0
    """Answers whose status is ``error``."""
    ids: set[str] = field(default_factory=set)
    around_ms: list[float] = field(default_factory=list)
    """Of each answer: from sent to answered, without download, preprocess and process."""

    def take(self, body: bytes) -> None:
        answer = json.loads(body)
        self.callbacks += 1
        self.ids.add(answer["id"])
        if answer.get("status") == "error":
            self.errors += 1
        if len(self.around_ms) < MOST_TIMED and (timings := answer.get("timings_ms")):
            own = sum(timings.get(name, 0.0) for name in ("download", "preprocess", "process"))
            self.around_ms.append(timings["total"] - own)


class World:
    """Queue, host and receiver behind one port; ``image_s`` and ``callback_s`` are their latencies in seconds."""

    def __init__(
        self,
        image_s: float,
        callback_s: float,
        backlog: int | None = None,
        messages: str = "plain",
        every: float = 0.0,
    ) -> None:
        self.image_s, self.callback_s = image_s, callback_s
        self._for_celery = messages == "celery"
        self.queue = Queue(self._body, backlog, every)
        self.receiver = Receiver()
        self._images = {b"/i/%d.jpg" % n: response(data, b"image/jpeg") for n, data in enumerate(pictures())}
        self._accepted = response(b"{}")
        self._base = ""

    async def serve(self, port: int) -> int:
        """Begin; the port."""
        server = await serve(self._handle, port)
        bound = int(server.sockets[0].getsockname()[1])
        self._base = f"http://127.0.0.1:{bound}"
        return bound

    def _body(self, number: int) -> str:
        request = (
            f'{{"id":"request-{number}","image_url":"{self._base}/i/{number % COUNT}.jpg",'
            f'"callback_url":"{self._base}/callback"}}'
        )
        return celery(request, number) if self._for_celery else request

    def _handle(self, connection: Connection, path: bytes, head: bytes, body: bytes) -> None:
        if image := self._images.get(path):
            connection.respond(image, self.image_s)
        elif path == b"/callback":
            self.receiver.take(body)
            connection.respond(self._accepted, self.callback_s)
        elif path == b"/counts":
            connection.respond(response(json.dumps(self.counts()).encode()))
        elif b"AmazonSQS." in head:
            self.queue.handle(connection, head, body)
        else:
            connection.respond(response(b"{}", status=404))

    def counts(self) -> dict[str, float]:
        """What happened so far, and when that was."""
        return {
            "at": time.monotonic(),
            "cpu": time.process_time(),
            "callbacks": self.receiver.callbacks,
            "errors": self.receiver.errors,
            "repeats": self.receiver.callbacks - len(self.receiver.ids),
            "held": self.queue.held,
            "most_held": self.queue.most_held,
            "around_ms": statistics.median(self.receiver.around_ms) if self.receiver.around_ms else 0.0,
            **asdict(self.queue.counts),
        }


async def main() -> None:
    parser = argparse.ArgumentParser("python -m load.compare.world", description=__doc__)
    parser.add_argument("--image-ms", type=float, default=0.0, help="latency of the image host")
    parser.add_argument("--callback-ms", type=float, default=0.0, help="latency of the callback receiver")
    parser.add_argument("--backlog", type=int, help="so many messages and no more (default: endless)")
    parser.add_argument("--messages", choices=("plain", "celery"), default="plain")
    parser.add_argument("--every", type=float, default=0.0, help="seconds from one arrival to the next (default: none)")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    given = parser.parse_args()
    world = World(given.image_ms / 1000, given.callback_ms / 1000, given.backlog, given.messages, given.every)
    port = await world.serve(given.port)
    gc.freeze()  # the pictures live as long as the process
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
