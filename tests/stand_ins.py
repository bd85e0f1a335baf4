"""What stands around a real worker whose stop is tested: a queue, image hosts, a model process, callback receivers.

Each does with a picture what its :class:`Plan` says, and notes what it saw.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import EndpointConnectionError, ReadTimeoutError

from cvworker.arena import Arena, Slot
from cvworker.errors import DownloadInterrupted, ImageNotFound
from cvworker.job import Job
from fakes import FakeSqs, StepClock

VISIBILITY = 60
"""No delay before another try comes near it, so that a call's number tells extensions from all else."""


class JumpClock(StepClock):
    """The system's time, and what a test adds to it."""

    def __init__(self) -> None:
        self.jumped = 0.0

    @property
    def now(self) -> float:
        return time.monotonic() + self.jumped

    def advance(self, seconds: float) -> None:
        self.jumped += seconds


@dataclass(frozen=True)
class Plan:
    """What becomes of one picture at each step: ``slow`` goes on when it is told to, ``hangs`` never does."""

    download: str = "ok"
    model: str = "ok"
    callback: str = "ok"


class Stage:
    """What the stand-ins know of the play, and what they saw."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.jobs: dict[str, Job] = {}
        self.rounds = {"download": 0, "callback": 0}
        self.model: Model | None = None
        self.accepted: set[str] = set()
        self.posted_after_the_end: list[str] = []

    async def turn(self, step: str, how: str) -> None:
        entered = self.rounds[step]
        while how == "hangs" or (how == "slow" and self.rounds[step] == entered):  # noqa: ASYNC110 - several loops
            await asyncio.sleep(0.005)

    @asynccontextmanager
    async def post(self, _url: str, *, headers: dict[str, str], **_: Any) -> AsyncIterator[Any]:
        """The session's method: the receiver of callbacks."""
        key = headers["webhook-id"]
        if self.jobs[key].ended:
            self.posted_after_the_end.append(key)
        how = self.plans[key].callback
        await self.turn("callback", how)
        status = {"refused": 400, "busy": 503, "gone": 410}.get(how, 200)
        if status in (200, 410):
            self.accepted.add(key)
        yield SimpleNamespace(status=status, header=lambda _name: "", has_come=True)


class Fetches:
    """The fetcher: an image is the key of its job."""

    def __init__(self, stage: Stage, _guard: object, arena: Arena, **_: Any) -> None:
        self.stage, self.arena = stage, arena

    async def __aenter__(self) -> Fetches:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def fetch(self, url: str) -> Slot:
        key = url.rpartition("/")[2]
        how = self.stage.plans[key].download
        if how in ("missing", "interrupted"):
            raise ImageNotFound("404") if how == "missing" else DownloadInterrupted("reset")
        slot = await self.arena.take(len(key))
        try:
            slot.write(key.encode())
            await self.stage.turn("download", how)
        except BaseException:
            slot.free()
            raise
        return slot


class Model:
    """The link to a model process that reads its images where the real one does."""

    def __init__(self, stage: Stage, _config: object, arena_fd: int) -> None:
        self.pid, self._stage, self._fd = 1, stage, arena_fd
        self._held: dict[int, str] = {}
        self._frames: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._dead = False
        stage.model = self

    def wait_ready(self, _timeout: float) -> dict[str, Any]:
        return {"name": "threat", "weights": None}

    def frames(self) -> Iterator[dict[str, Any]]:
        return iter(self._frames.get, None)

    def submit(self, jobs: list[tuple[int, int, int, bool]]) -> None:
        with self._lock:
            for number, offset, length, _ in jobs:
                how = self._stage.plans[os.pread(self._fd, length, offset).decode()].model
                if self._dead:
                    return
                if how == "dies":
                    self._frames.put({"started": [number]})
                    self.kill()
                self._held[number] = how
            self._answer("ok", "invalid")

    def go_on(self) -> None:
        self._answer("slow")

    def stop(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        self.go_on()
        while self._held and not self._dead and time.monotonic() < until:
            time.sleep(0.005)
            self.go_on()
        self.kill()

    def kill(self, *, dump: bool = False) -> None:
        with self._lock:
            self._dead = True
            self._frames.put(None)

    def how_it_ended(self) -> str:
        return "SIGKILL"

    def close(self) -> None:
        pass

    def _answer(self, *which: str) -> None:
        with self._lock:
            ready = {number: how for number, how in self._held.items() if how in which and not self._dead}
            errors = {"invalid": ["ImageInvalid", "no image"]}
            rows = [[number, 1.0, 1.0, {"label": "cat"}, errors.get(how)] for number, how in ready.items()]
            self._held = {number: how for number, how in self._held.items() if number not in ready}
            if rows:
                self._frames.put({"done": rows, "busy": 0.01})


class Sqs(FakeSqs):
    """A queue that can be away, and that remembers which of its messages it could be told the end of."""

    def __init__(self, clock: JumpClock) -> None:
        super().__init__(clock, visibility=VISIBILITY)
        self.poll_scale = 0.2
        self.trouble: str | None = None
        self.latency = 0.0
        self.lost: set[str] = set()
        self.back = threading.Event()
        self.told: dict[str, bool] = {}

    def receive_message(self, **asked: Any) -> Any:
        self._be_away()
        answer = super().receive_message(**asked)
        if self.trouble:  # the answer is lost: these are hidden, and nobody knows
            self.lost |= {each["ReceiptHandle"] for each in answer.get("Messages", [])}
        self._be_away()
        return answer

    def _batch(self, name: str, entries: list[dict[str, Any]], settle: Callable[..., str | None]) -> dict[str, Any]:
        ends = [each["ReceiptHandle"] for each in entries if each.get("VisibilityTimeout") != VISIBILITY]
        try:
            time.sleep(self.latency)
            self._be_away()
            answer = super()._batch(name, entries, settle)
        except Exception:
            self.told |= dict.fromkeys(ends, False)
            raise
        failed = {int(each["Id"]) for each in answer["Failed"] if each["Code"] == "InternalError"}
        self.told |= {each: index not in failed for index, each in enumerate(ends)}
        return answer

    def _be_away(self) -> None:
        if self.trouble == "unreachable":
            raise EndpointConnectionError(endpoint_url="http://sqs.test")
        if self.trouble == "hangs":
            self.back.wait(60)
            raise ReadTimeoutError(endpoint_url="http://sqs.test")
