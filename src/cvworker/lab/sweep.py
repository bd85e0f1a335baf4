"""One series after the other over rising batch sizes, and back: what fits, how fast it is, what it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cvworker import memory
from cvworker.lab import timing
from cvworker.lab.machine import gpu_utilisation
from cvworker.lab.results import Pass, Point, Series, Status, measured
from cvworker.lab.subject import Subject
from cvworker.lab.variants import Variant, wearing
from cvworker.memory import is_out_of_memory
from cvworker.model.batch_size import Doubling
from cvworker.model.preprocess import describe

ROOM = 0.8
"""Of the memory that is available: on the CPU a batch that would take more is not tried, as nothing would catch it."""

Tell = Callable[[str], object]


class Steps(Protocol):
    """Batch sizes, one after the other: :class:`cvworker.model.batch_size.Doubling`, or a list."""

    next: int | None

    def measured(self, images_s: float) -> None: ...

    def ended(self) -> None: ...


class Listed:
    """Batch sizes as they were asked for."""

    def __init__(self, batches: Sequence[int]) -> None:
        self._rest = list(batches)
        self.next: int | None = self._rest.pop(0)

    def measured(self, images_s: float) -> None:
        self.next = self._rest.pop(0) if self._rest else None

    def ended(self) -> None:
        self.next = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One series: what is timed, and how."""

    subject: Subject
    kind: Series
    variant: Variant
    megapixels: float | None = None

    def __str__(self) -> str:
        size = "" if self.megapixels is None else f" {self.megapixels:g} MP"
        return f"{self.kind} {self.variant}{size}"

    def batch(self, count: int) -> timing.Batch:
        """What runs one batch of ``count``."""
        make = self.subject.network_batch if self.kind == "network" else self.subject.process_batch
        return make(count, self.megapixels)


@dataclass
class _Found:
    """One batch size so far."""

    passes: list[Pass] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    device: list[int] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    problem: str = ""


@dataclass
class _Series:
    """A plan, what was found by it, and where and why it ended, if not by its own steps."""

    plan: Plan
    found: dict[int, _Found] = field(default_factory=dict)
    end: tuple[int, Status, str] | None = None

    def points(self) -> list[Point]:
        points = [_point(self.plan, batch, each) for batch, each in self.found.items() if each.passes]
        if self.end is not None:
            points.append(_bare(self.plan, *self.end))
        return points


class Sweep:
    """Measures series, each point in two passes: one by :meth:`rise`, one by :meth:`fall` when all series have risen.

    So the passes of a point lie as far apart in time as can be, and a machine whose clock changes shows it. A series
    ends where memory does: the device's, or what is left of the host's, or ``memory_limit`` bytes.
    """

    def __init__(
        self,
        *,
        seconds: float,
        batches: Sequence[int] = (),
        memory_limit: int | None = None,
        tell: Tell = lambda _what: None,
    ) -> None:
        self._series: list[_Series] = []
        self._seconds = seconds
        self._batches = batches
        self._limit = memory_limit
        self._tell = tell

    @property
    def points(self) -> list[Point]:
        """What there is by now, also after an interruption."""
        return [point for series in self._series for point in series.points()]

    def rise(self, plan: Plan) -> None:
        """Measure one series over rising batch sizes. What its network raises ends it, and is a point that says so."""
        series = _Series(plan)
        self._series.append(series)
        # The first batch alone for a series over megapixels: what grows with the picture grows in every batch alike.
        steps: Steps = Listed(self._batches[:1] or [1]) if plan.megapixels is not None else self._steps()
        try:
            with wearing(plan.subject, plan.variant) as worn:
                series.end = self._rise(plan, steps, series.found, worn.for_batch)
        except Exception as error:  # putting it on; batches are caught where they run
            series.end = (steps.next or 1, "failed", describe(error))

    def fall(self, step: Callable[[], object] = lambda: None) -> None:
        """Measure every point once more, the last first; ``step`` is called after each series."""
        for series in reversed(self._series):
            try:
                with wearing(series.plan.subject, series.plan.variant) as worn:
                    for batch, found in reversed(series.found.items()):
                        self._fall(series.plan, batch, found, worn.for_batch)
            except Exception as error:
                for found in series.found.values():
                    found.problem = f"it failed in the second pass: {describe(error)}"
            step()

    def _steps(self) -> Steps:
        return Listed(self._batches) if self._batches else Doubling()

    def _rise(
        self, plan: Plan, steps: Steps, found: dict[int, _Found], for_batch: Callable[[int], None]
    ) -> tuple[int, Status, str] | None:
        """Measure each batch size once; why the series ended, if it was not by its own steps."""
        base = memory.resident_bytes()
        while (batch := steps.next) is not None:
            if why := self._no_room(found, batch, base, plan.subject.device):
                return batch, "out of memory", why
            self._tell(f"{plan}, batch {batch}")
            found[batch] = _Found()
            try:
                self._measure(plan, batch, found[batch], for_batch)
            except Exception as error:
                del found[batch]
                status: Status = "out of memory" if is_out_of_memory(error) else "failed"
                return batch, status, describe(error)
            finally:
                _release(plan.subject.device)
            point = _point(plan, batch, found[batch])
            steps.measured(point.images_s or 0.0)
            if self._limit is not None and (point.memory_bytes() or 0) > self._limit:
                return None  # the next would be further beyond it
        return None

    def _fall(self, plan: Plan, batch: int, found: _Found, for_batch: Callable[[int], None]) -> None:
        self._tell(f"{plan}, batch {batch}, once more")
        try:
            self._measure(plan, batch, found, for_batch)
        except Exception as error:
            found.problem = f"it failed in the second pass: {describe(error)}"
        finally:
            _release(plan.subject.device)

    def _measure(self, plan: Plan, batch: int, found: _Found, for_batch: Callable[[int], None]) -> None:
        device = plan.subject.device
        on_gpu = device.type == "cuda"
        guard: Any = nullcontext() if on_gpu else memory.data_limit(int(ROOM * memory.available_bytes()))
        with guard:
            run = plan.batch(batch)
            for_batch(batch)
            memory.reset_peak()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            timing.warm_up(run, self._seconds)
            found.paces.append(timing.pace(device))
            found.passes.append(timing.measure(run, batch, self._seconds))
            found.paces.append(timing.pace(device))
        found.host.append(memory.peak_bytes())
        if on_gpu:
            found.device.append(torch.cuda.max_memory_allocated(device))
            busy = gpu_utilisation(device)
            found.busy += [] if busy is None else [busy]

    def _no_room(self, found: dict[int, _Found], batch: int, base: int, device: torch.device) -> str:
        """Why this batch would not fit into the host's memory, going by the one before it; empty where it would.

        What a batch takes grows with its size, or less.
        """
        if not found or device.type == "cuda":
            return ""
        before = max(found)
        needed = (max(found[before].host) - base) * batch / before
        available = memory.available_bytes()
        if needed <= ROOM * available:
            return ""
        return f"it would take {needed / 2**30:.1f} GiB of the {available / 2**30:.1f} GiB that are free"


def _point(plan: Plan, batch: int, found: _Found) -> Point:
    numbers = measured(found.passes, batch)
    if found.problem or len(found.passes) < 2:
        numbers |= {"status": "unstable", "why": found.problem or "interrupted before its second pass"}
    return Point(
        series=plan.kind,
        precision=plan.variant.precision,
        format=plan.variant.format,
        batch=batch,
        megapixels=plan.megapixels,
        host_memory_bytes=max(found.host, default=None),
        device_memory_bytes=max(found.device, default=None),
        utilisation=sum(found.busy) / len(found.busy) if found.busy else None,
        passes=found.passes,
        paces=found.paces,
        **numbers,
    )


def _bare(plan: Plan, batch: int, status: Status, why: str) -> Point:
    """A point that says only why there are no numbers."""
    variant = plan.variant
    return Point(
        series=plan.kind,
        precision=variant.precision,
        format=variant.format,
        batch=batch,
        megapixels=plan.megapixels,
        status=status,
        why=why,
    )


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
