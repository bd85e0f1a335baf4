"""Deletes and delays, sent ten at a time."""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from cvworker.sqs.outcome import End, Outcome
from cvworker.sqs.queue import MAX_BATCH, SQS_ERRORS, Failed

if TYPE_CHECKING:
    from cvworker.clock import Clock
    from cvworker.observe.spans import Traces
    from cvworker.sqs.leases import Lease
    from cvworker.sqs.queue import Queue

LINGER_S = 0.2
"""How long an ack waits for nine others: far below any visibility timeout, and it saves up to nine calls in ten."""
BACKOFF_CAP_S = 5.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Ack:
    lease: Lease
    outcome: Outcome

    @property
    def deletes(self) -> bool:
        return self.outcome.end is End.ANSWERED


class Acks:
    """One thread that tells SQS how messages ended, and tries again what SQS could not take.

    The lease is extended until then: ``ended`` is called, once for each message, when SQS knows or can never know.
    """

    def __init__(
        self,
        queue: Queue,
        clock: Clock,
        ended: Callable[[Lease, Outcome], None],
        visibility_calls: AbstractContextManager[object] | None = None,
    ) -> None:
        self._queue = queue
        self._clock = clock
        self._ended = ended
        self._visibility_calls = visibility_calls or nullcontext()
        self._waiting: deque[_Ack] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._give_up_at = math.inf
        self._failures = 0
        self.traces: Traces | None = None
        self.thread = threading.Thread(target=self._run, name="acks", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def put(self, lease: Lease, outcome: Outcome) -> None:
        """Settle a message with SQS, soon."""
        ack = _Ack(lease, outcome)
        # A lost handle delays nothing any more, but may still delete, and its client must not be answered twice.
        if not ack.deletes and (lease.lost or outcome.delay is None):
            self._ended(lease, outcome)
            return
        lease.ending = not ack.deletes
        with self._wake:
            self._waiting.append(ack)
            if len(self._waiting) in (1, MAX_BATCH):
                self._wake.notify()

    def stop(self, give_up_at: float) -> None:
        """Flush what waits; give up at ``give_up_at`` (monotonic) if SQS cannot be reached."""
        with self._wake:
            self._stopping, self._give_up_at = True, give_up_at
            self._wake.notify()
        self.thread.join(max(0.0, give_up_at - self._clock.monotonic()) + LINGER_S)

    def _run(self) -> None:
        while batch := self._next():
            all_well = True
            for part in ([a for a in batch if a.deletes], [a for a in batch if not a.deletes]):
                for start in range(0, len(part), MAX_BATCH):
                    all_well &= self._send(part[start : start + MAX_BATCH])
            self._failures = 0 if all_well else self._failures + 1

    def _next(self) -> list[_Ack]:
        """What to send now; empty when there is nothing left and none will come."""
        with self._wake:
            if self._failures and not self._past_giving_up():
                delay = min(0.2 * 2.0 ** min(self._failures, 10), BACKOFF_CAP_S) * random.uniform(0.5, 1)  # noqa: S311
                self._wake.wait(min(delay, max(0.0, self._give_up_at - self._clock.monotonic())))
            while not self._waiting and not self._stopping:
                self._wake.wait()
            if len(self._waiting) < MAX_BATCH and not self._stopping:
                self._wake.wait(LINGER_S)
            # Full calls only, while there are any: what is over goes with the next, or after its own wait.
            count = len(self._waiting) // MAX_BATCH * MAX_BATCH or len(self._waiting)
            return [self._waiting.popleft() for _ in range(count)]

    def _past_giving_up(self) -> bool:
        return self._clock.monotonic() >= self._give_up_at

    def _send(self, acks: list[_Ack]) -> bool:
        """One call; False if some of it must be tried again."""
        receipts = [ack.lease.receipt for ack in acks]
        leases = [ack.lease for ack in acks]
        try:
            with self.traces.settle(leases) if self.traces is not None else nullcontext():
                failed = self._call(acks, receipts)
        except SQS_ERRORS as error:
            log.warning("sqs could not be told", operation="ack", messages=len(acks), error=_one_line(error))
            failed = {i: Failed(i, "", permanent=False) for i in range(len(acks))}
        again = []
        for index, ack in enumerate(acks):
            failure = failed.get(index)
            if ack.lease.receipt != receipts[index] and not self._past_giving_up():
                again.append(ack)  # received again meanwhile: what the old handle was told may have had no effect
            elif failure is None:
                self._ended(ack.lease, ack.outcome)
            elif failure.permanent or failure.lost or self._past_giving_up():
                log.warning("not settled", message_id=ack.lease.message_id, outcome=ack.outcome.end, code=failure.code)
                self._ended(ack.lease, ack.outcome)
            else:
                again.append(ack)
        with self._wake:
            self._waiting.extend(again)
        return not again

    def _call(self, acks: list[_Ack], receipts: list[str]) -> dict[int, Failed]:
        if acks[0].deletes:
            failed = self._queue.delete(receipts)
        else:
            with self._visibility_calls:
                failed = self._queue.change_visibility(
                    [(to, math.ceil(ack.outcome.delay or 0)) for ack, to in zip(acks, receipts, strict=True)]
                )
        return {failure.index: failure for failure in failed}


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
