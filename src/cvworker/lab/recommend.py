"""From a profile to what to run with: the fastest batch and precision within limits, and what bounds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from cvworker.errors import StartupError
from cvworker.lab.results import EXPORTED, Point, Profile, processes
from cvworker.model.batch_size import smallest_good

Bound = Literal["decode", "transfer", "compute", "memory"]
GIB = 2**30


@dataclass(frozen=True)
class Recommendation:
    """What to run with, what keeps it from being faster, and the environment that says so."""

    point: Point
    bound: Bound
    why: str
    environment: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The lines for the environment."""
        return [f"{name}={value}" for name, value in self.environment.items()]


def recommend(
    profile: Profile, *, latency_ms: float | None = None, memory_bytes: float | None = None
) -> Recommendation:
    """The highest throughput of ``process`` (of the network, where that alone was measured) within the limits.

    ``latency_ms`` bounds the 95th percentile of a batch's time, ``memory_bytes`` the peak memory where it computes.
    Of the batch sizes of the fastest precision and format, it is the smallest within 5 % of its best. A point that is
    not stable counts with its slower pass. Raises LookupError, saying why, where nothing is within the limits.
    """
    points = [point for point in _candidates(profile) if point.measured]
    if not points:
        raise LookupError("nothing was measured to recommend")
    fitting = [point for point in points if _fits(point, latency_ms, memory_bytes)]
    if not fitting:
        limits = [f"{latency_ms:g} ms"] if latency_ms else []
        limits += [f"{memory_bytes / GIB:.2g} GiB"] if memory_bytes else []
        raise LookupError(f"no batch is within {' and '.join(limits)}")
    fastest = max(fitting, key=_rate)
    same = [point for point in fitting if point.name == fastest.name]
    batch = smallest_good({point.batch: _rate(point) for point in same})
    chosen = next(point for point in same if point.batch == batch)
    bound, why = bounded_by(profile, chosen, memory_bytes)
    notes = []
    if chosen.status != "ok":
        notes.append("this point is not stable: measure again while the machine does nothing else")
    if latency_ms and any(_rate(point) > _rate(chosen) * 1.05 and not _quick(point, latency_ms) for point in points):
        notes.append(f"without the limit of {latency_ms:g} ms larger batches would be faster")
    if chosen.precision not in ("fp32", EXPORTED):
        notes.append(f"answers in {chosen.precision} were not compared: 'precision: auto' does so at start")
    return Recommendation(chosen, bound, why, _environment(profile, chosen), tuple(notes))


def recommended_batch(path: Path, module: str) -> int:
    """The batch size that a profile of ``module`` recommends, within the limits that it was made with.

    Raises StartupError where there is none.
    """
    profile = Profile.load(path)
    if module not in (profile.module.spec, profile.module.name):
        raise StartupError(f"{path} is a profile of {profile.module.spec}, not of {module}; profile that module")
    latency_ms, memory_gb = (profile.settings.get(name) for name in ("latency_ms", "memory_gb"))
    memory_bytes = memory_gb * GIB if memory_gb else None
    try:
        return recommend(profile, latency_ms=latency_ms, memory_bytes=memory_bytes).point.batch
    except LookupError as error:
        raise StartupError(f"{path} recommends nothing: {error.args[0]}; profile again") from None


def bounded_by(profile: Profile, point: Point, memory_bytes: float | None = None) -> tuple[Bound, str]:
    """What keeps ``point`` from being faster on this machine, and the numbers that say so."""
    device, host = _rate(point), profile.host_images_s()
    if host is not None and host < device:
        by = processes(profile.best_workers() or 1)
        return "decode", f"the device takes {device:,.0f} images/s, {by} decode and preprocess {host:,.0f}"
    split = point.split_ms
    if split is not None and split.to_device + split.to_host > split.compute:
        copies = split.to_device + split.to_host
        return "transfer", f"copying takes {copies:.1f} ms of a batch, computing {split.compute:.1f} ms"
    if why := _memory_ended(profile, point, memory_bytes):
        return "memory", why
    beside = f", decoding and preprocessing would do {host:,.0f}" if host is not None else ""
    return "compute", f"the device takes {device:,.0f} images/s{beside}"


def _memory_ended(profile: Profile, point: Point, limit: float | None) -> str:
    """Why no larger batch than this could be had, where memory is why."""
    larger = [other for other in profile.points if other.name == point.name and other.batch > point.batch]
    if not larger:
        return ""
    following = min(larger, key=lambda other: other.batch)
    if following.status == "out of memory":
        return f"batch {following.batch} does not fit: {following.why}"
    taken = following.memory_bytes() or 0
    if limit and taken > limit and _rate(following) > _rate(point):
        return f"batch {following.batch} takes {taken / GIB:.1f} GiB, above the limit of {limit / GIB:.1f} GiB"
    return ""


def _candidates(profile: Profile) -> Sequence[Point]:
    of_process = [point for points in profile.series("process").values() for point in points]
    return of_process or [point for points in profile.series("network").values() for point in points]


def _fits(point: Point, latency_ms: float | None, memory_bytes: float | None) -> bool:
    return _quick(point, latency_ms) and (memory_bytes is None or (point.memory_bytes() or 0) <= memory_bytes)


def _quick(point: Point, latency_ms: float | None) -> bool:
    return latency_ms is None or (point.latency_ms is not None and point.latency_ms.p95 <= latency_ms)


def _rate(point: Point) -> float:
    return point.sure_images_s


def _environment(profile: Profile, point: Point) -> dict[str, str]:
    found = {"CVWORKER_BATCH_SIZE": str(point.batch)}
    if point.precision == EXPORTED:
        files = [str(file) for file in profile.settings.get("exported") or []]
        found["CVWORKER_WEIGHTS"] = next(
            (file for file in files if PurePath(file.rpartition("#")[0] or file).name == point.format), point.format
        )
    else:
        found["CVWORKER_PRECISION"] = "fp32" if point.precision == "tf32" else point.precision
    if point.precision == "tf32":
        found["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
    if {"compiled", "graphs"} & set(point.format.split("+")):
        found["CVWORKER_OPTIMIZE"] = "full"
    if (workers := profile.best_workers()) is not None:
        found["CVWORKER_PREPROCESS_WORKERS"] = str(workers)
    return found
