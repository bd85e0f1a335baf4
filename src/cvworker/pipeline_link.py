"""The supervisor's side of one pipeline: start its process, ask how it is, end it."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import Process
from typing import Any

from cvworker.clock import Clock
from cvworker.settings import Settings

ASK_TIMEOUT_S = 1.0
"""An endpoint answers with the last report rather than later: who asks for the health waits 3 s by default."""
LINE_LIMIT = 16 * 1024 * 1024
LAST_WORDS_S = 1.0

Report = dict[str, Any]
"""``problems``, ``missing``, ``status`` (None before there is a worker) and ``metrics`` of one pipeline."""


class PipelineLink:
    """One pipeline's process, from its start to its end."""

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, clock: Clock
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._clock = clock
        self._asked = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._reading = asyncio.create_task(self._read())
        self._heard_at = clock.monotonic()
        self.pid = process.pid
        self.report: Report | None = None
        self.running_since: float | None = None
        self.unusable: str | None = None
        """Why it cannot start, in the words for the user."""

    @classmethod
    async def start(cls, number: int, settings: Settings, clock: Clock) -> PipelineLink:
        ours, theirs = socket.socketpair()
        with theirs:
            # In a session of its own, Ctrl-C reaches it as what it is told and not twice. The working directory is
            # no place to import from (-P): a command does not, and this process holds the credentials.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "cvworker.pipeline", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
        writer.write(pickle.dumps((number, settings)).hex().encode() + b"\n")
        return cls(process, reader, writer, clock)

    async def ask(self) -> None:
        """Have a new report, unless it takes too long; :meth:`silent_for` tells."""
        self._asked += 1
        number = self._asked
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._tell(f"report {number}")
        await asyncio.wait([answered], timeout=ASK_TIMEOUT_S)
        self._waiting.pop(number, None)

    def silent_for(self) -> float:
        """Seconds since its last report; before the first it imports, and fetches weights for as long as that takes."""
        return self._clock.monotonic() - self._heard_at if self.report else 0.0

    def stop(self) -> None:
        """Have it stop in order; one that still imports has nothing to put in order."""
        if self.report is None:
            self.kill()
        else:
            self._tell("stop")

    def kill(self) -> None:
        """End it and what it started at once."""
        try:
            os.killpg(self.pid, signal.SIGKILL)  # it leads a group of its own
        except ProcessLookupError:
            pass

    async def ended(self) -> int:
        """Its exit code, once it has ended and all it said is heard; nothing of it is left then."""
        code = await self._process.wait()
        self.kill()
        await asyncio.wait([self._reading], timeout=LAST_WORDS_S)
        self._reading.cancel()
        self._writer.close()
        return code

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError):  # a last line that was cut off
            pass
        finally:
            for each in self._waiting.values():
                _done(each)

    def _take(self, frame: dict[str, Any]) -> None:
        if "unusable" in frame:
            self.unusable = frame["unusable"]
            return
        self.report, self._heard_at = frame, self._clock.monotonic()
        status = frame["status"]
        if self.running_since is None and status and status["state"] != "starting":
            self.running_since = self._heard_at
        if (answered := self._waiting.get(frame.get("number", 0))) is not None:
            _done(answered)

    def _tell(self, words: str) -> None:
        if not self._writer.is_closing():
            self._writer.write(words.encode() + b"\n")


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
