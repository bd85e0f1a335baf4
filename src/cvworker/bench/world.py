"""What is around a worker that is measured, in one process: queue, image host and callback receiver.

``python -m cvworker.bench.world`` prints its port and serves until its standard input ends, so it cannot outlive the
run that started it. ``GET /counts`` tells what happened, with this process's own CPU time; after ``GET /close`` the
queue gives out nothing new, and what was given out can be seen to end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import hmac
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cvworker.bench.http import Connection, response, serve
from cvworker.bench.sqs import ACCOUNT, Queue
from cvworker.signing import Signer

QUEUE = f"/{ACCOUNT}/images"
SECRET = "whsec_" + base64.b64encode(b"cvworker" * 4).decode()
"""Known to everybody: these answers never leave the machine."""
MOST_TIMED = 1000
"""Answers whose timings are kept: enough for a median, and nothing where pace is measured."""
_SIGNED = re.compile(rb"\r\nwebhook-(id|timestamp|signature): *([^\r]*)", re.IGNORECASE)


def pace(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Answers a second between two :meth:`World.counts`, each taken where the last answer before it came.

    Answers come a batch at a time: by the clock alone, a window of ten batches would be a tenth too long or too short.
    """
    took = after["latest"] - before["latest"]
    return float((after["callbacks"] - before["callbacks"]) / took) if took > 0 else 0.0


def plain(request: str, _number: int) -> str:
    """A request as clients write it into a queue."""
    return request


@dataclass(slots=True)
class Receiver:
    """Where answers go: accepts all of them, and counts. With a ``signer`` it looks at their signatures."""

    signer: Signer | None = None
    callbacks: int = 0
    latest: float = 0.0
    """When the last of them came, by the monotonic clock."""
    errors: int = 0
    """Answers whose status is ``error``."""
    first_error: str = ""
    unsigned: int = 0
    ids: set[str] = field(default_factory=set)
    around_ms: list[float] = field(default_factory=list)
    """Of each answer: from sent to answered, without download, preprocess and process."""

    def take(self, head: bytes, body: bytes) -> None:
        """One answer."""
        answer = json.loads(body)
        self.callbacks += 1
        self.latest = time.monotonic()
        self.ids.add(answer["id"])
        if answer.get("status") == "error":
            self.errors += 1
            self.first_error = self.first_error or "{code}: {message}".format_map(answer["error"])
        if self.signer is not None and not _genuine(self.signer, head, body):
            self.unsigned += 1
        if len(self.around_ms) < MOST_TIMED and (timings := answer.get("timings_ms")):
            own = sum(timings.get(name, 0.0) for name in ("download", "preprocess", "process"))
            self.around_ms.append(timings["total"] - own)


class World:
    """Queue, host and receiver behind one port; ``image_s`` and ``callback_s`` are their latencies in seconds.

    ``backlog`` and ``every`` are the queue's. ``wrap`` makes the body of a message from the request and its number.
    """

    def __init__(
        self,
        pictures: Sequence[bytes],
        image_s: float,
        callback_s: float,
        *,
        backlog: int | None = None,
        every: float = 0.0,
        wrap: Callable[[str, int], str] = plain,
        signer: Signer | None = None,
    ) -> None:
        self.image_s, self.callback_s = image_s, callback_s
        self.queue = Queue(self._body, backlog, every)
        self.receiver = Receiver(signer)
        self._wrap = wrap
        kind = b"application/octet-stream"
        self._images = {b"/i/%d.jpg" % n: response(data, kind) for n, data in enumerate(pictures)}
        self._accepted = response(b"{}")
        self._base = ""

    async def serve(self, port: int) -> int:
        """Begin; the port."""
        server = await serve(self._handle, port)
        bound = int(server.sockets[0].getsockname()[1])
        self._base = f"http://127.0.0.1:{bound}"
        return bound

    def counts(self) -> dict[str, object]:
        """What happened so far, and when that was, in seconds."""
        return {
            "at": time.monotonic(),
            "cpu": time.process_time(),
            "callbacks": self.receiver.callbacks,
            "latest": self.receiver.latest,
            "answered": len(self.receiver.ids),
            "errors": self.receiver.errors,
            "first_error": self.receiver.first_error,
            "unsigned": self.receiver.unsigned,
            "repeats": self.receiver.callbacks - len(self.receiver.ids),
            "given": self.queue.given,
            "held": self.queue.held,
            "most_held": self.queue.most_held,
            "around_ms": statistics.median(self.receiver.around_ms) if self.receiver.around_ms else 0.0,
            **asdict(self.queue.counts),
        }

    def _body(self, number: int) -> str:
        request = (
            f'{{"id":"request-{number}","image_url":"{self._base}/i/{number % len(self._images)}.jpg",'
            f'"callback_url":"{self._base}/callback"}}'
        )
        return self._wrap(request, number)

    def _handle(self, connection: Connection, path: bytes, head: bytes, body: bytes) -> None:
        if image := self._images.get(path):
            connection.respond(image, self.image_s)
        elif path == b"/callback":
            self.receiver.take(head, body)
            connection.respond(self._accepted, self.callback_s)
        elif path == b"/counts":
            connection.respond(response(json.dumps(self.counts()).encode()))
        elif path == b"/close":
            self.queue.closed = True
            connection.respond(self._accepted)
        elif b"AmazonSQS." in head:
            self.queue.handle(connection, head, body)
        else:
            connection.respond(response(b"{}", status=404))


def _genuine(signer: Signer, head: bytes, body: bytes) -> bool:
    """Whether an answer carries the signature that ``signer`` makes."""
    found = {name.lower(): value for name, value in _SIGNED.findall(head)}
    stamp = found.get(b"timestamp", b"")
    if not stamp.isdigit():
        return False
    expected = signer.headers(found.get(b"id", b"").decode(), int(stamp), body)["webhook-signature"]
    return hmac.compare_digest(expected.encode(), found.get(b"signature", b""))


async def run(world: World, port: int = 0) -> None:
    """Serve, its port printed, until standard input ends."""
    print(await world.serve(port), flush=True)
    gc.collect()
    gc.freeze()  # the pictures live as long as the process
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser("python -m cvworker.bench.world", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder with the pictures, and nothing else")
    parser.add_argument("--image-ms", type=float, default=0.0, help="latency of the image host")
    parser.add_argument("--callback-ms", type=float, default=0.0, help="latency of the callback receiver")
    given = parser.parse_args()
    pictures = [path.read_bytes() for path in sorted(given.images.iterdir())]
    world = World(pictures, given.image_ms / 1000, given.callback_ms / 1000, signer=Signer([SECRET]))
    asyncio.run(run(world))


if __name__ == "__main__":
    main()
