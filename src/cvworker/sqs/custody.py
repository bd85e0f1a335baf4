"""Where messages become jobs and jobs become settled messages: the only part of the flow that knows SQS."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from cvworker.job import Job
from cvworker.messages import parse
from cvworker.sqs.outcome import ANSWERED, LEFT, LOST, UNANSWERABLE_S, End, Outcome, later

if TYPE_CHECKING:
    from types_boto3_sqs.type_defs import MessageTypeDef

    from cvworker.clock import Clock
    from cvworker.errors import JobError
    from cvworker.sqs.leases import Lease, LeaseTable

REMEMBERED = 10_000
"""Answers remembered, so that a redelivery of one is deleted and not answered again."""


class Custody:
    """Holds each message from its receive until it is settled, and decides how.

    ``settle`` is given every outcome; ``to_sqs`` gets one for each message, when all its jobs have ended.
    """

    def __init__(
        self,
        leases: LeaseTable,
        clock: Clock,
        *,
        task: Callable[[], str],
        default_callback: str | None,
        check_url: Callable[[str], object],
        allowed_buckets: Collection[str],
        max_receives: int | None,
        max_attempts: int,
        to_sqs: Callable[[Lease, Outcome], None],
    ) -> None:
        self._leases = leases
        self._clock = clock
        self._task = task
        self._default_callback = default_callback
        self._check_url = check_url
        self._allowed_buckets = allowed_buckets
        self._max_receives = max_receives
        self._max_attempts = max_attempts
        self._to_sqs = to_sqs
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, message: MessageTypeDef) -> list[Job]:
        """Hold a message just received and return the jobs to begin (none for a message held already).

        A request that cannot be worked on is among them, with its ``error`` to be answered.
        """
        attributes = message.get("Attributes", {})
        now = self._clock.wall()
        lease = self._leases.add(
            message["MessageId"],
            message["ReceiptHandle"],
            attempt=int(attributes.get("ApproximateReceiveCount", 1)),
            sent_at=float(attributes.get("SentTimestamp", now * 1000)) / 1000,
            received_at=now,
        )
        if lease is None:
            return []
        requests = parse(
            message.get("Body", ""),
            message_id=lease.message_id,
            task=self._task(),
            default_callback=self._default_callback,
            check_url=self._check_url,
            allowed_buckets=self._allowed_buckets,
        )
        jobs = [Job(request, lease) for request in requests]
        lease.jobs_left = len(jobs)
        if not jobs:
            self._to_sqs(lease, ANSWERED)
        begun = []
        for job in jobs:
            if job.request.key in self._answered:
                self.settle(job, ANSWERED)
            else:
                job.error = job.request.error
                begun.append(job)
        return begun

    def alive(self, job: Job) -> bool:
        """Whether the job is still worth working on."""
        return not job.ended and self._leases.alive(job.lease)

    def last_attempt(self, job: Job) -> bool:
        """Whether SQS will not deliver the message again: an error is the answer now, or there is none."""
        return job.lease.attempt >= (self._max_receives or self._max_attempts)

    def verdict(self, job: Job, error: JobError) -> Outcome | None:
        """What an error means for the job: an outcome, or ``None`` to answer the client with it."""
        if error.retryable and not self.last_attempt(job):
            return later(job.lease.attempt, getattr(error, "retry_after", None) or 0.0)
        return None

    def unanswered(self, job: Job, retry_after: float = 0.0) -> Outcome:
        """What becomes of a job whose callback was not accepted."""
        if self._hopeless(job.lease):
            return Outcome(End.LATER, UNANSWERABLE_S)
        return later(job.lease.attempt, retry_after)

    def unanswerable(self, job: Job) -> Outcome:
        """What becomes of a job that has no usable callback."""
        return Outcome(End.LEFT, UNANSWERABLE_S) if self._hopeless(job.lease) else LEFT

    def settle(self, job: Job, outcome: Outcome) -> None:
        """End a job, once; the message is settled when all its jobs have ended."""
        lease = job.lease
        with self._lock:
            if job.ended:
                return
            job.ended = True
            if outcome.end is End.ANSWERED:
                self._remember(job.request.key)
            lease.outcomes.append(outcome)
            lease.jobs_left -= 1
            ended = lease.jobs_left == 0
        job.drop_image()
        if not ended:
            return
        final = max(lease.outcomes, key=lambda each: (each.rank, each.delay or 0))
        self._to_sqs(lease, LOST if lease.lost and final.end is not End.ANSWERED else final)

    def _hopeless(self, lease: Lease) -> bool:
        return self._max_receives is None and lease.attempt >= self._max_attempts

    def _remember(self, key: str) -> None:
        self._answered[key] = None
        if len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)
