"""What the worker promises about its pace, start and size, measured: ``python -m load.checks``.

Each check is a run of its own in the world of ``load.compare``. Ends with 1 where one does not hold.

  full speed   5,000 messages as fast as they go, visibility 30 s: none expires, none is answered twice
  lone         two messages a second: what the worker adds to download, preprocess and process
  ready        from start to ready, a small module on the CPU
  memory       of all processes under load, ResNet-18 on the CPU with two preprocess workers
  backlog      pace and memory with next to no messages left in the queue and with 100,000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from load.compare.contenders import CONTENDERS
from load.compare.measure import Peer, worker, world
from load.compare.task import LOADS

from cvworker.bench import tree

MESSAGES = 5_000
LONE_EVERY_S, LONE_MESSAGES, LONE_MOST_MS = 0.5, 40, 40.0
READY_MOST_S = 8.0
MEMORY_MOST_MB = 1600.0
BACKLOGS = (4_000, 100_000)
PACED = range(1_000, 3_000)
"""Answers between which the pace is taken: of the smaller backlog next to nothing is left then."""
GIVE_UP_S = 180.0
CPU = LOADS["cpu"]
OURS = CONTENDERS["cvworker"]


def main() -> int:
    """The exit code: 0, or 1 where a check does not hold."""
    checks = {"full-speed": full_speed, "lone": lone, "ready": ready, "memory": memory, "backlog": backlog}
    parser = argparse.ArgumentParser(
        "python -m load.checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", nargs="*", choices=[*checks, []], help="default: all")
    held = True
    for name in parser.parse_args().check or checks:
        well, found = checks[name]()
        print(f"{name:11} {'holds' if well else 'DOES NOT HOLD'}: {found}", flush=True)
        held &= well
    return 0 if held else 1


def full_speed() -> tuple[bool, str]:
    with world(CPU, backlog=MESSAGES) as peer, worker(OURS, CPU, peer.base):
        counts = _until(peer, lambda now: now["deletes"] >= MESSAGES)
    well = not counts["expired"] and not counts["repeats"] and counts["callbacks"] == MESSAGES
    return well, (
        f"{counts['callbacks']:.0f} answered, {counts['repeats']:.0f} twice, {counts['expired']:.0f} expired, "
        f"{counts['most_held']:.0f} held at most"
    )


def lone() -> tuple[bool, str]:
    with world(CPU, every=LONE_EVERY_S) as peer, worker(OURS, CPU, peer.base):
        _until(peer, lambda now: now["callbacks"] >= LONE_MESSAGES)
        counts = peer.counts()
    added = counts["around_ms"]
    return added < LONE_MOST_MS, f"{added:.1f} ms added at the median (at most {LONE_MOST_MS:.0f})"


def ready() -> tuple[bool, str]:
    with world(CPU, every=0.01) as peer:
        began = time.monotonic()
        with worker(replace(OURS, module="Small"), CPU, peer.base):
            _until(peer, lambda now: now["receive_calls"] >= 1)  # which is the first thing that it does once ready
            took = time.monotonic() - began
    return took < READY_MOST_S, f"ready after {took:.1f} s with a ResNet-18 (at most {READY_MOST_S:.0f})"


def memory() -> tuple[bool, str]:
    ours = replace(OURS, module="Small", settings={**OURS.settings, "PREPROCESS_WORKERS": "2"})
    with world(CPU) as peer, worker(ours, CPU, peer.base) as (process, _):
        _until(peer, lambda now: now["callbacks"] >= 1000)
        pss = tree.pss_bytes(process.pid) / 2**20
    return pss < MEMORY_MOST_MB, f"{pss:.0f} MiB (PSS of all processes, at most {MEMORY_MOST_MB:.0f})"


def backlog() -> tuple[bool, str]:
    """Twice each, in turn: the machine's own swing is larger than what is looked for."""
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in BACKLOGS}
    for size in (*BACKLOGS, *BACKLOGS):
        with world(CPU, backlog=size) as peer, worker(OURS, CPU, peer.base) as (process, _):
            before = _until(peer, lambda now: now["callbacks"] >= PACED.start)
            after = _until(peer, lambda now: now["callbacks"] >= PACED.stop)
            pace = (after["callbacks"] - before["callbacks"]) / (after["at"] - before["at"])
            found[size].append((pace, tree.pss_bytes(process.pid) / 2**20))
    (few, small), (many, large) = (tuple(map(max, zip(*found[size], strict=True))) for size in BACKLOGS)
    return many > 0.85 * few and large < 1.1 * small, " and ".join(
        f"{pace:.0f}/s and {size:.0f} MiB with {left:,} left"
        for pace, size, left in ((few, small, BACKLOGS[0] - PACED.stop), (many, large, BACKLOGS[1] - PACED.stop))
    )


def _until(peer: Peer, true: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Wait for what the world tells; the counts then."""
    until = time.monotonic() + GIVE_UP_S
    while not true(now := peer.counts()):
        if time.monotonic() > until:
            sys.exit(f"not within {GIVE_UP_S:.0f} s; the world counts {now}")
        time.sleep(0.05)
    return now


if __name__ == "__main__":
    sys.exit(main())
