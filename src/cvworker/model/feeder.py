"""Runs the DataLoader: hands out descriptors, takes chunks back, and finds the image that killed a worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import structlog
import torch
from torch.utils.data import DataLoader

from cvworker.errors import JobError, PreprocessFailed, job_error
from cvworker.model.batcher import Sample
from cvworker.model.chunk import Chunk
from cvworker.model.config import ModelConfig
from cvworker.model.preprocess import (
    DESCRIPTOR,
    SLOT_NUMBER,
    SLOT_PID,
    SLOT_SINCE,
    Encoded,
    Images,
    start_worker,
)
from cvworker.model.slabs import Slabs
from cvworker.module import Module

LOOK_S = 0.5
"""The loader's timeout: how soon the death of an idle loader's worker is noticed."""
MAX_REBUILDS = 5
"""Loaders lost one after the other without a single image between them, before the process gives up."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image in the loader."""

    number: int
    offset: int
    length: int
    alone: bool
    for_device: bool

    def descriptor(self) -> bytes:
        return DESCRIPTOR.pack(self.number, self.offset, self.length, self.for_device)


class Feeder:
    """Owns the DataLoader and the table of images given to it and not yet back.

    When a worker dies or hangs, the image it was on is answered, the loader is built anew, and the images that were
    in it begin again; their bytes are still in the arena.
    """

    def __init__(
        self,
        config: ModelConfig,
        arena_fd: int,
        module: Module,
        *,
        pin: bool,
        deliver: Callable[[list[Sample]], None],
        failed: Callable[[int, JobError], None],
    ) -> None:
        self._config = config
        self._arena_fd = arena_fd
        self._module = module
        self._pin = pin
        self._deliver = deliver
        self._failed = failed
        self.on_device = False
        """Whether pictures that the device can decode are left encoded; then each comes back to :meth:`settle` or
        :meth:`decode_here`."""
        self._pending: dict[int, _Entry] = {}
        self._lent: dict[int, _Entry] = {}
        self._unsent: deque[bytes] = deque()
        self._outlet: socket.socket | None = None
        self._slabs: Slabs | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._broken = threading.Event()
        self._rebuilds = 0
        self._slots = torch.zeros(max(1, config.preprocess_workers), 3, dtype=torch.float64)
        self._slots.share_memory_()  # type: ignore[no-untyped-call]

    def submit(self, jobs: list[tuple[int, int, int, bool]]) -> None:
        """Hand over images: number, offset, length, and whether it must be alone in its batch."""
        with self._lock:
            for number, offset, length, alone in jobs:
                # What is suspect is decoded apart from other pictures, by a process whose end does no harm.
                entry = _Entry(number, offset, length, alone, self.on_device and not alone)
                self._pending[number] = entry
                self._unsent.append(entry.descriptor())
        self._pump()

    def settle(self, number: int) -> None:
        """The device has decoded this picture."""
        with self._lock:
            self._lent.pop(number, None)
        self._pump()

    def decode_here(self, number: int) -> None:
        """The device has not decoded this picture: it goes through the loader once more, to be decoded there."""
        with self._lock:
            entry = replace(self._lent.pop(number), for_device=False)
            self._pending[number] = entry
            self._unsent.append(entry.descriptor())
        self._pump()

    def close(self) -> None:
        """No more images will come: workers end when they have taken what waits."""
        self._stopped = True
        self._pump()

    def run(self) -> None:
        """Iterate until closed and empty; the thread of this method is the loader's."""
        while True:
            iterator, workers = self._build()
            self._consume(iterator, workers)
            if not self._pending and self._stopped:
                return
            self._bury(workers)
            del iterator  # joins its workers, which are dead by now

    def wait_until_started(self, timeout: float) -> bool:
        """Whether every worker has made its module and waits for images."""
        until = time.monotonic() + timeout
        while bool((self._slots[:, SLOT_PID] == 0).any()):
            if time.monotonic() > until or self._broken.is_set():
                return False
            time.sleep(0.01)
        return True

    def _build(self) -> tuple[Iterator[Chunk], list[BaseProcess]]:
        outlet, inlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        outlet.setblocking(False)
        count = self._config.preprocess_workers
        self._slabs = Slabs(count) if count else None
        module = None if count else self._module
        dataset = Images(self._config, inlet.fileno(), self._arena_fd, self._slots, self._slabs, module)
        loader: DataLoader[Chunk] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=count,
            pin_memory=self._pin,
            in_order=False,
            timeout=LOOK_S if count else 0,
            worker_init_fn=start_worker,
            multiprocessing_context="forkserver" if count else None,
            prefetch_factor=2 if count else None,
        )
        before = set(multiprocessing.active_children())
        iterator: Iterator[Chunk] = iter(loader)
        workers = [child for child in multiprocessing.active_children() if child not in before]
        with self._lock:
            self._outlet = outlet
            self._unsent = deque(entry.descriptor() for entry in self._pending.values())
        if count:
            inlet.close()  # the workers have their own
        else:
            self._inlet = inlet  # kept open: the dataset reads it in this process
        self._pump()
        return iterator, workers

    def _consume(self, iterator: Iterator[Chunk], workers: list[BaseProcess]) -> None:
        """Take what the loader gives until it ends or one of its workers does."""
        self._broken.clear()
        threading.Thread(target=self._watch, args=(workers,), name="watch-loader", daemon=True).start()
        while not self._broken.is_set():
            try:
                chunk = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError):
                # Nothing came within LOOK_S; or a worker has died, perhaps in handing over a chunk and not yet buried.
                if not workers:
                    raise
                if not self._stopped and any(not worker.is_alive() for worker in workers):
                    return
                continue
            self._take(chunk)

    def _take(self, chunk: Chunk) -> None:
        self._rebuilds = 0
        for number, name, text in chunk.failures:
            if self._forget(number) is not None:
                self._failed(number, job_error(name, text))
        samples = []
        values = chunk.unpack(self._slabs, pin=self._pin)
        for number, milliseconds, value in zip(chunk.numbers, chunk.milliseconds, values, strict=True):
            entry = self._forget(number, lend=isinstance(value, Encoded))
            if entry is not None:
                samples.append(Sample(number, value, milliseconds, entry.alone))
        self._deliver(samples)
        self._pump()

    def _forget(self, number: int, *, lend: bool = False) -> _Entry | None:
        """Take an image off the table, or None if it was not there (begun twice by a rebuild).

        With ``lend`` it may come back, and the loader's processes stay for it.
        """
        with self._lock:
            entry = self._pending.pop(number, None)
            if lend and entry is not None:
                self._lent[number] = entry
            return entry

    def _pump(self) -> None:
        """Send descriptors while the socket takes them: a full one must not block who submits."""
        with self._lock:
            if self._outlet is None:
                return
            try:
                while self._unsent:
                    self._outlet.send(self._unsent[0])
                    self._unsent.popleft()
                if self._stopped and not self._lent:
                    self._outlet.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                pass
            except OSError:  # the readers are gone: the rebuild sends everything again
                pass

    def _watch(self, workers: list[BaseProcess]) -> None:
        """Notice at once when a worker dies, and end one that is stuck on an image."""
        sentinels = [worker.sentinel for worker in workers]
        while sentinels and not self._stopped and not self._broken.is_set():
            if wait(sentinels, timeout=min(1.0, self._config.stall_timeout / 4)):
                if not self._stopped:
                    self._broken.set()
                return
            now = time.monotonic()
            for row in self._slots.tolist():
                if row[SLOT_NUMBER] and now - row[SLOT_SINCE] > self._config.stall_timeout:
                    log.error("preprocess hangs; its process is ended", job=int(row[SLOT_NUMBER]))
                    os.kill(int(row[SLOT_PID]), signal.SIGKILL)

    def _bury(self, workers: list[BaseProcess]) -> None:
        """Answer what the dead workers were on, end the others, and clear the table for a new loader."""
        dead = {worker.pid: worker.exitcode for worker in workers if not worker.is_alive()}
        if not any(row[SLOT_NUMBER] for row in self._slots.tolist() if int(row[SLOT_PID]) in dead):
            self._rebuilds += 1
        for row in self._slots.tolist():
            number, pid = int(row[SLOT_NUMBER]), int(row[SLOT_PID])
            if number and pid in dead and self._forget(number) is not None:
                how = _how_it_ended(dead[pid])
                log.error("a preprocess process ended on an image", job=number, pid=pid, ended=how)
                self._failed(number, PreprocessFailed(f"its process ended while preparing this image ({how})"))
        if self._rebuilds > MAX_REBUILDS:
            raise RuntimeError("the DataLoader's processes end again and again without an image at fault")
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid or 0, signal.SIGKILL)
        with self._lock:
            if self._outlet is not None:
                self._outlet.close()
            self._outlet = None
        self._slots.zero_()
        log.warning("the DataLoader is built anew", images_begun_again=len(self._pending))


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"
