"""A whole profile: the module's series one after the other, the host's part, and what it was all measured on."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch

from cvworker.errors import StartupError
from cvworker.lab import machine
from cvworker.lab.host import Host
from cvworker.lab.results import EXPORTED, Profile, Series, beside, usual_pace
from cvworker.lab.subject import Subject
from cvworker.lab.sweep import Plan, Sweep
from cvworker.lab.variants import Variant, variants
from cvworker.model.config import ModelConfig
from cvworker.model.preprocess import describe

MEGAPIXELS = (0.25, 1.0, 4.0)
"""Sizes of pictures that are tried where samples follow them."""
NO_NETWORK = "{name} keeps no network in self.model: process was measured as a whole, in eager only"
NOT_CALLED = "{why}: process was measured as a whole only"


@dataclass(frozen=True)
class Wishes:
    """What is to be measured; empty lists mean all that makes sense here."""

    module: str
    weights: str | None
    device: torch.device
    exported: Sequence[str] = ()
    """Local files of exported networks."""
    precisions: Sequence[str] = ()
    formats: Sequence[str] = ()
    batch_sizes: Sequence[int] = ()
    megapixels: Sequence[float] = ()
    seconds: float = 1.0
    memory_bytes: int | None = None
    seed: int = 0
    picture: bytes | None = None
    machine_type: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """As they go into the file."""


class Profiling:
    """Sets the module up, then measures; ``result`` is a profile at any time after that.

    Raises:
        StartupError: module, weights or what is wished for will not do.
    """

    def __init__(self, wishes: Wishes, config: ModelConfig, tell: Callable[[str], object]) -> None:
        self._wishes = wishes
        self._made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._complete = False
        self._notes: list[str] = []
        torch.manual_seed(wishes.seed)
        if wishes.device.type == "cuda":
            torch.cuda.set_device(wishes.device)
        self._subject = self._subject_of(wishes.weights)
        self._exported = [(PurePath(path).name, self._subject_of(path)) for path in wishes.exported]
        self.plans = self._planned()
        self._sweep = Sweep(
            seconds=wishes.seconds, batches=wishes.batch_sizes, memory_limit=wishes.memory_bytes, tell=tell
        )
        self._host = Host(self._subject.module, config, wishes.picture, seconds=wishes.seconds, tell=tell)

    @property
    def steps(self) -> int:
        """How often :meth:`run` calls its ``step``."""
        return 2 * (len(self.plans) + 1)

    def run(self, step: Callable[[], object]) -> None:
        """Measure everything twice: the host's part and each series, then each series and the host's part."""
        self._host.run()
        step()
        for plan in self.plans:
            self._sweep.rise(plan)
            step()
        self._sweep.fall(step)
        self._host.run()
        step()
        self._complete = True

    @property
    def result(self) -> Profile:
        """What there is by now."""
        wishes, points, host = self._wishes, self._sweep.points, self._host.points
        on_device, on_host = usual_pace(points), usual_pace(host)
        return Profile(
            made=self._made,
            complete=self._complete,
            commit=machine.commit(),
            seed=wishes.seed,
            module=self._subject.info(wishes.module),
            machine=machine.machine_info(wishes.device, wishes.machine_type),
            versions=machine.versions(),
            settings=wishes.settings,
            points=[beside(on_device, point) for point in points] if on_device else points,
            host=[beside(on_host, point) for point in host] if on_host else host,
            notes=self._notes,
        )

    def _subject_of(self, weights: str | None) -> Subject:
        return Subject(self._wishes.module, weights, self._wishes.device, seed=self._wishes.seed)

    def _planned(self) -> list[Plan]:
        """Every series: each variant's network and process, exported networks, then sizes of pictures."""
        wishes, main = self._wishes, self._subject
        kinds = self._kinds()
        found = variants(main.network, wishes.device, wishes.precisions, wishes.formats)
        plans = [Plan(main, kind, variant) for variant in found for kind in kinds]
        for name, subject in self._exported:
            plans += [Plan(subject, kind, Variant(EXPORTED, name)) for kind in kinds]
        sizes = self._sizes()
        plans += [Plan(main, kinds[0], variant, size) for variant in found for size in sizes]
        return plans

    def _kinds(self) -> list[Series]:
        """What can be timed of this module, and a note where that is less than all."""
        main = self._subject
        if main.network is None:
            self._notes.append(NO_NETWORK.format(name=main.module.name))
            return ["process"]
        try:
            main.network_batch(1)
        except LookupError as error:
            self._notes.append(NOT_CALLED.format(why=error.args[0]))
            return ["process"]
        except Exception as error:
            raise StartupError(f"module: {main.module.name}: {describe(error)}") from error
        return ["network", "process"]

    def _sizes(self) -> Sequence[float]:
        if self._subject.follows_size:
            return self._wishes.megapixels or MEGAPIXELS
        if self._wishes.megapixels:
            self._notes.append("sizes were not measured: this module's samples have one size, whatever the picture's")
        return ()
