"""Around the workers, in a process of its own: image host, callback receiver and, where wanted, the fast queue.

``python -m load.scenarios.world --images FOLDER`` prints its port and serves until its standard input ends, so it
cannot outlive the run that started it.

======================  ==============================================================================================
``/i/NAME``             a picture, after the host's latency; some are refused with 503, by ``--image-errors``
``/answers/RUN``        a callback, accepted after the receiver's latency; or refused with 503, by ``--callback-errors``
``/events/RUN``         every callback of a run that was accepted, as a line of JSON, for as long as somebody reads
``/counts``             what happened so far, and this process's own CPU time
======================  ==============================================================================================
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from load.scenarios import latency
from load.scenarios.sent_queue import SentQueue

from cvworker.bench import tree
from cvworker.bench.http import Connection, response, serve
from cvworker.bench.sqs import ACCOUNT
from cvworker.errors import StartupError

ROOT = Path(__file__).parents[2]
QUEUE = f"/{ACCOUNT}/images"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n"
TIMINGS = ("queue", "download", "preprocess", "process", "total")
_REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


class World:
    """What is behind the port. ``image`` and ``callback`` are a latency (see ``latency.py``) and a share of errors."""

    def __init__(
        self, pictures: dict[str, bytes], image: tuple[str, float], callback: tuple[str, float], seed: int
    ) -> None:
        self.queue = SentQueue(seed)
        kind = b"application/octet-stream"
        self._images = {f"/i/{name}".encode(): response(data, kind) for name, data in pictures.items()}
        self._image_s = latency.draws(image[0], seed, "image-latency")
        self._callback_s = latency.draws(callback[0], seed + 1, "callback-latency")
        self._image_errors, self._callback_errors = image[1], callback[1]
        self._random = Random(seed)  # noqa: S311 - not for secrets
        self._readers: dict[bytes, Connection] = {}
        self._counts = {"images": 0, "images_refused": 0, "callbacks": 0, "callbacks_refused": 0}

    def handle(self, connection: Connection, path: bytes, head: bytes, body: bytes) -> None:
        """One request, of whatever kind."""
        if image := self._images.get(path):
            self._counts["images"] += 1
            fails = self._fails(self._image_errors, "images_refused")
            connection.respond(_REFUSED if fails else image, next(self._image_s))
        elif path.startswith(b"/answers/"):
            self._take(connection, path[len(b"/answers/") :], body)
        elif b"AmazonSQS." in head:
            self.queue.handle(connection, head, body)
        elif path.startswith(b"/events/"):
            self._readers[path[len(b"/events/") :]] = connection
            connection.respond(STREAM)
        elif path == b"/counts":
            connection.respond(response(json.dumps(self.counts()).encode()))
        else:
            connection.respond(response(b"{}", status=404))

    def counts(self) -> dict[str, float]:
        """What happened so far; ``at`` is the monotonic clock, ``cpu`` this process's time, both in seconds."""
        queue = {f"queue_{name}": value for name, value in asdict(self.queue.counts).items()}
        return {"at": time.monotonic(), "cpu": time.process_time(), **self._counts, **queue}

    def _take(self, connection: Connection, run: bytes, body: bytes) -> None:
        at = time.monotonic()
        self._counts["callbacks"] += 1
        if self._fails(self._callback_errors, "callbacks_refused"):
            connection.respond(_REFUSED, next(self._callback_s))
            return
        connection.respond(_ACCEPTED, next(self._callback_s))
        if reader := self._readers.get(run):
            answer = json.loads(body)
            code = "ok" if answer["status"] == "ok" else answer["error"]["code"]
            times = [answer["timings_ms"].get(name) for name in TIMINGS]
            told = {"id": answer["id"], "at": at, "code": code, "attempt": answer["attempt"], "ms": times}
            reader.respond(json.dumps(told).encode() + b"\n")

    def _fails(self, share: float, name: str) -> bool:
        failed = share > 0 and self._random.random() < share
        self._counts[name] += failed
        return failed


_ACCEPTED = response(b"{}")


class Peer:
    """The world's process, as those who started it see it."""

    def __init__(self, process: subprocess.Popen[bytes], shown: str) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise StartupError("the image host and the receiver did not start")
        self.pid, self.port = process.pid, int(line)
        self.base = f"http://127.0.0.1:{self.port}"
        self.shown = shown.rstrip("/") if shown else self.base
        """Where the workers find it."""

    def counts(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.base}/counts", timeout=10) as answer:  # noqa: S310
            found: dict[str, float] = json.load(answer)
            return found


@contextmanager
def world(images: Path, options: Sequence[str] = (), shown: str = "") -> Iterator[Peer]:
    """A world of its own with these options; ``shown`` is its address for workers elsewhere, where that is another."""
    command = [sys.executable, "-m", "load.scenarios.world", "--images", str(images), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, process_group=0)
    try:
        yield Peer(process, shown)
    finally:
        tree.end(process.pid)
        process.wait()


async def _run(given: argparse.Namespace) -> None:
    pictures = {path.name: path.read_bytes() for path in sorted(given.images.iterdir()) if path.is_file()}
    image, callback = (given.image_latency, given.image_errors), (given.callback_latency, given.callback_errors)
    here = World(pictures, image, callback, given.seed)
    server = await serve(here.handle, given.port, given.bind)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.collect()
    gc.freeze()  # the pictures live as long as the process
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def add_options(parser: Any) -> None:
    """The options that the scenarios pass on."""
    parser.add_argument("--image-latency", default="0", metavar="MS", help=f"of the image host: {latency.FORMS}")
    parser.add_argument("--image-errors", type=share, default=0.0, metavar="SHARE", help="of requests, answered 503")
    parser.add_argument("--callback-latency", default="0", metavar="MS", help="of the callback receiver")
    parser.add_argument(
        "--callback-errors", type=share, default=0.0, metavar="SHARE", help="of callbacks, refused: 503"
    )


def share(text: str) -> float:
    """A share of at least 0 and below 1."""
    found = float(text)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError("must be at least 0 and below 1")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m load.scenarios.world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder with the pictures, and nothing else")
    add_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
