"""A process with all its children: what it costs, what it holds, and its end."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

END_S = 30.0
_PSS = re.compile(rb"^Pss: +(\d+) kB", re.MULTILINE)


def members(pid: int) -> list[psutil.Process]:
    """The process and everything below it; nothing where it has ended."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> dict[int, float]:
    """CPU time of each process of the tree, user and system, with that of its children that it has waited for."""
    found: dict[int, float] = {}
    for each in members(pid):
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[each.pid] = times.user + times.system + times.children_user + times.children_system
    return found


def pss_bytes(pid: int) -> int:
    """Memory of the tree; pages that processes share count once.

    From ``smaps_rollup``, because psutil would read every mapping of each process, at a cost that is measured with it.
    """
    total = 0
    for each in members(pid):
        try:
            found = _PSS.search(Path(f"/proc/{each.pid}/smaps_rollup").read_bytes())
        except OSError:
            continue
        total += int(found[1]) * 1024 if found else 0
    return total


def end(pid: int) -> None:
    """SIGTERM to the process, and SIGKILL to whatever of its tree is left; each by its own identity."""
    tree = members(pid)
    if not tree:
        return
    try:
        tree[0].terminate()
    except psutil.NoSuchProcess:
        pass
    psutil.wait_procs(tree[:1], timeout=END_S)
    _, left = psutil.wait_procs(tree, timeout=1.0)
    for each in left:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(left, timeout=5.0)
