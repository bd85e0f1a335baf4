"""The model of rungs one to four: in this process, with ``preprocess`` in its own thread or in a DataLoader."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
import torch

from cvworker.errors import JobError, StartupError
from cvworker.loading import load, make
from cvworker.model.batcher import Batcher, Sample
from cvworker.model.feeder import Feeder
from cvworker.model.preprocess import describe, sample_of
from cvworker.model.process import START_TIMEOUT_S, device_named
from cvworker.model.runner import Runner
from cvworker.weights import sha256_of

if TYPE_CHECKING:
    from cvworker.arena import Arena
    from cvworker.flow import Flow
    from cvworker.job import Job
    from cvworker.model.config import ModelConfig
    from cvworker.queues import JobQueue

log = structlog.get_logger(__name__)


class Model:
    """A module set up on its device and warmed up, its network as ``setup`` left it."""

    def __init__(self, config: ModelConfig) -> None:
        self.module = make(load(config.module), config.weights)
        self.weights = sha256_of(self.module.weights) if self.module.weights else None
        self.device = device_named(config.device)
        try:
            self.module.setup(self.device)
        except StartupError:
            raise
        except Exception as error:
            name = self.module.name
            raise StartupError(f"module: {name}.setup raised {type(error).__name__}: {error}") from error
        self.runner = Runner(self.module, self.device, config.precision, config.batch_size)
        try:
            sample = self.module.preprocess(self.module.example())
            for size in (config.batch_size, 1):
                self.runner.trial([Sample(0, sample, 0.0)] * size)
        except Exception as error:  # as with the worker: the module may dislike its example
            log.warning("warm-up failed", error=describe(error))

    def process(self, samples: list[Sample], jobs: dict[int, Job], flow: Flow) -> None:
        """One batch through ``collate`` and ``process``; ``jobs`` are those of the samples, by number."""
        well = []
        for done in self.runner.run(self.runner.stage(samples)):
            job = jobs.pop(done.sample.number)
            job.drop_image()
            job.timings_ms |= {"preprocess": done.sample.preprocess_ms, "process": done.process_ms}
            if done.error is not None:
                flow.failed(job, done.error)
            else:
                job.result = json.loads(done.result or "null")
                well.append(job)
        flow.inferred(well)


class Inline:
    """Decodes, preprocesses and processes one image after the other, in one thread."""

    def __init__(self, model: Model, config: ModelConfig, arena: Arena, inbox: JobQueue, flow: Flow) -> None:
        self._model, self._arena, self._inbox, self._flow = model, arena, inbox, flow
        self._max_pixels = config.max_image_pixels
        torch.set_grad_enabled(False)  # as in a DataLoader process

    def run(self) -> None:
        """Work until the process is ended."""
        while True:
            self.one()

    def one(self) -> None:
        """Wait for one image and work on it."""
        [job] = self._inbox.get()
        assert job.image is not None
        began = time.perf_counter()
        data = self._arena.memory[job.image.offset : job.image.offset + job.image.length]
        value, error = sample_of(self._model.module, data, self._max_pixels, job=job.number, crosses_border=False)
        if error is not None:
            job.drop_image()
            self._flow.failed(job, error)
            return
        sample = Sample(job.number, value, (time.perf_counter() - began) * 1000)
        self._model.process([sample], {job.number: job}, self._flow)


class Loaded:
    """Decodes and preprocesses in DataLoader processes, and runs batches in the thread that calls :meth:`run`."""

    def __init__(self, model: Model, config: ModelConfig, arena: Arena, inbox: JobQueue, flow: Flow) -> None:
        self._model, self._inbox, self._flow = model, inbox, flow
        self._jobs: dict[int, Job] = {}
        self._room = threading.Semaphore(config.window)
        self._batcher = Batcher(config.batch_size, config.max_wait_ms / 1000, time.monotonic)
        self._feeder = Feeder(
            config,
            arena.fd,
            model.module,
            pin=model.device.type == "cuda",
            deliver=self._batcher.add,
            failed=self._failed,
        )
        forever("loader", self._feeder.run)
        if not self._feeder.wait_until_started(START_TIMEOUT_S):
            raise StartupError("the DataLoader's processes did not start; see the log above")

    def run(self) -> None:
        """Work until the process is ended."""
        forever("feed", self._feed)
        while samples := self._batcher.take():
            self._model.process(samples, self._jobs, self._flow)
            self._room.release(len(samples))

    def _feed(self) -> None:
        while True:
            self._room.acquire()
            [job] = self._inbox.get()
            assert job.image is not None
            self._jobs[job.number] = job
            self._feeder.submit([(job.number, job.image.offset, job.image.length, job.alone)])

    def _failed(self, number: int, error: JobError) -> None:
        job = self._jobs.pop(number)
        job.drop_image()
        self._flow.failed(job, error)
        self._room.release()


def forever(name: str, work: Callable[[], object]) -> None:
    """A thread whose failure ends the process: a dead thread would go unseen."""

    def run() -> None:
        try:
            work()
        except BaseException:
            log.critical("a thread ended", thread=name, exc_info=True)
            os._exit(70)

    threading.Thread(target=run, name=name, daemon=True).start()
