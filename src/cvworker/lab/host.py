"""Decoding and preprocessing on the CPU: what one core does alone, and what the worker's own processes do together."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import structlog
import torch

from cvworker import images
from cvworker.arena import Arena
from cvworker.errors import WorkerFailed
from cvworker.lab.results import HostPoint, Picture, Step, judged, processes, steady
from cvworker.lab.timing import MOST_WINDOWS, WINDOWS, pace
from cvworker.model.batcher import Sample
from cvworker.model.config import ModelConfig
from cvworker.model.feeder import Feeder
from cvworker.model.preprocess import describe
from cvworker.module import Module
from cvworker.tuning import preprocess_workers

WIDTH, HEIGHT = 1024, 683
"""Of the usual picture, in pixels: a photograph scaled for the web, which JPEG makes about 160 kB of."""
OTHER_MEGAPIXELS = (0.25, 4.0)
"""Pictures besides, to see how the time grows."""
QUALITY, GRAIN = 85, 5.0
START_S = 60.0
PASSES = 2
IN_FLIGHT = 32
"""Pictures handed over for each DataLoader process: two chunks of eight that it has, and two to take up."""

CPU = torch.device("cpu")

Tell = Callable[[str], object]
log = structlog.get_logger(__name__)


def worker_counts(cores: int) -> list[int]:
    """1, 2, 4, … and the number that ``preprocess_workers: auto`` takes."""
    most = preprocess_workers(cores)
    return sorted({most, *(1 << n for n in range(most.bit_length()) if 1 << n <= most)})


def photo(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A JPEG like a photograph to a decoder: soft gradients, edges and grain, the same for the same size."""
    random = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = ((90, 150), (200, 110), (140, 250))
    pixels = np.stack([128 + 60 * np.sin(x / across) + 50 * np.cos(y / down) for across, down in waves], 2)
    for _ in range(40):
        left, top, radius = random.uniform((0, 0, 10), (width, height, 120))
        pixels[(x - left) ** 2 + (y - top) ** 2 < radius**2] += random.uniform(-90, 90, 3).astype(np.float32)
    pixels += random.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
    return bytes(simplejpeg.encode_jpeg(np.clip(pixels, 0, 255).astype(np.uint8), quality=QUALITY))


def picture_of(data: bytes, max_pixels: int) -> Picture:
    """What kind of picture these bytes are. Raises JobError where they are none that a worker would take."""
    image: Any = images.decode(data, image_type="pil", max_pixels=max_pixels)
    found = images.FORMATS.match(data)
    assert found is not None
    return Picture(format=str(found.lastgroup), width=image.width, height=image.height, bytes=len(data))


@dataclass
class _Found:
    """One thing that is measured, so far."""

    passes: list[list[float]] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    problem: str = ""


class Host:
    """Measures decode and preprocess, a pass with each :meth:`run`; ``points`` holds what there is at any time."""

    def __init__(
        self,
        module: Module,
        config: ModelConfig,
        own: bytes | None,
        *,
        seconds: float,
        tell: Tell = lambda _what: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._module = module
        self._config = config
        self._usual = own or photo()
        sizes = [] if own else [_photo_of(megapixels) for megapixels in OTHER_MEGAPIXELS]
        self._pictures = {data: picture_of(data, config.max_image_pixels) for data in (self._usual, *sizes)}
        self._seconds = seconds
        self._tell = tell
        self._clock = clock
        self._found: dict[tuple[Step, int, Picture], _Found] = {}

    @property
    def points(self) -> list[HostPoint]:
        """What there is by now, also after an interruption."""
        return [_point(*key, found) for key, found in self._found.items()]

    def run(self) -> None:
        """Measure the usual picture on one core and with DataLoader processes, and the other sizes on one core."""
        for data in self._pictures:
            self._one_core(data)
            if data is self._usual:
                for workers in worker_counts(len(os.sched_getaffinity(0))):
                    self._together(data, workers)

    def _one_core(self, data: bytes) -> None:
        """Decode, preprocess, and both, in one thread of this process."""
        module, picture = self._module, self._pictures[data]
        most = self._config.max_image_pixels

        def decode() -> Any:
            return images.decode(data, image_type=module.image_type, min_side=module.min_side, max_pixels=most)

        image = decode()
        runs: dict[Step, Callable[[], Any]] = {
            "decode": decode,
            "preprocess": lambda: module.preprocess(image),
            "both": lambda: module.preprocess(decode()),
        }
        with _one_thread():
            for step, run in runs.items():
                self._tell(f"{step} on one core, {picture.megapixels:.2g} megapixels")
                self._add(step, 0, picture, partial(self._windows, run))

    def _together(self, data: bytes, count: int) -> None:
        """Decode and preprocess in ``count`` DataLoader processes, fed as the worker feeds them."""
        self._tell(f"decode and preprocess, {processes(count)}")

        def windows() -> list[float]:
            with feeding(self._module, self._config, data, count) as fed:
                return self._counted(fed)

        self._add("both", count, self._pictures[data], windows)

    def _add(self, step: Step, workers: int, picture: Picture, windows: Callable[[], list[float]]) -> None:
        found = self._found.setdefault((step, workers, picture), _Found())
        try:
            before, rates, after = _pace(), windows(), _pace()
            found.passes.append(rates)
            found.paces += before, after
        except Exception as error:  # the module may dislike the picture
            found.problem = describe(error)

    def _windows(self, run: Callable[[], Any]) -> list[float]:
        """Images a second of windows, until the last three agree."""
        run()
        rates: list[float] = []
        while len(rates) < MOST_WINDOWS and not steady(rates):
            done, began = 0, self._clock()
            while not done or self._clock() - began < self._seconds / WINDOWS:
                run()
                done += 1
            rates.append(done / max(self._clock() - began, 1e-9))
        return rates

    def _counted(self, fed: Fed) -> list[float]:
        """The same for what comes back from the processes."""
        rates: list[float] = []
        while len(rates) < MOST_WINDOWS and not steady(rates):
            rates.append(fed.rate(self._seconds / WINDOWS))
        return rates


def _point(step: Step, workers: int, picture: Picture, found: _Found) -> HostPoint:
    about: dict[str, Any] = {"step": step, "workers": workers, "picture": picture, "passes": found.passes}
    about["paces"] = found.paces
    if not found.passes:
        return HostPoint(**about, status="failed", why=found.problem or "interrupted")
    status, why = judged(found.passes)
    if found.problem or len(found.passes) < PASSES:
        status, why = "unstable", found.problem or "interrupted before its second pass"
    rate = median(rate for each in found.passes for rate in each)
    return HostPoint(**about, status=status, why=why, images_s=rate)


def _photo_of(megapixels: float) -> bytes:
    width = round((megapixels * 1e6 * WIDTH / HEIGHT) ** 0.5)
    return photo(width, round(megapixels * 1e6 / width))


def _pace() -> float:
    """The machine's own, of one core whatever is measured: else the two kinds would not compare."""
    with _one_thread():
        return pace(CPU)


class Fed:
    """A DataLoader that is kept full of one picture, and what has come back from it."""

    def __init__(self, module: Module, config: ModelConfig, arena: Arena, place: tuple[int, int]) -> None:
        self._place = place
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._count, self._at = 0, 0.0
        self._problem = ""
        self._full = True
        self._feeder = Feeder(config, arena.fd, module, pin=False, deliver=self._delivered, failed=self._failed)
        self._thread = threading.Thread(target=self._feed, name="feeder", daemon=True)
        self._thread.start()
        if not self._feeder.wait_until_started(START_S):
            raise WorkerFailed("the DataLoader's processes did not start; see the log above")
        self._submit(IN_FLIGHT * config.preprocess_workers)

    def rate(self, seconds: float) -> float:
        """Images a second from one delivery to another that is at least ``seconds`` later. Raises WorkerFailed."""
        with self._changed:
            self._wait(lambda: self._count > 0)
            count, began = self._count, self._at
            self._wait(lambda: self._at - began >= seconds)
            return (self._count - count) / (self._at - began)

    def close(self) -> None:
        """Take back what is still under way, and end the processes."""
        self._full = False
        self._feeder.close()
        self._thread.join(START_S)

    def _wait(self, until: Callable[[], bool]) -> None:
        if not self._changed.wait_for(lambda: bool(self._problem) or until(), START_S):
            raise WorkerFailed(f"no picture came back within {START_S:g} s")
        if self._problem:
            raise WorkerFailed(self._problem)

    def _feed(self) -> None:
        try:
            self._feeder.run()
        except Exception as error:
            log.error("the feeder ended", exc_info=True)
            self._failed(0, WorkerFailed(describe(error)))

    def _delivered(self, samples: list[Sample]) -> None:
        with self._changed:
            self._count += len(samples)
            self._at = time.perf_counter()
            self._changed.notify_all()
        if self._full:
            self._submit(len(samples))

    def _submit(self, count: int) -> None:
        self._feeder.submit([(next(self._numbers), *self._place, False) for _ in range(count)])

    def _failed(self, _number: int, error: Exception) -> None:
        with self._changed:
            self._problem = str(error)
            self._changed.notify_all()


@contextmanager
def feeding(module: Module, config: ModelConfig, data: bytes, workers: int) -> Iterator[Fed]:
    """DataLoader processes that prepare ``data`` again and again while the context lasts."""
    arena = Arena(2 * len(data) + 1)
    slot = asyncio.run(arena.take(len(data)))
    slot.write(data)
    config = replace(config, preprocess_workers=workers, arena_size=arena.size)
    fed = Fed(module, config, arena, (slot.offset, slot.length))
    try:
        yield fed
    finally:
        fed.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a DataLoader process has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
