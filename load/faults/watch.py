"""Memory, threads, descriptors and processes of a worker over time, and whether they stay flat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import psutil

SAMPLES = 60
"""Fewer say nothing about growth: queues, pools and caches are still filling."""
MEMORY_SHARE, MEMORY_BYTES = 0.05, 16 * 2**20
MORE_THREADS, MORE_DESCRIPTORS, MORE_PROCESSES = 2, 16, 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A worker with all its processes; ``memory`` is PSS, so that shared pages count once, in bytes."""

    memory: int
    threads: int
    descriptors: int
    processes: int


def look(tree: Sequence[psutil.Process]) -> Sample | None:
    """Measure a worker; ``None`` if a process of it ended meanwhile."""
    try:
        return Sample(
            sum(each.memory_full_info().pss for each in tree),
            sum(each.num_threads() for each in tree),
            sum(each.num_fds() for each in tree),
            len(tree),
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def grown(samples: Sequence[Sample]) -> list[str]:
    """What has grown from the second quarter to the last, by medians; the first quarter is warming up.

    Medians, because a model process that is being replaced is small for some seconds, and a burst is no leak.
    """
    if len(samples) < SAMPLES:
        return []
    quarter = len(samples) // 4
    before, after = _median(samples[quarter : 2 * quarter]), _median(samples[-quarter:])
    limits = Sample(
        int(before.memory * (1 + MEMORY_SHARE)) + MEMORY_BYTES,
        before.threads + MORE_THREADS,
        before.descriptors + MORE_DESCRIPTORS,
        before.processes + MORE_PROCESSES,
    )
    names = ("memory", "threads", "descriptors", "processes")
    rows = zip(names, astuple(before), astuple(after), astuple(limits), strict=True)
    return [f"{name} grew from {was} to {now}" for name, was, now, limit in rows if now > limit]


def told(samples: Sequence[Sample]) -> str:
    """One line about where a run began and where it ended."""
    if len(samples) < SAMPLES:
        return f"{len(samples)} samples, too few to judge growth"
    quarter = len(samples) // 4
    before, after = _median(samples[quarter : 2 * quarter]), _median(samples[-quarter:])
    return (
        f"memory {before.memory / 2**20:.0f} → {after.memory / 2**20:.0f} MiB, "
        f"threads {before.threads} → {after.threads}, descriptors {before.descriptors} → {after.descriptors}, "
        f"processes {before.processes} → {after.processes} ({len(samples)} samples)"
    )


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(*(int(statistics.median(values)) for values in zip(*(astuple(s) for s in samples), strict=True)))
