"""How much memory this process has used at most, and how much it may still take: Linux's own figures."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limit and use of this container, as cgroups of version 2 and 1 tell them."""
_RESET_PEAK = "5"
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def peak_bytes() -> int:
    """The most resident memory since the start, or since :func:`reset_peak`."""
    return _kib(STATUS, "VmHWM")


def resident_bytes() -> int:
    """The resident memory now."""
    return _kib(STATUS, "VmRSS")


def reset_peak() -> bool:
    """Begin anew to look for the peak; False where the kernel does not let us, and it stays the one since the start."""
    try:
        CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return peak_bytes() - resident_bytes() < 2**20


def total_bytes() -> int:
    """The memory of the machine, or of the container where that is less."""
    limits = [limit for path, _ in CGROUPS if (limit := _number(path))]
    return min([_kib(MEMINFO, "MemTotal"), *limits])


def available_bytes() -> int:
    """What can be taken before the machine swaps or the container's limit kills."""
    left = [limit - (_number(used) or 0) for path, used in CGROUPS if (limit := _number(path))]
    return max(0, min([_kib(MEMINFO, "MemAvailable"), *left]))


@contextmanager
def data_limit(more: int) -> Iterator[None]:
    """Let allocations fail that would take this process ``more`` bytes beyond what it has, rather than have it killed.

    The data segment and not the address space: CUDA and shared mappings reserve far more than they use.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _kib(STATUS, "VmData") + more
    lower = all(other == resource.RLIM_INFINITY or limit < other for other in (soft, hard))
    if lower:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        if lower:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ended: the device's, or the host's (for which PyTorch has no error of its own)."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def _kib(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {name}")


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says that there is no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
