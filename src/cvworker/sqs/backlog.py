"""How many messages the queue has: asked twice a minute, for people, alerts and CloudWatch."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import structlog

from cvworker.sqs.queue import SQS_ERRORS

if TYPE_CHECKING:
    from cvworker.sqs.queue import Queue

LOOK_S = 30.0
"""SQS' own figures are about a minute old, and each look is a call that is paid for."""

log = structlog.get_logger(__name__)


class Backlog:
    """A thread of its own: a call that hangs delays nothing, and is not waited for."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._stop = threading.Event()
        self.counts: dict[str, int | None] = dict.fromkeys(("visible", "hidden", "delayed"))
        """Messages that may be received, are held by some worker, or wait for their delay; None where not known."""
        self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def look(self) -> None:
        """Ask once. What is not known is told as that, and not by the last figure."""
        try:
            self.counts = {**dict.fromkeys(self.counts), **self._queue.backlog()}
        except SQS_ERRORS as error:
            if self.counts["visible"] is not None:
                log.warning("the queue's length is not known", error=str(error).splitlines()[0])
            self.counts = dict.fromkeys(self.counts)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.look()
            self._stop.wait(LOOK_S)
