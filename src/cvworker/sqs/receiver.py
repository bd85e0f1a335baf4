"""Long polls, as many messages as there is room for."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from cvworker.sqs.queue import MAX_BATCH, SQS_ERRORS

if TYPE_CHECKING:
    from types_boto3_sqs.type_defs import MessageTypeDef

    from cvworker.clock import Clock
    from cvworker.job import Job
    from cvworker.queues import JobQueue
    from cvworker.sqs.queue import Queue

ROOM_WAIT_S = 0.5
BACKOFF_CAP_S = 30.0

log = structlog.get_logger(__name__)


class Receiver:
    """Threads that receive into ``outbox``, never more than it has room for.

    When the queue is empty one thread keeps polling and the others wait for it to find something: an idle worker
    makes no more calls than one long poll needs. A poll under way when the worker stops is left to return, because a
    cut-off poll may hide messages for a whole visibility timeout.
    """

    def __init__(
        self,
        queue: Queue,
        outbox: JobQueue,
        admit: Callable[[MessageTypeDef], list[Job]],
        *,
        threads: int,
        visibility: int,
        clock: Clock,
        called: Callable[[str, float, int], None] = lambda _outcome, _seconds, _messages: None,
    ) -> None:
        self._queue = queue
        self._outbox = outbox
        self._admit = admit
        self._visibility = visibility
        self._clock = clock
        self._called = called
        self._stop = threading.Event()
        self._busy = threading.Event()
        self._failures = 0
        self.reachable = True
        self.last_error = ""
        self.last_message_at = clock.monotonic()
        self.threads = [
            threading.Thread(target=self._run, args=(n == 0,), name=f"receive-{n}", daemon=True) for n in range(threads)
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Begin no more polls."""
        self._stop.set()
        self._busy.set()

    def join(self, timeout: float) -> bool:
        """Wait for polls under way; False if one has not returned in time."""
        until = self._clock.monotonic() + timeout
        for thread in self.threads:
            thread.join(max(0.0, until - self._clock.monotonic()))
        return not any(thread.is_alive() for thread in self.threads)

    def _run(self, lead: bool) -> None:
        while not self._stop.is_set():
            if not lead and not self._busy.wait(ROOM_WAIT_S):
                continue
            room = self._outbox.reserve(MAX_BATCH, timeout=ROOM_WAIT_S)
            if room and not self._stop.is_set():
                self._poll(room)
            elif room:
                self._outbox.fill([], room)

    def _poll(self, room: int) -> None:
        jobs: list[Job] = []
        began = self._clock.monotonic()
        try:
            messages = self._queue.receive(room, self._visibility)
            self._called("ok", self._clock.monotonic() - began, len(messages))
            self._recovered()
            if messages:
                self.last_message_at = self._clock.monotonic()
                self._busy.set()
                for message in messages:
                    jobs.extend(self._admit(message))
            elif not self._stop.is_set():
                self._busy.clear()
        except SQS_ERRORS as error:
            self._called("error", self._clock.monotonic() - began, 0)
            self._back_off(error)
        finally:
            self._outbox.fill(jobs, room)

    def _recovered(self) -> None:
        if not self.reachable:
            log.info("sqs answers again", failures=self._failures)
        self._failures, self.reachable = 0, True

    def _back_off(self, error: Exception) -> None:
        self._failures += 1
        self.reachable = False
        self.last_error = str(error).splitlines()[0] if str(error) else type(error).__name__
        delay = min(0.5 * 2.0 ** min(self._failures - 1, 10), BACKOFF_CAP_S) * random.uniform(0.5, 1)  # noqa: S311
        log.warning("receive failed", error=self.last_error, again_in_s=round(delay, 1))
        self._stop.wait(delay)
