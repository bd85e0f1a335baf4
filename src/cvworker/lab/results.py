"""What ``cvworker profile`` found, as it is kept: one JSON file that every report and command reads.

Format 1 of ``profile.json``, UTF-8 JSON. Times are milliseconds, memory is bytes, rates are images per second::

    {"format": "cvworker profile", "version": 1,
     "made": "2026-11-22T09:10:00+00:00",           when it began, ISO 8601
     "complete": true,                              false: it was interrupted, and holds what was measured until then
     "commit": "463fa41" or null,                   of the repository that the command was run in
     "seed": 0,                                     of the random inputs
     "module": {...},                               ModuleInfo
     "machine": {...},                              MachineInfo
     "versions": {"cvworker": "0.1.0", "torch": "2.14.1", "python": "3.11.9"},
     "settings": {"module": "threat", ...},         the command's options, in force
     "points": [...],                               Point: one batch size of one series
     "host": [...],                                 HostPoint: decode and preprocess on the CPU
     "notes": ["..."]}                              one sentence each: what was left out, and why

A *series* is one way to run the module over rising batch sizes: what is timed (``network``: ``self.model`` alone on
random inputs, or ``process``: the module's collate and process with their results as JSON), a precision, a format and,
where samples follow the picture's size, its megapixels. Every number of a point is worked out from its ``passes``, the
raw samples, by :meth:`Point.measured`; readers may do so again.

A reader meets unknown fields with patience (they are ignored) and an unknown ``version`` with an error.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cvworker.errors import StartupError

FORMAT, VERSION = "cvworker profile", 1
AGREE = 0.10
"""Rates agree that lie within 10 % of one another: the spread of windows and of passes, as a share of their median."""
STRAY = 0.05
"""The machine's own pace beside a point may differ so much from the usual one: two that do are then within 10 %."""

EXPORTED = "exported"
"""The precision of an exported network: what its file holds."""

Series = Literal["network", "process"]
Status = Literal["ok", "unstable", "out of memory", "failed"]
Step = Literal["decode", "preprocess", "both"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Split(NamedTuple):
    """Milliseconds of one batch: to the device, computing there, and back. On the CPU the first and last are 0."""

    to_device: float
    compute: float
    to_host: float

    @property
    def total(self) -> float:
        return self.to_device + self.compute + self.to_host


Window = list[Split]
"""Batches run one after the other, without a pause: about a fifth of ``--seconds``."""
Pass = list[Window]
"""Windows until the last three agree, or the time is over. A point has two passes, minutes apart where possible: one
while batch sizes rise and one while they fall."""


class Latency(_Record):
    """Percentiles of the time for one batch, over all samples, in milliseconds."""

    p50: float
    p90: float
    p95: float
    p99: float


class Point(_Record):
    """One batch size of one series. Everything but the status is None where nothing could be measured."""

    series: Series
    precision: str
    """``fp32`` (TF32 off), ``tf32``, ``bf16``, ``fp16``; ``exported`` for an exported network: what its file holds."""
    format: str
    """``eager``, ``channels-last``, ``compiled``, ``graphs``, or the name of the exported file."""
    batch: int = Field(ge=1)
    megapixels: float | None = None
    """Of the picture, where the sample's size follows it and this series is about that."""
    status: Status
    why: str = ""
    """For people: why it is not ``ok``, or what ended the series."""
    images_s: float | None = None
    """The median over all windows: images in a window by its time, nothing overlapped."""
    latency_ms: Latency | None = None
    split_ms: Split | None = None
    """Medians, each by itself."""
    device_memory_bytes: int | None = None
    """Peak that PyTorch had allocated on a CUDA device; None on the CPU."""
    host_memory_bytes: int | None = None
    """Peak resident memory of the measuring process, the module and libraries included."""
    utilisation: float | None = None
    """Share of the time in which the GPU ran something, 0 to 1, where the driver tells; None on the CPU."""
    passes: list[Pass] = []
    paces: list[float] = []
    """How fast the machine itself was before and after each pass: :func:`cvworker.lab.timing.pace`."""

    @property
    def measured(self) -> bool:
        """Whether it has numbers, stable or not."""
        return self.images_s is not None

    @property
    def sure_images_s(self) -> float:
        """The rate to count on: of an unstable point the slower pass's; 0 where nothing was measured."""
        if self.images_s is None or self.status == "ok":
            return self.images_s or 0.0
        medians = [median(window_rate(window, self.batch) for window in each) for each in self.passes]
        return min(medians, default=self.images_s)

    @property
    def name(self) -> str:
        """The series it belongs to, for people."""
        size = "" if self.megapixels is None else f" {self.megapixels:g} MP"
        return f"{self.series} {self.precision} {self.format}{size}"

    def memory_bytes(self) -> int | None:
        """Peak memory where it is scarce: on the device, or the host's where that is the device."""
        return self.host_memory_bytes if self.device_memory_bytes is None else self.device_memory_bytes


class Picture(_Record):
    """A picture that was decoded: its format, size in pixels, and size in bytes, which is what the network carries."""

    format: str
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    bytes: int = Field(ge=1)

    @property
    def megapixels(self) -> float:
        return self.width * self.height / 1e6


class HostPoint(_Record):
    """Decoding and preprocessing of one picture, again and again, on the CPU."""

    step: Step
    """``both`` is decode and preprocess, as a DataLoader process does them."""
    workers: int = Field(ge=0)
    """0: one thread of one core, nothing else running; n: that many DataLoader processes, fed as by the worker."""
    picture: Picture
    status: Status
    why: str = ""
    images_s: float | None = None
    """The median over all windows."""
    passes: list[list[float]] = []
    """Images a second of each window, for each pass."""
    paces: list[float] = []
    """As a :class:`Point` has them."""


_P = TypeVar("_P", Point, HostPoint)


class ModuleInfo(_Record):
    """What was profiled."""

    name: str
    spec: str
    """As ``--module`` named it."""
    weights: str | None = None
    """``sha256:...`` of the file."""
    network: str | None = None
    """The class of ``self.model``; None for a module that keeps no network there."""
    parameters: int | None = None
    sample: str
    """Shape and type of one sample, for people."""


class MachineInfo(_Record):
    """Where it was measured."""

    type: str | None = None
    """The catalogue's name of the machine, such as g5.xlarge: what EC2 calls it, or ``--machine-type``."""
    cpu: str
    cores: int = Field(ge=1)
    """That this process may use."""
    memory_bytes: int = Field(ge=1)
    device: str
    """``cpu``, ``cuda:0``."""
    device_name: str
    """As the driver calls it, such as NVIDIA A10G; the CPU's model where the device is the CPU."""
    device_memory_bytes: int | None = None
    os: str

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


class Profile(_Record):
    """A whole profile; see the format above."""

    format: Literal["cvworker profile"] = FORMAT  # type: ignore[assignment]
    version: Literal[1] = VERSION  # type: ignore[assignment]
    made: str
    complete: bool
    commit: str | None = None
    seed: int
    module: ModuleInfo
    machine: MachineInfo
    versions: dict[str, str]
    settings: dict[str, Any]
    points: list[Point]
    host: list[HostPoint] = []
    notes: list[str] = []

    @property
    def title(self) -> str:
        """Module and machine, for headings."""
        where = self.machine.type or f"{self.machine.cores} cores"
        return f"{self.module.name} on {self.machine.device_name} ({where})"

    @property
    def pace(self) -> float | None:
        """How fast the machine itself was, beside all points; None in a profile of a version that did not look."""
        return usual_pace(self.points) or usual_pace(self.host)

    def series(self, kind: Series | None = None, *, sizes: bool = False) -> dict[str, list[Point]]:
        """Points by the name of their series, in order of the batch; with ``sizes``, those over megapixels instead."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            if kind in (None, point.series) and (point.megapixels is not None) == sizes:
                name = f"{point.series} {point.precision} {point.format}" if sizes else point.name
                found.setdefault(name, []).append(point)
        return {name: sorted(each, key=lambda p: (p.megapixels or 0, p.batch)) for name, each in found.items()}

    def curve(self, precision: str, format: str, kind: Series = "process") -> list[tuple[int, float]]:
        """Batch sizes with the median seconds for such a batch: what a simulation of the worker needs."""
        points = self.series(kind).get(f"{kind} {precision} {format}", [])
        return [(point.batch, point.latency_ms.p50 / 1000) for point in points if point.latency_ms]

    def host_ms(self, step: Step = "both") -> float | None:
        """CPU milliseconds for one image on one core, in one thread, with nothing else running."""
        rates = [point.images_s for point in self.host if point.step == step and point.workers == 0 and point.images_s]
        return 1000 / rates[0] if rates else None

    def host_images_s(self) -> float | None:
        """Images a second that DataLoader processes decode and preprocess, with the best number of them."""
        rates = [point.images_s for point in self.host if point.workers > 0 and point.images_s]
        return max(rates, default=None)

    def best_workers(self) -> int | None:
        """The least number of DataLoader processes within :data:`AGREE` of the best."""
        best = self.host_images_s()
        known = [(point.workers, point.images_s) for point in self.host if point.workers > 0 and point.images_s]
        return None if best is None else min(workers for workers, rate in known if rate >= best * (1 - AGREE))

    def picture(self) -> Picture | None:
        """The picture that the DataLoader processes decoded."""
        return next((point.picture for point in self.host if point.step == "both"), None)

    def save(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        _write(path, self.model_dump_json(indent=None) + "\n")

    def save_csv(self, path: Path) -> None:
        """Write the points, and the host's, as one table: a line each, raw samples left out."""
        with path.with_name(f".{path.name}.part").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            writer.writerows(self._rows())
        path.with_name(f".{path.name}.part").replace(path)

    def _rows(self) -> Iterable[Sequence[Any]]:
        for p in self.points:
            latency = p.latency_ms.model_dump().values() if p.latency_ms else [None] * 4
            split = p.split_ms or [None] * 3
            memory = (p.device_memory_bytes, p.host_memory_bytes, p.utilisation)
            yield (*(p.series, p.precision, p.format, p.batch, p.megapixels, None, p.status, p.why, p.images_s),
                   *latency, *split, *memory)  # fmt: skip
        for h in self.host:
            megapixels = round(h.picture.megapixels, 3)
            yield (h.step, None, h.picture.format, None, megapixels, h.workers, h.status, h.why, h.images_s)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a profile.

        Raises:
            StartupError: the file cannot be read, or is not a profile: the first field at fault is named.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            why = getattr(error, "strerror", None) or f"it is not JSON: {error}"
            raise StartupError(f"{path} cannot be read ({why}); give a profile.json of 'cvworker profile'") from None
        except ValidationError as error:
            raise StartupError(
                f"{path} is not a profile: {first_problem(error)}; make it anew with 'cvworker profile'"
            ) from None


CSV_COLUMNS = (
    *("series", "precision", "format", "batch", "megapixels", "workers", "status", "why", "images_s"),
    *("p50_ms", "p90_ms", "p95_ms", "p99_ms", "to_device_ms", "compute_ms", "to_host_ms"),
    *("device_memory_bytes", "host_memory_bytes", "utilisation"),
)


def measured(passes: Sequence[Pass], batch: int) -> dict[str, Any]:
    """The numbers of a :class:`Point` that follow from its raw samples: rate, percentiles, split, status and why.

    A point is unstable where the last three windows of a pass do not agree, or the medians of its passes do not
    (:func:`agree`).
    """
    samples = [sample for each in passes for window in each for sample in window]
    totals = [sample.total for sample in samples]
    rates = [[window_rate(window, batch) for window in each] for each in passes]
    status, why = judged(rates)
    p50, p90, p95, p99 = (percentile(totals, share) for share in (0.50, 0.90, 0.95, 0.99))
    return {
        "status": status,
        "why": why,
        "images_s": median(rate for each in rates for rate in each),
        "latency_ms": Latency(p50=p50, p90=p90, p95=p95, p99=p99),
        "split_ms": Split(*(median(part) for part in zip(*samples, strict=True))),
    }


def judged(rates: Sequence[Sequence[float]]) -> tuple[Literal["ok", "unstable"], str]:
    """``ok`` or ``unstable``, and why, for the windows' rates of each pass."""
    for each in rates:
        if not steady(each):
            return "unstable", f"the last three windows differ by {_spread(each[-3:]):.0%}"
    if not agree(medians := [median(each) for each in rates]):
        return "unstable", f"the two passes differ by {_spread(medians):.0%}"
    return "ok", ""


def usual_pace(points: Iterable[Point | HostPoint]) -> float | None:
    """The median of the machine's own paces beside these points."""
    paces = [pace for point in points for pace in point.paces]
    return median(paces) if paces else None


def beside(pace: float, point: _P) -> _P:
    """The point, marked unstable if the machine itself was faster or slower than ``pace`` while it was measured."""
    strays = [each / pace - 1 for each in point.paces]
    most = max(strays, key=abs, default=0.0)
    if point.status != "ok" or abs(most) <= STRAY:
        return point
    why = f"the machine itself was {abs(most):.0%} {'faster' if most > 0 else 'slower'} than usual beside it"
    return point.model_copy(update={"status": "unstable", "why": why})


def steady(rates: Sequence[float]) -> bool:
    """Whether there are three windows, the last three of which agree."""
    return len(rates) >= 3 and agree(rates[-3:])


def agree(values: Sequence[float]) -> bool:
    """Whether the largest and the smallest differ by no more than :data:`AGREE` of the median."""
    return _spread(values) <= AGREE


def window_rate(window: Window, batch: int) -> float:
    """Images a second over one window of batches of ``batch``."""
    return 1000 * batch * len(window) / max(sum(sample.total for sample in window), 1e-9)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all are no larger than (the nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def processes(count: int) -> str:
    """So many DataLoader processes, in words."""
    return f"{count} DataLoader process{'' if count == 1 else 'es'}"


def rounded(value: float | None) -> float | int | None:
    """To four figures, more being noise; what is a thousand or more as a whole number."""
    if value is None:
        return None
    found = float(f"{value:.4g}")
    return round(found) if abs(found) >= 1000 else found


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings on one line, with the place in the file."""
    each = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in each["loc"])
    return f"{place}: {each['msg']}" if place else each["msg"]


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / max(median(values), 1e-9)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
