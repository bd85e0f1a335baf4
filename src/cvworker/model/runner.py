"""One batch through ``process``: results for the good samples, an error for each guilty one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch.utils import _pytree as pytree

from cvworker.errors import JobError, ProcessFailed, without_frames
from cvworker.model.batcher import Sample
from cvworker.model.precision import PRECISIONS
from cvworker.model.preprocess import describe
from cvworker.module import Module

PATIENCE = 64
"""Full batches that must go well after the device ran out of memory, before larger ones are tried again."""
MAX_PATIENCE = 4096

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Copy:
    """A batch's way to a CUDA device, in events of the copy stream."""

    begun: torch.cuda.Event
    ended: torch.cuda.Event
    ready: torch.cuda.Event
    """When the batch may be computed with; after ``ended`` where parts of it were put together on the device."""

    def seconds(self) -> float:
        """How long it took, by the device's clock. Waits until it is over."""
        self.ended.synchronize()
        return float(self.begun.elapsed_time(self.ended)) / 1000


@dataclass(slots=True)
class Staged:
    """A batch on its way: the samples it was made of, and what :meth:`Runner.stage` made of them."""

    samples: list[Sample]
    batch: Any = None
    copy: Copy | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Done:
    """What became of one sample: its result as JSON text, or an error."""

    sample: Sample
    process_ms: float
    result: str | None = None
    error: JobError | None = None


class BatchLimit:
    """How large a batch may be: less after the device ran out of memory, and more again after a while.

    Whatever took the memory may be gone: another process, or a batch of unusually large samples. After
    :data:`PATIENCE` full batches the limit doubles, up to what it was. Each time the device runs out again that number
    doubles, up to :data:`MAX_PATIENCE`, so that a device which is simply too small loses little time to trying; it
    is :data:`PATIENCE` again once batches of the first size have gone well for that long.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._wanted = size
        self._patience = PATIENCE // 2
        self._well = 0
        self._fitted = True

    def ran_out(self, fits: int) -> None:
        """A batch did not fit; ``fits`` is the size to go on with, unless it is smaller already."""
        if fits < self.size:
            self.size = fits
            if self._fitted:  # and not the next halving of the same batch
                self._patience = min(2 * self._patience, MAX_PATIENCE)
        self._well, self._fitted = 0, False

    def went_well(self, count: int) -> None:
        """A batch of ``count`` samples fitted; only full ones say something about the limit."""
        if count < self.size:
            return
        self._fitted = True
        self._well += 1
        if self._well < self._patience:
            return
        self._well = 0
        if self.size < self._wanted:
            self.size = min(2 * self.size, self._wanted)
            log.info("the device's memory is enough again; larger batches are tried", batch_size=self.size)
        else:
            self._patience = PATIENCE // 2


class Runner:
    """Runs a module's ``collate`` and ``process`` on a device.

    ``stage`` and ``run`` belong to two threads: while one batch computes, the next is collated and copied.
    """

    def __init__(self, module: Module, device: torch.device, precision: str, batch_size: int) -> None:
        self._module = module
        self._device = device
        self.precision = precision
        """``fp32``, or what ``process`` is run in by ``autocast``: ``bf16`` or ``fp16``."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        """Where batches are made and copied to a CUDA device, while its current stream computes."""
        self._limit = BatchLimit(batch_size)

    @property
    def batch_size(self) -> int:
        """The largest batch that goes to ``process``; halved when the device runs out of memory, and recovering."""
        return self._limit.size

    def limit_to(self, batch_size: int) -> None:
        """Let batches be as large as this from now on."""
        self._limit = BatchLimit(batch_size)

    def stage(self, samples: list[Sample]) -> Staged:
        """Collate samples and begin their copy to the device; an error is kept for :meth:`run` to deal with."""
        staged = Staged(samples)
        try:
            staged.batch, staged.copy = self._collate(samples)
        except Exception as error:  # collate is the module's
            staged.error = _noted(samples, error)
        return staged

    def run(self, staged: Staged) -> list[Done]:
        """Results for a staged batch, in order; samples that fail are tried one by one, so only the guilty one does."""
        done, error = self._attempt(staged)
        if error is None:
            self._limit.went_well(len(done))
            return done
        # Out here neither the error's frames nor the batch keep memory on the device that the next try needs.
        staged.batch = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # raises again, and ends this process, if the device is lost for it
        if isinstance(error, torch.OutOfMemoryError):
            return self._halve(staged.samples, error)
        return self._one_by_one(staged.samples, error)

    def _attempt(self, staged: Staged) -> tuple[list[Done], Exception | None]:
        """Results for a batch, or why there are none."""
        if staged.error is not None:
            return [], staged.error
        try:
            if staged.copy is not None:
                torch.cuda.current_stream(self._device).wait_event(staged.copy.ready)
                _keep(staged.batch, torch.cuda.current_stream(self._device))
            began = time.perf_counter()
            results = self._process(staged.batch, len(staged.samples))
            took = (time.perf_counter() - began) * 1000
        except Exception as error:  # process is the module's
            return [], _noted(staged.samples, error)
        done = [_encoded(sample, took, result) for sample, result in zip(staged.samples, results, strict=True)]
        return done, None

    def trial(self, samples: list[Sample]) -> list[Done]:
        """As :meth:`stage` and :meth:`run`, but what the module raises comes out: for warm-up and checks."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self._device))  # samples may have been made on it
        batch, copy = self._collate(samples)
        if copy is not None:
            copy.ready.synchronize()
        began = time.perf_counter()
        results = self._process(batch, len(samples))
        took = (time.perf_counter() - began) * 1000
        done = [_encoded(sample, took, result) for sample, result in zip(samples, results, strict=True)]
        for each in done:
            if each.error is not None:
                raise each.error
        return done

    def _process(self, batch: Any, size: int) -> Sequence[Any]:
        with torch.inference_mode(), self.autocast():
            results = self._module.process(batch)
        if isinstance(results, (str, bytes, Mapping)) or not isinstance(results, Sequence):
            raise ProcessFailed(f"process returned {type(results).__name__}, not a sequence of results")
        if len(results) != size:
            raise ProcessFailed(f"process returned {len(results)} results for a batch of {size}")
        return results

    def _one_by_one(self, samples: list[Sample], error: Exception) -> list[Done]:
        if len(samples) == 1:
            failure = error if type(error) is ProcessFailed else ProcessFailed(describe(error))
            return [Done(samples[0], 0.0, error=failure)]
        log.warning(
            "process failed for a batch; its samples are tried one by one", batch=len(samples), error=describe(error)
        )
        return [done for sample in samples for done in self.run(self.stage([sample]))]

    def _halve(self, samples: list[Sample], error: Exception) -> list[Done]:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(samples) == 1:
            return self._one_by_one(samples, error)
        half = len(samples) // 2
        self._limit.ran_out(half)
        log.warning("out of device memory; the batch is halved", batch_size=self.batch_size)
        done: list[Done] = []
        while len(done) < len(samples):  # a part may make the limit smaller still, and the next ones with it
            done += self.run(self.stage(samples[len(done) : len(done) + self.batch_size]))
        return done

    def _collate(self, samples: list[Sample]) -> tuple[Any, Copy | None]:
        values: Any = [sample.value for sample in samples]
        if self.stream is None:
            return self._module.collate(values), None
        with torch.cuda.stream(self.stream):
            mixed = any(map(_is_on_cuda, values))  # some were decoded there, and the others join them
            host = pytree.tree_map_only(torch.Tensor, _pinned, values if mixed else self._module.collate(values))
            begun = _event(self.stream)
            batch = pytree.tree_map_only(torch.Tensor, self._to_device, host)
            ended = ready = _event(self.stream)
            if mixed:
                batch = pytree.tree_map_only(torch.Tensor, self._to_device, self._module.collate(batch))
                ready = _event(self.stream)
        return batch, Copy(begun, ended, ready)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return _pinned(tensor).to(self._device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """What ``process`` runs in, for its precision."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype=dtype)


def _is_on_cuda(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(value))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" and not tensor.is_pinned() else tensor


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Recorded now, and made to be timed by."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _keep(batch: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that the compute stream uses what the copy stream allocated."""
    pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.record_stream(stream), batch)


def _encoded(sample: Sample, took: float, result: Any) -> Done:
    if not isinstance(result, Mapping):
        error = ProcessFailed(f"process returned {type(result).__name__} as a result, not a mapping")
        return Done(sample, took, error=error)
    try:
        return Done(sample, took, result=json.dumps(result, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        return Done(sample, took, error=ProcessFailed(f"the result is not JSON: {describe(error)}"))


def _noted(samples: list[Sample], error: Exception) -> Exception:
    """Log why a sample failed by itself, and return the error without the frames that hold its tensors."""
    if len(samples) == 1:
        shown = None if isinstance(error, ProcessFailed) else error
        log.warning("process failed", job=samples[0].number, error=describe(error), exc_info=shown)
    return without_frames(error)
