"""What is around the steps, once: timing them, and deciding what becomes of a job after each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

from cvworker.answer import WorkerInfo, answer_body
from cvworker.errors import JobError, UrlNotAllowed, without_frames
from cvworker.sqs.outcome import ANSWERED, LOST, RELEASED, End, Outcome
from cvworker.steps.callback import CallbackRefused
from cvworker.steps.hosts import Hosts, host_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cvworker.clock import Clock
    from cvworker.job import Job
    from cvworker.observe.metrics import Metrics
    from cvworker.observe.spans import Traces
    from cvworker.queues import JobQueue
    from cvworker.sqs.custody import Custody
    from cvworker.steps.callback import CallbackSender
    from cvworker.steps.download import Fetcher


class Flow:
    """Moves jobs on: downloaded → inference queue, inferred or failed → results queue, answered → end."""

    def __init__(
        self,
        custody: Custody,
        *,
        inference_queue: JobQueue,
        results_queue: JobQueue,
        metrics: Metrics,
        clock: Clock,
        default_callback: str | None,
    ) -> None:
        self._custody = custody
        self._inference_queue = inference_queue
        self._results_queue = results_queue
        self._metrics = metrics
        self._clock = clock
        self._default_callback = default_callback
        self._log = structlog.get_logger(__name__).bind()  # bound once: a line for each message is written here
        self.info: WorkerInfo | None = None
        self.sender: CallbackSender | None = None
        self.traces: Traces | None = None

    async def download(self, job: Job, fetcher: Fetcher, hosts: Hosts) -> None:
        """One job's download, on a download thread's event loop, when its host's turn comes."""
        if not self._custody.alive(job):
            self.settle(job, LOST)
            return
        if job.error is not None:
            self._metrics.erred(job, job.error)
            await self._results_queue.aput(job)
            return
        url, sender = job.request.callback_url, self.sender
        if url is not None and sender is not None and sender.crowded(url, last=self._custody.last_attempt(job)):
            outcome = self._custody.unanswered(job, sender.paused_for(url))
            self.settle(job, outcome, problem="too many answers wait for the callback's host")
            return
        image_url = job.request.image_url or ""
        error = None
        async with hosts.slot(host_of(image_url)):
            began = time.perf_counter()
            try:
                job.image = await fetcher.fetch(image_url)
            except JobError as failure:
                error = failure.with_traceback(None)
            took = time.perf_counter() - began
        job.timings_ms["download"] = took * 1000
        self._metrics.timed("download", took)
        if self.traces is not None:
            self.traces.downloaded(job, took, error)
        if error is None:
            await self._inference_queue.aput(job)
        elif self._to_be_answered(job, error):
            await self._results_queue.aput(job)

    def inferred(self, jobs: Sequence[Job]) -> None:
        """The model has results. Waits for room: an inference that outruns the callbacks is held back here."""
        for job in jobs:
            self._metrics.timed("preprocess", job.timings_ms["preprocess"] / 1000)
        self._results_queue.put(*jobs)

    def failed(self, job: Job, error: JobError) -> None:
        """Preprocess or process failed for the job."""
        if "preprocess" in job.timings_ms:  # it was process that failed
            self._metrics.timed("preprocess", job.timings_ms["preprocess"] / 1000)
        if self._to_be_answered(job, error):
            self._results_queue.put(job)

    def dropped(self, job: Job) -> None:
        """The lease was lost on the way: the message is somebody else's now."""
        self.settle(job, LOST)

    def surprised(self, job: Job, error: Exception) -> None:
        """A step raised what it should not have: the message is tried again, and nothing is lost."""
        self.settle(job, self._custody.unanswered(job), problem=type(error).__name__)

    async def answer(self, job: Job) -> None:
        """Post one job's answer and settle it."""
        if job.ended or job.lease.lost:
            self.settle(job, LOST)
            return
        url = job.request.callback_url
        if url is None:
            self.settle(job, self._custody.unanswerable(job), problem="no usable callback_url")
            return
        try:
            status = await self._post(job, url)
        except CallbackRefused as refused:
            self.settle(job, self._custody.unanswered(job, refused.retry_after), problem=f"callback: {refused}")
        except UrlNotAllowed as refused:
            self.settle(job, self._custody.unanswerable(job), problem=f"callback_url: {refused}")
        else:
            self._metrics.answered(job.timings_ms)
            self.settle(job, ANSWERED, callback_status=status)

    def release(self, job: Job) -> None:
        """Give a job back untouched, because the worker stops."""
        self.settle(job, RELEASED)

    def settle(self, job: Job, outcome: Outcome, **why: Any) -> None:
        """End a job and write its one line in the log."""
        if job.ended:
            job.drop_image()  # a download that was given up may have ended well at that moment
            return
        self._custody.settle(job, outcome)
        timings = {name: round(value, 1) for name, value in job.timings_ms.items()}
        if self.traces is not None:
            why |= self.traces.end(job, outcome)
        if job.error is not None:
            why["code"] = job.error.code
        if outcome.delay:
            why["again_in_s"] = round(outcome.delay, 1)
        self._log.log(
            20 if outcome.end in (End.ANSWERED, End.RELEASED) else 30,
            outcome.end.value,
            id=job.request.id.encode("ascii", "backslashreplace").decode(),
            message_id=job.lease.message_id,
            attempt=job.lease.attempt,
            **why,
            timings_ms=timings,
        )

    async def _post(self, job: Job, url: str) -> int:
        try:
            return await self._post_to(url, job)
        except UrlNotAllowed as refused:
            if self._default_callback in (None, url):
                raise
            job.result, job.error = None, UrlNotAllowed(f"callback_url: {refused}")
            self._metrics.erred(job, job.error)
            return await self._post_to(self._default_callback or "", job)

    async def _post_to(self, url: str, job: Job) -> int:
        assert self.sender is not None
        body, last = self._body(job), self._custody.last_attempt(job)
        if self.traces is None:
            return (await self.sender.post(url, job.request.key, body, last=last)).status
        with self.traces.callback(job, url) as call:
            sent = await self.sender.post(url, job.request.key, body, last=last, headers=call.headers)
            call.status = sent.status
        return sent.status

    def _body(self, job: Job) -> bytes:
        assert self.info is not None
        lease, timings = job.lease, job.timings_ms
        timings["queue"] = (lease.received_at - lease.sent_at) * 1000
        timings["total"] = (self._clock.wall() - lease.sent_at) * 1000
        try:
            return answer_body(
                job.request,
                result=job.result,
                error=job.error,
                attempt=lease.attempt,
                timings_ms=timings,
                worker=self.info,
            )
        except JobError as error:  # the result cannot be written
            job.result, job.error = None, error
            return self._body(job)

    def _to_be_answered(self, job: Job, error: JobError) -> bool:
        """Take note of an error; True if the client is to be told of it now."""
        self._metrics.erred(job, error)
        job.error = without_frames(error)
        outcome = self._custody.verdict(job, error)
        if outcome is None:
            return True
        self.settle(job, outcome, problem=error.message)
        return False
