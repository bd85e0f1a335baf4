"""Keeps every held message hidden: one thread that extends what is due."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from cvworker.sqs.queue import MAX_BATCH, SQS_ERRORS

if TYPE_CHECKING:
    from cvworker.clock import Clock
    from cvworker.sqs.leases import Lease, LeaseTable
    from cvworker.sqs.queue import Queue

TICK_S = 1.0
"""Looks at the table at least this often; sooner when something is due sooner."""

log = structlog.get_logger(__name__)


class Heartbeat:
    """Extends leases, the first to expire first, ten a call; started first and stopped last."""

    def __init__(
        self,
        queue: Queue,
        leases: LeaseTable,
        clock: Clock,
        counted: Callable[[str, int], None] = lambda _what, _n: None,
    ) -> None:
        self._queue = queue
        self._leases = leases
        self._clock = clock
        self._counted = counted
        self._stop = threading.Event()
        self._failures = 0
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(1)  # a call under way to an SQS that does not answer is not waited for

    def beat(self) -> None:
        """Extend everything that is due now, and let go of what has been held for too long."""
        for lease in self._leases.let_go():
            self._counted("let_go", 1)
            log.warning("let go: held for max_lease", message_id=lease.message_id)
        due = self._leases.due()
        for start in range(0, len(due), MAX_BATCH):
            with self._leases.visibility_calls:
                self._extend(self._leases.still(due[start : start + MAX_BATCH]))

    def _extend(self, part: list[tuple[Lease, str]]) -> None:
        if not part:
            return
        called_at = self._clock.monotonic()
        seconds = int(self._leases.visibility)
        try:
            failed = {f.index: f for f in self._queue.change_visibility([(receipt, seconds) for _, receipt in part])}
        except SQS_ERRORS as error:
            self._failures += 1
            log.warning("leases could not be extended", messages=len(part), error=str(error).splitlines()[0])
            return
        self._failures = 0
        for index, (lease, receipt) in enumerate(part):
            failure = failed.get(index)
            if failure is None:
                self._leases.extended(lease, receipt, called_at)
                self._counted("extended", 1)
            elif failure.lost and self._leases.lose(lease, receipt):
                self._counted("lost", 1)
                log.warning("lease lost", message_id=lease.message_id, code=failure.code)

    def _run(self) -> None:
        while True:
            pause = TICK_S
            next_due = self._leases.next_due()
            if next_due is not None:
                pause = min(pause, max(next_due - self._clock.monotonic(), 0.05))
            if self._failures:  # jittered, so that a fleet does not come back in step
                pause = max(pause, min(0.2 * 2.0 ** min(self._failures, 4), TICK_S) * random.uniform(0.5, 1))  # noqa: S311
            if self._stop.wait(pause):
                return
            self.beat()
