"""``python -m load.threads``: a batch of a small network, by how PyTorch's threads wait for one another.

Alone, and beside as many busy processes as there are cores, as decoding is in a worker. In turn, each try in a process
of its own: OpenMP reads its variables once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

POLICIES = {
    "as OpenMP likes": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "a short spin": {"GOMP_SPINCOUNT": "1000"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
BATCH, SIDE = 8, 64
WARM = 5


def main() -> int:
    """Print the table; the exit code is 0."""
    parser = argparse.ArgumentParser("python -m load.threads", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each try (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"ResNet-18 at {SIDE} pixels, batch of {BATCH}, {cores} cores; medians of {given.rounds} rounds")
    print(f"{'threads wait':<16} {'busy beside':>11} {'p50 ms':>8} {'p95 ms':>8} {'CPU ms':>8}")
    for beside in (0, cores):
        found: dict[str, list[list[float]]] = {name: [] for name in POLICIES}
        with busy(beside):
            for _ in range(given.rounds):
                for name, variables in POLICIES.items():
                    found[name].append(tried(variables, given.seconds))
        for name, tries in found.items():
            p50, p95, cpu = (median(column) for column in zip(*tries, strict=True))
            print(f"{name:<16} {beside:>11} {p50:>8.1f} {p95:>8.1f} {cpu:>8.1f}", flush=True)
    return 0


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tried(variables: dict[str, str], seconds: float) -> list[float]:
    """Median, 95th percentile and CPU time of a batch in milliseconds, in a process with these variables."""
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", f"from load.threads import batches; batches({seconds})"]
    done = subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True)
    numbers: list[float] = json.loads(done.stdout)
    return numbers


def batches(seconds: float) -> None:
    """Run batches for so long, and print what :func:`tried` reads."""
    import torch
    from torchvision.models import resnet18

    network = resnet18().eval().to(memory_format=torch.channels_last)
    batch = torch.randn(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM):
            network(batch)
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            at = time.perf_counter()
            network(batch)
            times.append(1000 * (time.perf_counter() - at))
        cpu = 1000 * (time.process_time() - cpu) / len(times)
    print(json.dumps([median(times), sorted(times)[int(0.95 * len(times))], cpu]))


if __name__ == "__main__":
    sys.exit(main())
