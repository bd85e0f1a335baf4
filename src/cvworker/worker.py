"""The worker: seven steps, the queues between them, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

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
from cvworker.observe.health import Health, status
from cvworker.observe.http import Endpoints
from cvworker.observe.metrics import Metrics
from cvworker.queues import JobQueue
from cvworker.settings import Settings, how_to_set
from cvworker.signing import Signer
from cvworker.sqs.acks import Acks
from cvworker.sqs.custody import Custody
from cvworker.sqs.heartbeat import Heartbeat
from cvworker.sqs.leases import LeaseTable
from cvworker.sqs.outcome import End, Outcome
from cvworker.sqs.queue import Queue
from cvworker.sqs.receiver import Receiver
from cvworker.steps.callback import TRIES, CallbackSender
from cvworker.steps.download import DownloadThreads, Fetcher
from cvworker.steps.inference import Inference
from cvworker.steps.pool import JobPool
from cvworker.tuning import Tuner

if TYPE_CHECKING:
    from types_boto3_sqs.type_defs import MessageTypeDef

    from cvworker.job import Job
    from cvworker.sqs.leases import Lease

LONG_POLL_S = 10
"""Shorter than SQS's 20 s, because a stop waits for the poll under way: a cut-off one may hide messages."""

log = structlog.get_logger(__name__)


class Worker:
    """One complete pipeline. ``run`` is the whole of its life; it returns the exit code."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or Clock()
        self.version = __version__
        self.state = "starting"
        self.metrics = Metrics()
        self.health = Health()
        self.answering: JobPool | None = None
        self._downloads: list[tuple[asyncio.AbstractEventLoop, JobPool]] = []
        self._born = self.clock.monotonic()
        self._stop_asked = asyncio.Event()
        self._failure: WorkerFailed | None = None
        self._done = 0
        self._busy_until = self._born

    async def run(self) -> int:
        """Start, work until told to stop or nothing is left to do, stop.

        Raises:
            StartupError: settings or surroundings will not do.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, signal.Signals(number).name)
        await asyncio.to_thread(self._build)
        endpoints = Endpoints(
            problems=self.health.problems, missing=self.health.missing, status=self.status, metrics=self.metrics_text
        )
        await endpoints.start(self.settings.http_host, self.settings.http_port)
        self.port = endpoints.port
        log.info("starting", version=__version__, module=self.settings.module, url=f"http://{self.settings.http_host}:{endpoints.port}/")
        try:
            if await self._unless_stopped(asyncio.to_thread(self.inference.start)):
                async with GuardedSession(self.guard, limit=self.settings.callback_concurrency) as session:
                    await self._work(session)
        finally:
            self.inference.kill()
            await endpoints.stop()
        if self._failure is not None:
            log.critical("failed", error=str(self._failure))
        return 1 if self._failure else 0

    def _build(self) -> None:
        """Compose the steps. Nothing runs yet; what is wrong with the settings or the queue is found here."""
        s, clock, metrics = self.settings, self.clock, self.metrics
        if s.module is None:
            raise StartupError(f"module is not set: give {how_to_set('module')}")
        if s.queue_url is None:
            raise StartupError(f"queue_url is not set: give {how_to_set('queue_url')}")
        if s.processes > 1:
            raise StartupError("processes: more than 1 is not available in this version; run more containers instead")
        check_spec(s.module)
        self.guard = AddressGuard(allowed_hosts=s.allowed_hosts, allow_private_networks=s.allow_private_networks)
        if s.callback_url is not None:
            _check_callback_url(s.callback_url, self.guard)
        signer = _signer(s.secrets)
        local_weights = weights.local(s.weights, self.guard)

        wait_s = max(1, int(min(LONG_POLL_S, s.shutdown_grace * 0.4, s.exit_when_idle or LONG_POLL_S)))
        self.queue = Queue.open(s.queue_url, receive_threads=s.receive_threads, wait_s=wait_s)
        visibility = s.visibility_timeout or self.queue.visibility_timeout or 30
        if s.visibility_timeout is None and s.max_lease < visibility:
            raise StartupError(f"max_lease ({s.max_lease:g} s) is shorter than the queue's visibility timeout ({visibility} s)")
        if self.queue.max_receives is None:
            log.warning("the queue has no redrive policy: give it a dead-letter queue", max_attempts=s.max_attempts)

        self.arena = Arena(int(s.max_inflight_bytes))
        self.leases = LeaseTable(visibility, s.max_lease, clock.monotonic)
        self.queues = [JobQueue(name, 1, clock.monotonic) for name in ("download", "inference", "results")]
        download_queue, inference_queue, results_queue = self.queues
        self.tuner = Tuner(
            self.queues,
            max_queue_size=s.max_queue_size,
            concurrency=s.download_concurrency,
            visibility=visibility,
            batch_size=s.batch_size,
        )
        self.acks = Acks(self.queue, clock, self._ended)
        self.custody = Custody(
            self.leases,
            clock,
            task=lambda: str(self.inference.ready["name"]),
            default_callback=s.callback_url,
            check_url=self.guard.check_url,
            allowed_buckets={*s.allowed_buckets, *weights.bucket_of(s.weights)},
            max_receives=self.queue.max_receives,
            max_attempts=s.max_attempts,
            refuse=lambda job: self.flow.refused(job),
            to_sqs=self.acks.put,
        )
        self.flow = Flow(
            self.custody,
            inference_queue=inference_queue,
            results_queue=results_queue,
            metrics=metrics,
            clock=clock,
            default_callback=s.callback_url,
        )
        self.heartbeat = Heartbeat(self.queue, self.leases, clock, self._lease_event)
        self.receiver = Receiver(
            self.queue,
            download_queue,
            self._admit,
            threads=s.receive_threads,
            visibility=visibility,
            clock=clock,
            called=self._received,
        )
        threads = min(4, os.cpu_count() or 1) if s.download_threads == "auto" else s.download_threads
        self.downloaders = DownloadThreads(threads, self._download_loop, self._broke)
        self.inference = Inference(
            _model_config(s, local_weights, self.arena.size),
            self.arena.fd,
            inference_queue,
            clock=clock,
            alive=self.custody.alive,
            done=self.flow.inferred,
            failed=self.flow.failed,
            dropped=self.flow.dropped,
            batch_done=self._batch_done,
        )
        self._signer = signer
        self.health.ready_if(lambda: None if self.inference.ready else "the model is not warm yet")
        self.health.ready_if(lambda: None if self.receiver.reachable else f"sqs: {self.receiver.last_error}")
        self.health.alive_if(lambda: str(self._failure) if self._failure else None)
        self.health.alive_if(self._stalled)

    async def _work(self, session: GuardedSession) -> None:
        """Everything runs from here to the stop."""
        s = self.settings
        ready = self.inference.ready
        if ready.get("warning"):
            log.warning("warm-up failed; the module may dislike its example", reason=ready["warning"])
        self.flow.info = WorkerInfo(__version__, ready["name"], ready["weights"])
        self.flow.sender = CallbackSender(
            session,
            signer=self._signer,
            timeout=s.callback_timeout,
            clock=self.clock,
            concurrency=s.callback_concurrency,
            user_agent=f"cvworker/{__version__}",
            called=self._called_back,
        )
        self.answering = JobPool(
            self.queues[2], self.flow.answer, limit=lambda: 4 * s.callback_concurrency, surprised=self.flow.surprised
        )
        answering = asyncio.create_task(self.answering.run())
        self.heartbeat.start()
        self.acks.start()
        self.downloaders.start()
        self.receiver.start()
        self.health.watch(
            [self.heartbeat.thread, self.acks.thread, *self.downloaders.threads, *self.receiver.threads, *self.inference.threads]
        )
        self.state = "running"
        log.info("ready", module=ready["name"], device=ready["device_name"], precision=ready["precision"], queue=self.queue.url)
        await self._until_stop()
        await self._stop(answering)

    async def _until_stop(self) -> None:
        looked_at, done = self.clock.monotonic(), 0
        while not self._stop_asked.is_set():
            try:
                async with asyncio.timeout(1.0):
                    await self._stop_asked.wait()
            except TimeoutError:
                pass
            now = self.clock.monotonic()
            self.tuner.look(done=self._done - done, seconds=now - looked_at, downloading=self.downloading())
            looked_at, done = now, self._done
            self.metrics.busy.look(self._capacity())
            self._failure = self._failure or self.inference.failure
            if dead := self.health.dead_threads():
                self._failure = self._failure or WorkerFailed("; ".join(dead))
            if self._failure or self._idle(now):
                return

    async def _stop(self, answering: asyncio.Task[None]) -> None:
        """Stop in the order of the flow, each step with its share of the grace; what is not begun goes back at once.

        Heartbeats go on to the end: until a message is settled it is held, and what is held must not expire.
        """
        self.state, self.health.stopping = "stopping", True
        grace = self.settings.shutdown_grace
        began = self.clock.monotonic()
        log.info("stopping", held=len(self.leases), grace_s=grace)

        def left(share: float) -> float:
            return max(0.0, began + grace * share - self.clock.monotonic())

        download_queue, inference_queue, results_queue = self.queues
        self.receiver.stop()  # polls under way return what they find, and _admit gives it back
        self._release(download_queue.drain())
        download_queue.close()
        if not await asyncio.to_thread(self.downloaders.join, left(0.4)):
            self._give_up_downloads()
        inference_queue.close()
        if self._failure:
            self._release(inference_queue.drain())
            self.inference.kill()
        await asyncio.to_thread(self.inference.stop, left(0.65))
        self._release([*inference_queue.drain(), *self.inference.held()])
        results_queue.close()
        await asyncio.wait([answering], timeout=left(0.8))
        if self.answering is not None and self.answering.jobs:
            self._release(self.answering.jobs)
            self.answering.cancel()
        self._release(results_queue.drain())
        if not await asyncio.to_thread(self.receiver.join, left(0.85)):
            log.warning("a receive call did not return in time; what it was given is hidden until its visibility timeout ends")
        self._release(download_queue.drain())
        await asyncio.to_thread(self.acks.stop, self.clock.monotonic() + left(0.93))
        self.heartbeat.stop()
        self.state = "stopped"
        log.info("stopped", held=len(self.leases), took_s=round(self.clock.monotonic() - began, 1))

    async def _download_loop(self) -> None:
        """One download thread's life."""
        s = self.settings
        async with Fetcher(
            self.guard,
            self.arena,
            max_bytes=int(s.max_image_bytes),
            timeout=s.download_timeout,
            connections=256,
            user_agent=f"cvworker/{__version__}",
        ) as fetcher:
            pool = JobPool(
                self.queues[0],
                lambda job: self.flow.download(job, fetcher),
                limit=lambda: -(-self.tuner.downloads // len(self.downloaders.threads)),
                surprised=self.flow.surprised,
            )
            self._downloads.append((asyncio.get_running_loop(), pool))
            await pool.run()

    def _admit(self, message: MessageTypeDef) -> list[Job]:
        self.metrics.queue_wait.observe(_waited(message, self.clock.wall()))
        jobs = self.custody.admit(message)
        if self.health.stopping:
            self._release(jobs)
            return []
        return jobs

    def _release(self, jobs: Iterable[Job]) -> None:
        for job in list(jobs):
            self.flow.release(job)

    def _give_up_downloads(self) -> None:
        for loop, pool in self._downloads:
            self._release(pool.jobs)
            try:
                loop.call_soon_threadsafe(pool.cancel)
            except RuntimeError:  # it ended at this moment
                pass

    def _ended(self, lease: Lease, outcome: Outcome) -> None:
        """SQS knows how a message ended, or never will: it is held no more."""
        if not self.leases.remove(lease):
            return
        self._done += 1
        self.metrics.messages.labels(outcome.end.value).inc()
        now = self.clock.monotonic()
        self._busy_until = max(self._busy_until, now + (outcome.delay or 0.0))
        if outcome.end is End.ANSWERED:
            self.metrics.end_to_end.observe(max(0.0, self.clock.wall() - lease.sent_at))

    def _idle(self, now: float) -> bool:
        wanted = self.settings.exit_when_idle
        if wanted is None or len(self.leases) or not self.receiver.reachable:
            return False
        if now - max(self._busy_until, self.receiver.last_message_at) < wanted:
            return False
        log.info("idle; ending as asked", exit_when_idle=wanted)
        return True

    def _stalled(self) -> str | None:
        limit = self.settings.stall_timeout
        for name, pools, least in (
            ("download", [pool for _, pool in self._downloads], self.settings.download_timeout),
            ("callback", [self.answering] if self.answering else [], self.settings.callback_timeout * TRIES),
        ):
            oldest = max((pool.oldest() for pool in pools), default=0.0)
            if oldest > least + limit and not self.health.stopping:
                return f"{name} has made no progress for {oldest:.0f} s"
        return None

    def _signalled(self, name: str) -> None:
        if self._stop_asked.is_set():
            log.warning("second signal; ending at once", signal=name)
            self.inference.kill()
            os._exit(1)
        log.info("signal received; stopping (once more to end at once)", signal=name)
        self._stop_asked.set()

    async def _unless_stopped(self, starting: Awaitable[object]) -> bool:
        """Wait for ``starting``, or for the signal to stop; True if it is done."""
        task = asyncio.ensure_future(starting)
        stop = asyncio.ensure_future(self._stop_asked.wait())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            await task
            return True
        self.inference.kill()
        await asyncio.wait([task])
        task.exception()
        return False

    def _broke(self, error: BaseException) -> None:
        self._failure = self._failure or WorkerFailed(f"a download thread ended: {type(error).__name__}: {error}")

    def _lease_event(self, what: str, count: int) -> None:
        (self.metrics.extensions if what == "extended" else self.metrics.leases_lost).inc(count)

    def _received(self, outcome: str, seconds: float) -> None:
        self.metrics.sqs_requests.labels("receive", outcome).inc()
        self.metrics.timed("receive", seconds)

    def _called_back(self, code_class: str, seconds: float) -> None:
        self.metrics.callbacks.labels(code_class).inc()
        self.metrics.timed("callback", seconds)

    def _batch_done(self, size: int, seconds: float) -> None:
        self.metrics.batch_size.observe(size)
        self.metrics.timed("process", seconds)

    def _capacity(self) -> dict[str, Callable[[], float]]:
        s = self.settings
        return {
            "receive": lambda: s.receive_threads,
            "download": lambda: self.tuner.downloads,
            "preprocess": lambda: self.inference.workers,
            "process": lambda: 1,
            "callback": lambda: s.callback_concurrency,
        }

    def downloading(self) -> int:
        return sum(len(pool) for _, pool in self._downloads)

    def uptime(self) -> float:
        return self.clock.monotonic() - self._born

    def status(self) -> dict[str, Any]:
        return status(self)

    def metrics_text(self) -> bytes:
        self.metrics.inflight.set(len(self.leases))
        for queue in self.queues:
            self.metrics.queue_depth.labels(queue.name).set(len(queue))
            self.metrics.queue_limit.labels(queue.name).set(queue.limit)
        for stage, ratio in self.metrics.busy.ratios.items():
            self.metrics.stage_busy.labels(stage).set(ratio)
        return self.metrics.text()


def _model_config(s: Settings, local_weights: str | None, arena_size: int) -> ModelConfig:
    workers = s.preprocess_workers
    return ModelConfig(
        module=s.module or "",
        weights=local_weights,
        device=s.device,
        precision=s.precision,
        batch_size=s.batch_size,
        max_wait_ms=s.max_wait_ms,
        preprocess_workers=max(1, min((os.cpu_count() or 1) - 1, 8)) if workers == "auto" else workers,
        max_image_pixels=s.max_image_pixels,
        stall_timeout=s.stall_timeout,
        arena_size=arena_size,
        log_format=s.log_format,
        log_level=s.log_level,
    )


def _check_callback_url(url: str, guard: AddressGuard) -> None:
    try:
        guard.check_url(url)
    except UrlNotAllowed as refused:
        raise StartupError(f"callback_url: {refused}; allow its host with {how_to_set('allowed_hosts')}") from None


def _signer(secrets: list[str]) -> Signer | None:
    try:
        return Signer(secrets) if secrets else None
    except ValueError as error:
        raise StartupError(f"callback_secret: {error}") from None


def _waited(message: MessageTypeDef, now: float) -> float:
    sent = float(message.get("Attributes", {}).get("SentTimestamp", now * 1000)) / 1000
    return max(0.0, now - sent)
