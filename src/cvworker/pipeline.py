"""One of several pipelines in a container: an ordinary worker, with a line to its supervisor in place of a port.

The line is one end of a socket pair. It brings the settings, then ``report N`` and ``stop``; reports go back as JSON,
one a line. Nothing else has to be there for it: no file, no port, no permission. And where it ends, the supervisor has
ended, however it did.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog

from cvworker import __version__
from cvworker.errors import StartupError
from cvworker.observe.logs import configure
from cvworker.service import Service
from cvworker.settings import Settings
from cvworker.worker import Worker

LATE_S = 5.0
"""Beyond ``shutdown_grace``, for a worker whose supervisor is gone: nobody is left who would end it."""

log = structlog.get_logger(__name__)


class Pipeline(Service):
    """A worker without endpoints, told when to stop and asked how it is over the line."""

    def __init__(self, settings: Settings, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(settings)
        self._reader = reader
        self._writer = writer

    async def run(self) -> int:
        listening = asyncio.create_task(self._listen())
        try:
            return await super().run()
        except StartupError as error:
            self._say({"unusable": str(error)})
            return 2
        finally:
            listening.cancel()
            self._say(self._report())  # what was counted to the end
            try:
                await self._writer.drain()
                self._writer.close()
                await self._writer.wait_closed()
            except OSError:
                pass

    @asynccontextmanager
    async def _surrounded(self, worker: Worker) -> AsyncIterator[None]:
        """The supervisor owns the port, and looks after what is the container's: ECS protection, spot notices."""
        log.info("starting", version=__version__, module=self.settings.module, pid=os.getpid())
        yield

    async def _listen(self) -> None:
        try:
            while words := (await self._reader.readline()).split():
                if words[0] == b"report":
                    self._say({**self._report(), "number": int(words[1])})
                else:
                    self._stop()
        except OSError:  # it ended with a report of ours unread, which resets the connection
            pass
        log.warning("the supervisor is gone; stopping")
        self._stop()
        asyncio.get_running_loop().call_later(self.settings.shutdown_grace + LATE_S, os._exit, 1)

    def _signalled(self, name: str) -> None:
        """A second one changes nothing: who signals a whole group signals the supervisor too, and it passes that on."""
        log.info("signal received; stopping", signal=name)
        self._stop()

    def _stop(self) -> None:
        if self.worker is None:  # weights may take half an hour to come, and nothing is held yet
            os._exit(0)
        self._stop_asked.set()

    def _report(self) -> dict[str, Any]:
        return {
            "problems": self.health.problems(),
            "missing": self.health.missing() if self.worker else ["starting"],
            "status": self.status() if self.worker else None,
            "metrics": self.metrics_text().decode(),
        }

    def _say(self, frame: dict[str, Any]) -> None:
        self._writer.write(json.dumps(frame).encode() + b"\n")


async def _run(line: socket.socket) -> int:
    reader, writer = await asyncio.open_unix_connection(sock=line)
    first = await reader.readline()
    if not first:
        return 0
    number, settings = pickle.loads(bytes.fromhex(first.decode()))  # noqa: S301 - the supervisor's own
    configure(settings.log_format, settings.log_level, pipeline=number)
    return await Pipeline(settings, reader, writer).run()


def main() -> None:
    """Run as ``python -m cvworker.pipeline DESCRIPTOR``."""
    code = asyncio.run(_run(socket.socket(fileno=int(sys.argv[1]))))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as `cvworker run` does: a thread that still waits for a slow S3 must not hold up the end


if __name__ == "__main__":
    main()
