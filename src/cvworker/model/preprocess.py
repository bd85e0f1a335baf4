"""Decode and ``preprocess`` in a DataLoader's worker processes, fed from a live queue."""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import resource
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import context, reduction
from typing import Any, cast

import numpy as np
import structlog
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset, get_worker_info

from cvworker import heap, images
from cvworker.baseline import Baseline, baseline
from cvworker.errors import JobError, PreprocessFailed, crosses
from cvworker.loading import load, make
from cvworker.model.chunk import Chunk
from cvworker.model.config import ModelConfig
from cvworker.model.slabs import Slabs
from cvworker.module import Module
from cvworker.observe.logs import configure

DESCRIPTOR = struct.Struct("<QQQ?")
"""What a worker pulls: the job's number, where its bytes are in the arena (offset, length), and whether it may leave
the picture to the device's decoder."""
SLOT_NUMBER, SLOT_SINCE, SLOT_PID = range(3)
MAX_TEXT = 500
BYTES_PER_PIXEL = 12
"""What a decoder needs at most for each pixel allowed: the image, a copy turned or converted, and working space."""
MEMORY_BESIDE_IMAGE = 1024**3
"""For what ``preprocess`` itself needs."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """In the place of a sample: a picture left to the device, where its bytes are and what they say of it."""

    offset: int
    jpeg: Baseline


class Images(IterableDataset[Chunk]):
    """Pulls descriptors from a socket, several at a time, and yields chunks of samples.

    Workers pull rather than being fed by a sampler, which would have to spin or hold back finished work. The socket
    keeps message borders and hands each to one reader without a lock, so a worker that is killed while it waits
    takes nothing with it.
    """

    def __init__(
        self,
        config: ModelConfig,
        inlet: int,
        arena: int,
        slots: torch.Tensor,
        slabs: Slabs | None,
        module: Module | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._inlet = inlet
        self._arena = arena
        self._slots = slots
        self._slabs = slabs
        self._module = module

    def __getstate__(self) -> dict[str, Any]:
        assert context.get_spawning_popen() is not None, "descriptors travel only to a process being started"
        return {
            "config": self._config,
            "inlet": reduction.DupFd(self._inlet),
            "arena": reduction.DupFd(self._arena),
            "slots": self._slots,
            "slabs": self._slabs,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        inlet, arena = state["inlet"].detach(), state["arena"].detach()
        self.__init__(state["config"], inlet, arena, state["slots"], state["slabs"])  # type: ignore[misc]

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        config = self._config
        if self._module is None:
            self._module = make(load(config.module), config.weights)
        memory = memoryview(mmap.mmap(self._arena, config.arena_size, access=mmap.ACCESS_READ))
        inlet = socket.socket(fileno=os.dup(self._inlet))
        inlet.setblocking(True)
        row = self._slots.numpy()[info.id if info else 0]  # a tensor would take microseconds to set an element of
        row[SLOT_PID] = os.getpid()
        if info is not None:
            configure(config.log_format, config.log_level)  # a process of its own: nothing is inherited
            limit_memory(config.max_image_pixels)
            heap.settle(forked=True)
            while wanted := _pull(inlet, config.chunk, info.num_workers):
                chunk = self._chunk([self._one(memory, each, row) for each in wanted])
                yield chunk.pack(self._slabs, info.id) if self._slabs is not None else chunk
            return
        threads = os.cpu_count() or 1  # workers == 0: the same work on threads of this process
        with ThreadPoolExecutor(threads, "preprocess", _single_thread) as pool:
            while wanted := _pull(inlet, max(config.chunk, threads), 1):
                yield self._chunk(list(pool.map(lambda each: self._one(memory, each, None), wanted)))

    def _one(
        self, memory: memoryview, descriptor: bytes, row: np.ndarray | None
    ) -> tuple[int, float, Any, JobError | None]:
        number, offset, length, for_device = DESCRIPTOR.unpack(descriptor)
        module, config = cast(Module, self._module), self._config
        began = time.perf_counter()
        if row is not None:
            row[SLOT_SINCE] = time.monotonic()
            row[SLOT_NUMBER] = number
        data = memory[offset : offset + length]
        sample, error = None, None
        if for_device and (jpeg := baseline(data, config.max_image_pixels)) is not None:
            sample = Encoded(offset, jpeg)
        else:
            sample, error = sample_of(module, data, config.max_image_pixels, job=number, crosses_border=row is not None)
        if row is not None:
            row[SLOT_NUMBER] = 0
        return number, (time.perf_counter() - began) * 1000, sample, error

    @staticmethod
    def _chunk(done: list[tuple[int, float, Any, JobError | None]]) -> Chunk:
        chunk = Chunk()
        for number, milliseconds, sample, error in done:
            if error is not None:
                chunk.failures.append((number, type(error).__name__, error.message))
            else:
                chunk.numbers.append(number)
                chunk.milliseconds.append(milliseconds)
                chunk.samples.append(sample)
        return chunk


def sample_of(
    module: Module, data: memoryview, max_pixels: int, *, job: int, crosses_border: bool
) -> tuple[Any, JobError | None]:
    """Decode one image and ``preprocess`` it: the sample, or why there is none.

    With ``crosses_border`` a sample that could not be sent to another process is refused here.
    """

    def prepare() -> Any:
        image = images.decode(data, image_type=module.image_type, min_side=module.min_side, max_pixels=max_pixels)
        sample = module.preprocess(image)
        if crosses_border:
            _check_crossing(sample)
        return sample

    return guarded(prepare, job=job)


def guarded(prepare: Callable[[], Any], *, job: int) -> tuple[Any, JobError | None]:
    """The sample that ``prepare`` makes of an image with the module's ``preprocess``, or why there is none."""
    try:
        return prepare(), None
    except torch.OutOfMemoryError:  # the device's, and not this image's doing
        raise
    except JobError as refused:
        return None, refused if crosses(refused) else PreprocessFailed(describe(refused))
    except (Exception, SystemExit) as raised:  # the module's own: this image's, not the worker's
        log.warning("preprocess raised", job=job, exc_info=True)
        return None, PreprocessFailed(describe(raised))


def start_worker(_worker_id: int) -> None:
    """What each DataLoader process does first: a stop is told by the inlet's end, not by the terminal's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_grad_enabled(False)  # a sample that wants gradients could not leave this process
    threading.Thread(target=_end_with_the_model_process, name="parent", daemon=True).start()


def _check_crossing(sample: Any) -> None:
    """Raise here, where the image is known, what would lose its chunk without a word in the queue to the consumer."""
    for leaf in pytree.tree_leaves(sample):
        if not isinstance(leaf, (torch.Tensor, int, float, str)):
            reduction.ForkingPickler.dumps(leaf)


def _end_with_the_model_process() -> None:
    """The fork server and its children keep each other alive: neither would notice that the model process is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def limit_memory(max_pixels: int) -> None:
    """Let a decoder that goes astray fail rather than take the machine along.

    The data segment and not the address space: CUDA and shared mappings reserve far more than they use.
    """
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = now + BYTES_PER_PIXEL * max_pixels + MEMORY_BESIDE_IMAGE
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def describe(error: BaseException) -> str:
    """An exception as a client may read it: type and text on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_TEXT] if text else type(error).__name__


def _pull(inlet: socket.socket, at_most: int, workers: int) -> list[bytes]:
    """Wait for a descriptor, and take this worker's share of what else waits; empty at the end."""
    first = inlet.recv(DESCRIPTOR.size)
    if not first:
        return []
    wanted = [first]
    waiting = _bytes_waiting(inlet) // DESCRIPTOR.size
    for _ in range(min(at_most - 1, -(-waiting // workers))):
        try:
            more = inlet.recv(DESCRIPTOR.size, socket.MSG_DONTWAIT)
        except BlockingIOError:  # another worker took it
            break
        if not more:
            break
        wanted.append(more)
    return wanted


def _bytes_waiting(inlet: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(inlet, termios.FIONREAD, b"\0\0\0\0"))[0])


def _single_thread() -> None:
    torch.set_num_threads(1)
    threading.current_thread().name = "preprocess"
