"""The life of ``cvworker run``: signals, endpoints, and the reasons to end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import structlog

from cvworker import __version__, heap
from cvworker.clock import Clock
from cvworker.errors import StartupError, WorkerFailed
from cvworker.net import GuardedSession
from cvworker.observe.emf import Emf
from cvworker.observe.health import Health
from cvworker.observe.http import Endpoints
from cvworker.observe.metrics import Metrics
from cvworker.observe.verdict import Judge
from cvworker.settings import Settings
from cvworker.surroundings import Surroundings
from cvworker.worker import USER_AGENT, Worker

TICK_S = 1.0
TRACES_SHARE = 0.1
"""Of the grace, for sending the last traces: after everything else has been done."""

log = structlog.get_logger(__name__)


class Service:
    """Runs one worker until it is told to stop, has nothing left to do, or cannot go on."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or Clock()
        self.metrics = Metrics()
        self.health = Health()
        self.judge = Judge()
        self.state = "starting"
        self.port = 0
        self.worker: Worker | None = None
        self._born = self.clock.monotonic()
        self._stop_asked = asyncio.Event()

    async def run(self) -> int:
        """The exit code: 0 stopped as asked or idle, 1 failed.

        Raises:
            StartupError: settings or surroundings will not do.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, signal.Signals(number).name)
        worker = self.worker = await asyncio.to_thread(Worker, self.settings, self.metrics, self.clock)
        self._watch(worker)
        async with self._surrounded(worker):
            try:
                if await self._unless_stopped(worker, asyncio.to_thread(worker.warm_up)):
                    connections = self.settings.callback_concurrency
                    async with GuardedSession(worker.guard, limit=connections, user_agent=USER_AGENT) as session:
                        await self._serve(worker, session)
            finally:
                worker.inference.kill()
                if worker.traces is not None:
                    await asyncio.to_thread(worker.traces.close, TRACES_SHARE * self.settings.shutdown_grace)
        if worker.failure is not None:
            log.critical("failed", error=str(worker.failure))
        return 1 if worker.failure else 0

    @asynccontextmanager
    async def _surrounded(self, worker: Worker) -> AsyncIterator[None]:
        """Open the endpoints, and listen to what the machine says."""
        endpoints = Endpoints(
            problems=self.health.problems, missing=self.health.missing, status=self.status, metrics=self.metrics_text
        )
        host = self.settings.http_host
        await endpoints.start(host, self.settings.http_port)
        self.port = endpoints.port
        log.info("starting", version=__version__, module=self.settings.module, url=f"http://{host}:{self.port}/")
        surroundings = Surroundings(
            lambda: len(worker.leases), self._interrupted, self.clock, max_lease=self.settings.max_lease
        )
        around = [asyncio.create_task(surroundings.run())]
        if (namespace := self.settings.cloudwatch_namespace) is not None:
            around.append(asyncio.create_task(Emf(namespace, self.status, self.clock).run()))
        try:
            yield
        finally:
            for task in around:
                task.cancel()
            await asyncio.wait(around)
            await endpoints.stop()

    async def _serve(self, worker: Worker, session: GuardedSession) -> None:
        heap.settle()
        answering = await worker.start(session)
        self.health.watch(worker.threads())
        self.state = "running"
        ready = worker.inference.ready
        log.info(
            "ready",
            module=ready["name"],
            device=ready["device_name"],
            precision=ready["precision"],
            preprocess_workers=worker.inference.workers,
            queue=worker.queue.url,
            after_s=round(self.clock.monotonic() - self._born, 1),
        )
        await self._until_over(worker)
        self.state, self.health.stopping = "stopping", True
        await worker.stop(answering)
        self.state = "stopped"

    async def _until_over(self, worker: Worker) -> None:
        """Look after the worker once a second, until there is a reason to end."""
        looked_at, done = self.clock.monotonic(), 0
        while not self._stop_asked.is_set():
            try:
                async with asyncio.timeout(TICK_S):
                    await self._stop_asked.wait()
            except TimeoutError:
                pass
            now = self.clock.monotonic()
            worker.tuner.look(done=worker.done - done, seconds=now - looked_at, downloading=worker.downloads_wanted())
            looked_at, done = now, worker.done
            self.metrics.busy.look(self._capacity(worker))
            self.judge.look(queues(worker))
            self.metrics.look(worker.leases.oldest_age(self.clock.wall()))
            worker.failure = worker.failure or worker.inference.failure
            if dead := self.health.dead_threads():
                worker.failure = worker.failure or WorkerFailed("; ".join(dead))
            if worker.failure or self._idle(worker, now):
                return

    def _idle(self, worker: Worker, now: float) -> bool:
        wanted = self.settings.exit_when_idle
        if wanted is None or len(worker.leases) or not worker.receiver.reachable:
            return False
        if now - max(worker.busy_until, worker.receiver.last_message_at) < wanted:
            return False
        log.info("idle; ending as asked", exit_when_idle=wanted)
        return True

    def _watch(self, worker: Worker) -> None:
        self.health.ready_if(lambda: None if worker.inference.ready else "the model is not warm yet")
        self.health.ready_if(lambda: None if worker.receiver.reachable else f"sqs: {worker.receiver.last_error}")
        self.health.alive_if(lambda: str(worker.failure) if worker.failure else None)
        self.health.alive_if(worker.stalled)

    def _interrupted(self, action: str, at: str) -> None:
        log.warning("spot interruption notice; stopping", action=action, at=at)
        self._stop_asked.set()

    def _signalled(self, name: str) -> None:
        if self._stop_asked.is_set():
            log.warning("second signal; ending at once", signal=name)
            if self.worker is not None:
                self.worker.inference.kill()
            os._exit(1)
        log.info("signal received; stopping (once more to end at once)", signal=name)
        self._stop_asked.set()

    async def _unless_stopped(self, worker: Worker, starting: Awaitable[object]) -> bool:
        """Wait for ``starting``, or for the signal to stop; True if it is done."""
        task = asyncio.ensure_future(starting)
        stop = asyncio.ensure_future(self._stop_asked.wait())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            worker.inference.kill()
            await asyncio.wait([task])
            if not isinstance(task.exception(), StartupError | None):
                await task
            return False
        await task
        return True

    def _capacity(self, worker: Worker) -> dict[str, float]:
        return {
            "receive": self.settings.receive_threads,
            "download": worker.tuner.downloads,
            "preprocess": worker.inference.workers,
            "process": 1,
            "callback": self.settings.callback_concurrency,
        }

    def metrics_text(self) -> bytes:
        worker, metrics = self.worker, self.metrics
        if worker is not None:
            metrics.pipelines.set(self.state == "running")
            metrics.backlog.clear()  # what is not known is not there
            for state, count in worker.backlog.counts.items():
                if count is not None:
                    metrics.backlog.labels(state).set(count)
            metrics.inflight.set(len(worker.leases))
            for queue in worker.queues:
                metrics.queue_depth.labels(queue.name).set(len(queue))
                metrics.queue_limit.labels(queue.name).set(queue.limit)
        for stage, ratio in metrics.busy.ratios.items():
            metrics.stage_busy.labels(stage).set(ratio)
        return metrics.text()

    def status(self) -> dict[str, Any]:
        """What ``/status.json`` tells: no URL's query string and no secret is among it."""
        worker, metrics = self.worker, self.metrics
        assert worker is not None
        ready = worker.inference.ready
        status = {
            "version": __version__,
            "state": self.state,
            "uptime_s": round(self.clock.monotonic() - self._born, 1),
            "problems": self.health.problems(),
            "missing": self.health.missing(),
            "queue": {
                "url": worker.queue.url,
                "reachable": worker.receiver.reachable,
                "max_receives": worker.queue.max_receives,
            },
            "model": {
                "module": ready.get("name"),
                "device": ready.get("device_name"),
                "precision": ready.get("precision"),
                "batch_size": worker.inference.batch_size,
                "weights": ready.get("weights"),
                "restarts": worker.inference.restarts,
                "pid": worker.inference.pid,
                "preprocess_workers": worker.inference.workers,
            },
            "backlog": dict(worker.backlog.counts),
            "held": len(worker.leases),
            "image_bytes": worker.arena.used,
            "queues": queues(worker),
            "in_hand": {
                "download": worker.downloads(),
                "model": len(worker.inference),
                "callback": len(worker.answering),
            },
            "download_concurrency": worker.tuner.downloads,
            "rate_per_s": round(metrics.rate(), 2),
            "pace_per_s": round(worker.tuner.pace.rate, 2),
            "busy": dict(metrics.busy.ratios),
            "latency_ms": metrics.quantiles(),
            "messages": metrics.totals(metrics.messages),
            "errors": metrics.totals(metrics.errors),
            "callbacks": metrics.totals(metrics.callbacks),
            "done": metrics.done(),
            "leases": {
                "extended": metrics.total(metrics.extensions),
                "lost": metrics.total(metrics.leases_lost),
                "oldest_s": round(metrics.oldest_age(), 1),
            },
            "history": metrics.history.shown(),
            "examples": list(metrics.examples),
            "settings": self.settings.shown(),
        }
        return status | {"verdict": self.judge.verdict(status).json()}


def queues(worker: Worker) -> dict[str, dict[str, int]]:
    """How full each queue is."""
    return {queue.name: {"depth": len(queue), "limit": queue.limit} for queue in worker.queues}
