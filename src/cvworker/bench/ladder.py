"""The worker of rungs one to four: this project's own steps, with the design around them switched off.

What comes in and goes out is as with ``cvworker run``: guarded downloads within limits, the contract's answers, signed
callbacks, and a message is deleted if its callback was accepted. What it does without is said in :mod:`.rungs`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from cvworker import __version__, heap, weights
from cvworker.answer import WorkerInfo
from cvworker.arena import Arena
from cvworker.bench.rungs import CALLBACKS, DOWNLOADS, QUEUE_SIZE, RECEIVERS, RUNGS, Rung
from cvworker.bench.stages import Inline, Loaded, Model, forever
from cvworker.clock import Clock
from cvworker.errors import StartupError
from cvworker.flow import Flow
from cvworker.model.process import start_fork_server
from cvworker.net import GuardedSession
from cvworker.observe.logs import configure
from cvworker.observe.metrics import Metrics
from cvworker.queues import JobQueue
from cvworker.settings import Settings
from cvworker.sqs.custody import Custody
from cvworker.sqs.leases import LeaseTable
from cvworker.sqs.outcome import End, Outcome
from cvworker.sqs.queue import MAX_BATCH, Queue
from cvworker.sqs.receiver import Receiver
from cvworker.steps.callback import CallbackSender
from cvworker.steps.download import Fetcher
from cvworker.steps.hosts import Hosts
from cvworker.worker import USER_AGENT, batch_size, guard_of, long_poll, model_config, require, signer_of

if TYPE_CHECKING:
    from cvworker.sqs.leases import Lease

VISIBILITY_S = 300
"""Asked for at each receive, in place of a heartbeat: longer than any message is held."""


class Ladder:
    """Composes the steps for one rung, and loads the module. Raises StartupError as ``cvworker run`` does."""

    def __init__(self, settings: Settings, rung: Rung) -> None:
        s = self._settings = settings
        require(s, "module", "queue_url")
        self._guard = guard_of(s)
        self._signer = signer_of(s, self._guard)
        self._clock = Clock()
        self._metrics = Metrics()
        self._arena = Arena(int(s.max_inflight_bytes))
        size = batch_size(s) if rung.batches else 1
        config = model_config(
            s.model_copy(update={"batch_size": size, "precision": s.precision.replace("auto", "fp32")}),
            weights.local(s.weights, self._guard),
            self._arena.size,
        )
        if rung.loader:
            start_fork_server(config)  # it imports torch while this process does
        self._queue = Queue.open(s.queue_url or "", receive_threads=RECEIVERS, wait_s=long_poll(s))
        self._leases = LeaseTable(VISIBILITY_S, VISIBILITY_S, self._clock.monotonic)
        self._to_download, self._to_infer, self._to_answer = (
            JobQueue(name, QUEUE_SIZE, self._clock.monotonic) for name in ("download", "inference", "results")
        )
        model = Model(config)
        self._info = WorkerInfo(__version__, model.module.name, model.weights, config.precision)
        self._custody = Custody(
            self._leases,
            self._clock,
            task=lambda: model.module.name,
            default_callback=s.callback_url,
            check_url=self._guard.check_url,
            allowed_buckets=s.allowed_buckets,
            max_receives=self._queue.max_receives,
            max_attempts=s.max_attempts,
            to_sqs=self._settle,
        )
        stage = Loaded if rung.loader else Inline
        self._stage = stage(model, config, self._arena, self._to_infer, self._flow())
        self._threads = rung.threads

    def run(self) -> None:
        """Work until the process is ended."""
        heap.settle()
        if isinstance(self._stage, Inline) and not self._threads:
            asyncio.run(self._one_by_one(self._stage.one))
        else:
            self._side_by_side(self._stage.run)

    async def _one_by_one(self, infer: Callable[[], None]) -> None:
        """The first rung: one thread, one message after the other."""
        async with self._fetcher() as fetcher, self._session() as session:
            hosts, flow = self._one_host(), self._flow(session)
            while True:
                for message in self._queue.receive(MAX_BATCH, VISIBILITY_S):
                    for job in self._custody.admit(message):
                        await flow.download(job, fetcher, hosts)
                        if len(self._to_infer):
                            infer()
                        for done in self._to_answer.drain():
                            await flow.answer(done)

    def _side_by_side(self, infer: Callable[[], None]) -> None:
        """The other rungs: threads for what waits, and the model on this one."""
        receiver = Receiver(
            self._queue,
            self._to_download,
            self._custody.admit,
            threads=RECEIVERS,
            visibility=VISIBILITY_S,
            clock=self._clock,
        )
        for number in range(DOWNLOADS):
            forever(f"download-{number}", lambda: asyncio.run(self._download()))
        for number in range(CALLBACKS):
            forever(f"callback-{number}", lambda: asyncio.run(self._call_back()))
        receiver.start()
        infer()

    async def _download(self) -> None:
        """One thread, one download at a time."""
        async with self._fetcher() as fetcher:
            hosts, flow = self._one_host(), self._flow()
            while True:
                [job] = self._to_download.get()
                await flow.download(job, fetcher, hosts)

    async def _call_back(self) -> None:
        """One thread, one callback and delete at a time."""
        async with self._session() as session:
            flow = self._flow(session)
            while True:
                [job] = self._to_answer.get()
                await flow.answer(job)

    def _settle(self, lease: Lease, outcome: Outcome) -> None:
        """Tell SQS how a message ended, at once and by itself."""
        if outcome.end is End.ANSWERED:
            self._queue.delete([lease.receipt])
        elif outcome.delay is not None:
            self._queue.change_visibility([(lease.receipt, int(outcome.delay))])
        self._leases.remove(lease)

    def _flow(self, session: GuardedSession | None = None) -> Flow:
        """What moves jobs on; with a session, one that can answer, for one event loop."""
        flow = Flow(
            self._custody,
            inference_queue=self._to_infer,
            results_queue=self._to_answer,
            metrics=self._metrics,
            clock=self._clock,
            default_callback=self._settings.callback_url,
        )
        flow.info = self._info
        if session is not None:
            timeout = self._settings.callback_timeout
            flow.sender = CallbackSender(
                session, signer=self._signer, timeout=timeout, clock=self._clock, concurrency=1
            )
        return flow

    def _fetcher(self) -> Fetcher:
        s = self._settings
        return Fetcher(
            self._guard,
            self._arena,
            max_bytes=int(s.max_image_bytes),
            timeout=s.download_timeout,
            connections=1,
            user_agent=USER_AGENT,
        )

    def _session(self) -> GuardedSession:
        return GuardedSession(self._guard, limit=1, user_agent=USER_AGENT)

    def _one_host(self) -> Hosts:
        return Hosts(lambda: 1, self._clock.monotonic)


def main() -> None:
    """Entry point: the rung's name as the argument, settings as environment variables."""
    settings = Settings()
    configure(settings.log_format, settings.log_level)
    try:
        Ladder(settings, RUNGS[sys.argv[1]]).run()
    except StartupError as error:
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException:  # an ordinary exit would wait for the DataLoader's processes, which wait for work
        traceback.print_exc()
        os._exit(70)
