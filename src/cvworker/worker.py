"""The worker: seven steps, the queues between them, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from cvworker import __version__, weights
from cvworker.answer import WorkerInfo
from cvworker.arena import Arena
from cvworker.clock import Clock
from cvworker.errors import StartupError, UrlNotAllowed, WorkerFailed
from cvworker.flow import Flow
from cvworker.loading import check_spec
from cvworker.model.config import ModelConfig
from cvworker.net import AddressGuard, GuardedSession
from cvworker.observe.metrics import Metrics
from cvworker.observe.traces import open_traces
from cvworker.queues import JobQueue
from cvworker.settings import AUTO, Settings, how_to_set
from cvworker.signing import Signer
from cvworker.sqs.acks import Acks
from cvworker.sqs.backlog import Backlog
from cvworker.sqs.custody import Custody
from cvworker.sqs.heartbeat import Heartbeat
from cvworker.sqs.leases import LeaseTable
from cvworker.sqs.outcome import End, Outcome
from cvworker.sqs.queue import Queue
from cvworker.sqs.receiver import Receiver
from cvworker.steps.callback import RESULT_WAIT_S, TRIES, CallbackSender
from cvworker.steps.download import DownloadThreads, Fetcher
from cvworker.steps.hosts import Hosts
from cvworker.steps.inference import Inference
from cvworker.steps.pool import JobPool
from cvworker.tuning import Tuner, download_threads, preprocess_workers

if TYPE_CHECKING:
    from threading import Thread

    from types_boto3_sqs.type_defs import MessageTypeDef

    from cvworker.job import Job
    from cvworker.sqs.leases import Lease

FIRST_BATCH = 8
"""With ``batch_size: auto``, until the best is known."""
LONG_POLL_S = 10
"""Shorter than SQS's 20 s, because a stop waits for the poll under way: a cut-off one may hide messages."""
DOWNLOAD_CONNECTIONS = 256
IN_HAND_PER_DOWNLOAD = 2
"""Jobs taken for each download under way: those of a slow host wait for their turn, the others pass them by."""
USER_AGENT = f"cvworker/{__version__}"

log = structlog.get_logger(__name__)


class Worker:
    """receive → download → preprocess → process → callback → ack, with every message held by a heartbeat.

    Making one composes the steps, opens the queue and finds what is wrong with the settings; nothing runs yet.

    Raises:
        StartupError: settings or surroundings will not do.
    """

    def __init__(self, settings: Settings, metrics: Metrics, clock: Clock) -> None:
        s = self.settings = settings
        self.metrics = metrics
        self.clock = clock
        require(s, "module", "queue_url")
        self.guard = guard_of(s)
        self._signer = signer_of(s, self.guard)
        self.queue = Queue.open(s.queue_url or "", receive_threads=s.receive_threads, wait_s=long_poll(s))
        self.queue.called = metrics.sqs_called
        self.backlog = Backlog(self.queue)
        self.traces = open_traces(self.queue, os.environ)
        visibility = _visibility(s, self.queue)
        local_weights = weights.local(s.weights, self.guard)

        self.arena = Arena(int(s.max_inflight_bytes))
        self.leases = LeaseTable(visibility, s.max_lease, clock.monotonic)
        self.queues = [JobQueue(name, 1, clock.monotonic) for name in ("download", "inference", "results")]
        self.download_queue, self.inference_queue, self.results_queue = self.queues
        self.tuner = Tuner(
            self.queues,
            max_queue_size=s.max_queue_size,
            concurrency=s.download_concurrency,
            visibility=visibility,
            batch_size=batch_size(s),
        )
        self.heartbeat = Heartbeat(self.queue, self.leases, clock, metrics.lease_event)
        self.acks = Acks(self.queue, clock, self._ended, self.leases.visibility_calls)
        self.acks.traces = self.traces
        self.custody = Custody(
            self.leases,
            clock,
            task=lambda: str(self.inference.ready["name"]),
            default_callback=s.callback_url,
            check_url=self.guard.check_url,
            allowed_buckets={*s.allowed_buckets, *weights.bucket_of(s.weights)},
            max_receives=self.queue.max_receives,
            max_attempts=s.max_attempts,
            to_sqs=self.acks.put,
        )
        self.flow = Flow(
            self.custody,
            inference_queue=self.inference_queue,
            results_queue=self.results_queue,
            metrics=metrics,
            clock=clock,
            default_callback=s.callback_url,
        )
        self.flow.traces = self.traces
        self.receiver = Receiver(
            self.queue,
            self.download_queue,
            self._admit,
            threads=s.receive_threads,
            visibility=visibility,
            clock=clock,
            called=metrics.received,
        )
        threads = download_threads(os.cpu_count() or 1) if s.download_threads == "auto" else s.download_threads
        self.downloaders = DownloadThreads(threads, self._download_loop, self._download_thread_ended)
        self.inference = Inference(
            model_config(s, local_weights, self.arena.size),
            self.arena.fd,
            self.inference_queue,
            clock=clock,
            alive=self.custody.alive,
            done=self.flow.inferred,
            failed=self.flow.failed,
            dropped=self.flow.dropped,
            batch_done=metrics.batch_done,
            brought_back=metrics.restarts.inc,
        )
        self.inference.traced = self.traces.batch if self.traces else None
        metrics.watch_model_process(lambda: self.inference.pid)
        self.answering = JobPool(
            self.results_queue,
            self.flow.answer,
            limit=lambda: self.flow.sender.in_hand_limit() if self.flow.sender else 1,
            surprised=self.flow.surprised,
        )
        self.downloads_under_way: list[Callable[[], int]] = []
        self.downloading: list[tuple[asyncio.AbstractEventLoop, JobPool]] = []
        self.done = 0
        self.busy_until = clock.monotonic()
        """When this worker last had something to do, or will have: its delayed messages count."""
        self.stopping = False
        self.failure: WorkerFailed | None = None

    def warm_up(self) -> None:
        """Start the model process and wait until it can work. Raises StartupError as the module does."""
        ready = self.inference.start()
        if ready.get("warning"):
            log.warning("warm-up failed; the module may dislike its example", reason=ready["warning"])
        self.tuner.batch_size = self.inference.batch_size
        self.flow.info = WorkerInfo(__version__, ready["name"], ready["weights"], ready.get("precision"))

    async def start(self, session: GuardedSession) -> asyncio.Task[None]:
        """Start the steps, the last of the flow first; the task returned is the callbacks'."""
        self.flow.sender = CallbackSender(
            session,
            signer=self._signer,
            timeout=self.settings.callback_timeout,
            clock=self.clock,
            concurrency=self.settings.callback_concurrency,
            called=self.metrics.called_back,
        )
        self.heartbeat.start()
        self.acks.start()
        self.backlog.start()
        answering = asyncio.create_task(self.answering.run())
        self.downloaders.start()
        self.receiver.start()
        return answering

    async def stop(self, answering: asyncio.Task[None]) -> None:
        """Stop in the order of the flow, each step with its share of the grace; what is not begun goes back at once.

        Heartbeats go on to the end: until a message is settled it is held, and what is held must not expire.
        """
        grace, began = self.settings.shutdown_grace, self.clock.monotonic()
        log.info("stopping", held=len(self.leases), grace_s=grace)

        def left(share: float) -> float:
            return max(0.0, began + grace * share - self.clock.monotonic())

        self.stopping = True
        self.backlog.stop()
        self.receiver.stop()  # polls under way return what they find, and _admit gives it back
        self._release(self.download_queue.drain())
        self.download_queue.close()
        if not await asyncio.to_thread(self.downloaders.join, left(0.4)):
            self._give_up_downloads()
        self.inference_queue.close()
        if self.failure:
            self.inference.kill()
        await asyncio.to_thread(self.inference.stop, left(0.6))
        self.results_queue.close()  # a result that waits for room there waits no more
        await asyncio.to_thread(self.inference.join, 1)
        self._release([*self.inference_queue.drain(), *self.inference.held()])
        await asyncio.wait([answering], timeout=left(0.7))
        if not answering.done():
            self._release(self.answering.jobs)
            self.answering.cancel()
        self._release(self.results_queue.drain())
        if not await asyncio.to_thread(self.receiver.join, left(0.75)):
            log.warning("a receive call did not return; what it was given stays hidden for its visibility timeout")
        for queue in self.queues:  # what a step that was given up still handed on
            self._release(queue.drain())
        await asyncio.to_thread(self.acks.stop, self.clock.monotonic() + left(0.85))
        self.heartbeat.stop()
        log.info("stopped", held=len(self.leases), took_s=round(self.clock.monotonic() - began, 1))

    def threads(self) -> list[Thread]:
        """Those that must live as long as the worker does."""
        return [
            self.heartbeat.thread,
            self.acks.thread,
            *self.downloaders.threads,
            *self.receiver.threads,
            *self.inference.threads,
        ]

    def stalled(self) -> str | None:
        """A step that has made no progress for ``stall_timeout`` beyond its own time limit."""
        s = self.settings
        for name, pools, own_limit in (
            ("download", [pool for _, pool in self.downloading], s.download_timeout),
            ("callback", [self.answering], s.callback_timeout * TRIES + RESULT_WAIT_S),
        ):
            oldest = max((pool.oldest() for pool in pools), default=0.0)
            if oldest > own_limit + s.stall_timeout and not self.stopping:
                return f"{name} has made no progress for {oldest:.0f} s"
        return None

    def downloads(self) -> int:
        """Downloads under way."""
        return sum(count() for count in self.downloads_under_way)

    def downloads_wanted(self) -> int:
        """Downloads under way, and those that only wait for their host's turn counted by half, as they are taken."""
        return max(self.downloads(), sum(len(pool) for _, pool in self.downloading) // IN_HAND_PER_DOWNLOAD)

    async def _download_loop(self) -> None:
        """One download thread's life."""
        s = self.settings
        async with Fetcher(
            self.guard,
            self.arena,
            max_bytes=int(s.max_image_bytes),
            timeout=s.download_timeout,
            connections=DOWNLOAD_CONNECTIONS,
            user_agent=USER_AGENT,
        ) as fetcher:
            hosts = Hosts(lambda: -(-self.tuner.downloads // len(self.downloaders.threads)), self.clock.monotonic)
            pool = JobPool(
                self.download_queue,
                lambda job: self.flow.download(job, fetcher, hosts),
                limit=lambda: -(-self.tuner.downloads * IN_HAND_PER_DOWNLOAD // len(self.downloaders.threads)),
                surprised=self.flow.surprised,
            )
            self.downloads_under_way.append(lambda: hosts.under_way)
            self.downloading.append((asyncio.get_running_loop(), pool))
            await pool.run()

    def _admit(self, message: MessageTypeDef) -> list[Job]:
        """A message just received: its jobs to begin, or none while stopping, when it goes back at once."""
        jobs = self.custody.admit(message)
        self.metrics.admitted(message, self.clock.wall())
        if self.traces is not None:
            self.traces.begin(message, jobs)
        if self.stopping:
            self._release(jobs)
            return []
        return jobs

    def _ended(self, lease: Lease, outcome: Outcome) -> None:
        """SQS knows how a message ended, or never will: it is held no more."""
        if not self.leases.remove(lease):
            return
        self.done += 1
        self.busy_until = max(self.busy_until, self.clock.monotonic() + (outcome.delay or 0.0))
        self.metrics.ended(outcome.end)
        if outcome.end is End.ANSWERED:
            self.metrics.end_to_end.observe(max(0.0, self.clock.wall() - lease.sent_at))

    def _release(self, jobs: Iterable[Job]) -> None:
        for job in list(jobs):
            self.flow.release(job)

    def _give_up_downloads(self) -> None:
        for loop, pool in self.downloading:
            self._release(pool.jobs)
            try:
                loop.call_soon_threadsafe(pool.cancel)
            except RuntimeError:  # it ended at this moment
                pass

    def _download_thread_ended(self, error: BaseException) -> None:
        self.failure = self.failure or WorkerFailed(f"a download thread ended: {type(error).__name__}: {error}")


def model_config(s: Settings, local_weights: str | None, arena_size: int, *, with_example: bool = False) -> ModelConfig:
    """What the model process is told of the settings."""
    workers = s.preprocess_workers
    return ModelConfig(
        module=s.module or "",
        weights=local_weights,
        device=s.device,
        precision=s.precision,
        batch_size=batch_size(s),
        auto_batch=s.batch_size == AUTO,
        max_wait_ms=s.max_wait_ms,
        preprocess_workers=preprocess_workers(os.cpu_count() or 1) if workers == "auto" else workers,
        max_image_pixels=s.max_image_pixels,
        stall_timeout=s.stall_timeout,
        arena_size=arena_size,
        log_format=s.log_format,
        log_level=s.log_level,
        optimize=s.optimize,
        with_example=with_example,
    )


def batch_size(s: Settings) -> int:
    """The setting as a number: what a profile recommends for ``auto:FILE``, what to begin with for ``auto``.

    Raises:
        StartupError: the profile cannot be read, has no recommendation, or is of another module.
    """
    if isinstance(s.batch_size, int):
        return s.batch_size
    if s.batch_size == AUTO:
        return FIRST_BATCH
    from cvworker.lab.recommend import recommended_batch

    try:
        return recommended_batch(Path(s.batch_size.removeprefix(f"{AUTO}:")), s.module or "")
    except StartupError as error:
        raise StartupError(f"batch_size: {error}") from None


def require(s: Settings, *names: str) -> None:
    """Raises StartupError for a setting that is missing, or a module that cannot be."""
    for name in names:
        if getattr(s, name) is None:
            raise StartupError(f"{name} is not set: give {how_to_set(name)}")
    check_spec(s.module or "")


def guard_of(s: Settings) -> AddressGuard:
    """What decides where URLs may lead; raises StartupError for an entry that will not do."""
    return AddressGuard(
        allowed_hosts=s.allowed_hosts,
        allow_private_networks=s.allow_private_networks,
        allowed_ports=s.allowed_ports,
        proxy=s.proxy,
    )


def signer_of(s: Settings, guard: AddressGuard) -> Signer | None:
    """What signs the callbacks; raises StartupError for a secret or a callback URL that will not do."""
    if s.callback_url is not None:
        try:
            guard.check_url(s.callback_url)
        except UrlNotAllowed as refused:
            raise StartupError(f"callback_url: {refused}; allow its host with {how_to_set('allowed_hosts')}") from None
    try:
        return Signer(s.secrets) if s.secrets else None
    except ValueError as error:
        raise StartupError(f"callback_secret: {error}") from None


def long_poll(s: Settings) -> int:
    """Seconds that one receive call may wait: a stop, or an idle end, waits for the call under way."""
    return max(1, int(min(LONG_POLL_S, s.shutdown_grace * 0.4, s.exit_when_idle or LONG_POLL_S)))


def _visibility(s: Settings, queue: Queue) -> int:
    visibility = s.visibility_timeout or queue.visibility_timeout or 30
    if s.max_lease < visibility:
        raise StartupError(
            f"max_lease ({s.max_lease:g} s) is shorter than the queue's visibility timeout ({visibility} s)"
        )
    if queue.max_receives is None:
        log.warning("the queue has no redrive policy: give it a dead-letter queue", max_attempts=s.max_attempts)
    return visibility
