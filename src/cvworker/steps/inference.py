"""Hands images to the model process and takes results back; brings the process back when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from cvworker.errors import JobError, ProcessFailed, StartupError, WorkerFailed, job_error
from cvworker.model.link import READY_TIMEOUT_S, ModelLink
from cvworker.queues import QueueClosed

if TYPE_CHECKING:
    from cvworker.clock import Clock
    from cvworker.job import Job
    from cvworker.model.config import ModelConfig
    from cvworker.queues import JobQueue

MAX_RESTARTS = 3
"""Processes lost one after the other without a single answer between them, before the worker gives up."""
KILLS = 2
"""Processes that an image may end: once in a batch or by bad luck, once more by itself, and it has failed."""
LOOK_S = 0.5
GATHER_S = 0.01
"""While the process has plenty to do, images are handed to it a few at a time: each hand-over wakes three threads."""
LAST_FRAMES_S = 0.1
"""To read what a process has said at its end, where the time to stop is used up."""
READY_FACTOR, READY_LEAST_S = 3.0, 60.0
"""How much longer than the first process a replacement may take to load; at least ``stall_timeout``, and a minute: a
short ``stall_timeout`` is about a batch, and by then the machine may be busier than at the start."""
SILENCE_FACTOR = 1.5
"""The model process itself ends a DataLoader process that is stuck for ``stall_timeout``; it gets time to say so."""

log = structlog.get_logger(__name__)


class Inference:
    """Keeps the model process fed from ``inbox``, never with more images than its window.

    ``done`` gets each job with its result, ``failed`` each with its error. When the process ends or hangs, the jobs it
    held begin again in a new one; those whose batch was in ``process`` at that moment each run alone, and a job that
    ends a process alone has failed.
    """

    def __init__(
        self,
        config: ModelConfig,
        arena_fd: int,
        inbox: JobQueue,
        *,
        clock: Clock,
        alive: Callable[[Job], bool],
        done: Callable[[list[Job]], None],
        failed: Callable[[Job, JobError], None],
        dropped: Callable[[Job], None],
        batch_done: Callable[[int, float, float | None], None] = lambda _size, _seconds, _to_device: None,
        brought_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._arena_fd = arena_fd
        self._inbox = inbox
        self._clock = clock
        self._alive = alive
        self._done = done
        self._failed = failed
        self._dropped = dropped
        self._batch_done = batch_done
        self._brought_back = brought_back
        self.traced: Callable[[list[Job], float], None] | None = None
        """Told of each batch that was run, and for how many seconds, where there are traces."""
        self._jobs: dict[int, Job] = {}
        self._room = threading.Condition()
        self._suspects: set[int] = set()
        self._decoding: set[int] = set()
        self._progress_at = clock.monotonic()
        self._taking = False
        self._batch_since: float | None = None
        self._restarts = 0
        self._patience = READY_TIMEOUT_S
        self._stopping = self._over = False
        self.restarts = 0
        self.failure: WorkerFailed | None = None
        self.ready: dict[str, Any] = {}
        self._link: ModelLink | None = None
        self._starting: ModelLink | None = None
        self.threads = [
            threading.Thread(target=self._feed, name="model-feed", daemon=True),
            threading.Thread(target=self._read, name="model-read", daemon=True),
        ]
        self._watcher = threading.Thread(target=self._watch, name="model-watch", daemon=True)

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def workers(self) -> int:
        return max(1, self._config.preprocess_workers)

    @property
    def batch_size(self) -> int:
        """Samples in a batch at most; measured by then, where it is ``auto``."""
        return self._config.batch_size

    @property
    def pid(self) -> int | None:
        return self._link.pid if self._link else None

    def start(self) -> dict[str, Any]:
        """Start the model process and wait until it is warm. Raises StartupError as it says."""
        began = time.monotonic()
        self._link = ModelLink(self._config, self._arena_fd)
        self.ready = self._link.wait_ready(READY_TIMEOUT_S)
        if "precision" in self.ready:  # for every process that may come after it: answers must not change their kind
            self._config = replace(self._config, precision=self.ready["precision"])
        if "batch_size" in self.ready:
            self._config = replace(self._config, batch_size=self.ready["batch_size"], auto_batch=False)
        first = time.monotonic() - began
        self._patience = max(self._config.stall_timeout, READY_FACTOR * first, READY_LEAST_S)
        for thread in (*self.threads, self._watcher):
            thread.start()
        return self.ready

    def held(self) -> list[Job]:
        with self._room:
            return list(self._jobs.values())

    def stop(self, timeout: float) -> None:
        """Let the process finish what it holds, for at most ``timeout`` seconds. The inbox must be closed."""
        self._stopping = True
        until = time.monotonic() + timeout
        link = self._link
        if link is not None:
            link.stop(timeout)
        with self._room:
            self._over = True
            self._room.notify_all()
        self.join(max(LAST_FRAMES_S, min(1.0, until - time.monotonic())))

    def join(self, timeout: float) -> None:
        """Wait for the threads, one of which may be waiting for room for a result."""
        until = time.monotonic() + timeout
        for thread in self.threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))

    def kill(self) -> None:
        """End the process at once."""
        self._stopping = True
        for link in (self._link, self._starting):
            if link is not None:
                link.kill()

    def _feed(self) -> None:
        window = self._config.window
        try:
            while True:
                with self._room:
                    while len(self._jobs) >= window and not self._over:
                        self._room.wait()
                    if self._over:
                        return
                if len(self._jobs) >= self._config.plenty:
                    time.sleep(GATHER_S)
                self._submit(self._inbox.get(window - len(self._jobs)))
        except QueueClosed:
            pass

    def _submit(self, jobs: list[Job]) -> None:
        wanted = []
        for job in jobs:
            if not self._alive(job):
                self._dropped(job)
            else:
                wanted.append(job)
        with self._room:
            if not self._jobs:
                self._progress_at = self._clock.monotonic()
            self._jobs.update((job.number, job) for job in wanted)
            link = self._link
        if wanted and link is not None:
            link.submit([_descriptor(job) for job in wanted])

    def _read(self) -> None:
        while True:
            link = self._link
            assert link is not None
            for frame in link.frames():
                self._taking = True
                self._take(frame)
                self._taking, self._progress_at = False, self._clock.monotonic()
            link.close()
            if self._stopping:
                return
            self._taking = True  # while there is no process, silence is no hang
            try:
                self._bring_back(link)
            except (WorkerFailed, StartupError) as error:
                self.failure = WorkerFailed(str(error))
                return
            self._taking = False

    def _take(self, frame: dict[str, Any]) -> None:
        if "started" in frame:
            self._suspects = set(frame["started"])
            self._batch_since = self._clock.monotonic()
        elif "decoding" in frame:
            self._decoding = set(frame["decoding"])
        elif "failed" in frame:
            number, name, text = frame["failed"]
            for refused in self._forget([number]).values():
                self._failed(refused, job_error(name, text))
        elif "done" in frame:
            self._suspects, self._batch_since = set(), None
            self._restarts = 0
            rows = frame["done"]
            self._batch_done(len(rows), frame["busy"], frame.get("to_device"))
            if self.traced is not None:
                self.traced([job for row in rows if (job := self._jobs.get(row[0])) is not None], frame["busy"])
            jobs, done = self._forget([row[0] for row in rows]), []
            for number, preprocess_ms, process_ms, result, error in rows:
                job = jobs.get(number)
                if job is None:
                    continue
                job.timings_ms["preprocess"] = preprocess_ms
                job.timings_ms["process"] = process_ms
                if error is not None:
                    self._failed(job, job_error(*error))
                else:
                    job.result = result
                    done.append(job)
            self._done(done)

    def _forget(self, numbers: list[int]) -> dict[int, Job]:
        """Those of these that are held, and are from now on no more."""
        with self._room:
            jobs = {number: job for number in numbers if (job := self._jobs.pop(number, None)) is not None}
            self._room.notify()
        for job in jobs.values():
            job.drop_image()
        return jobs

    def _bring_back(self, link: ModelLink) -> None:
        """Start a new process and give it what the old one held, the suspects apart."""
        how = link.how_it_ended()
        self._restarts += 1
        self.restarts += 1
        self._brought_back()
        guilty, self._batch_since = self._suspects | self._decoding, None
        self._suspects, self._decoding = set(), set()
        log.error("the model process ended", pid=link.pid, ended=how, held=len(self._jobs), in_process=len(guilty))
        for job in self.held():
            if job.number in guilty:
                job.kills += 1
                if len(guilty) == 1 and job.kills >= KILLS and self._forget([job.number]):
                    self._restarts = 0  # found: what ended it will not come again
                    self._failed(job, ProcessFailed(f"its process ended while running on this image ({how})"))
        if self._restarts > MAX_RESTARTS:
            raise WorkerFailed(f"the model process ends again and again ({how}), no image at fault")
        new = self._starting = ModelLink(self._config, self._arena_fd)
        try:
            new.wait_ready(self._patience)
        except StartupError:
            new.kill()
            raise
        self._starting = None
        if self._stopping:
            new.kill()
            return
        with self._room:
            self._link = new
            self._progress_at = self._clock.monotonic()
            again = list(self._jobs.values())
        log.warning("the model process is back", pid=new.pid, images_begun_again=len(again))
        new.submit([_descriptor(job) for job in again])

    def _watch(self) -> None:
        """End a model process that is stuck in ``process``, or holds images and says nothing at all."""
        pause = threading.Event()
        limit = self._config.stall_timeout
        while not self._stopping and self.failure is None:
            pause.wait(LOOK_S)
            now, since, link = self._clock.monotonic(), self._batch_since, self._link
            stuck = since is not None and now - since > limit
            # While a result waits for room, frames lie unread, and the silence is not the process's.
            silent = bool(self._jobs) and not self._taking and now - self._progress_at > limit * SILENCE_FACTOR
            if (stuck or silent) and link is not None and not self._stopping:
                log.error("the model process hangs; it is ended", pid=link.pid, in_process=stuck)
                self._progress_at, self._batch_since = now, None
                link.kill(dump=True)


def _descriptor(job: Job) -> tuple[int, int, int, bool]:
    assert job.image is not None
    return job.number, job.image.offset, job.image.length, job.alone
