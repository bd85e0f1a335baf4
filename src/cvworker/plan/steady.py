"""The latency of workers that keep up, by their load: simulated once for each, and looked up by the aggregate."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace

import numpy as np

from cvworker.plan.autoscaler import Scaling
from cvworker.plan.capacity import Worker
from cvworker.plan.simulate import Simulation
from cvworker.plan.traffic import Floats, Traffic

LOADS = (0.001, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.86, 0.92, 0.96)
SIZES = (1, 4, 16)
"""Workers that are simulated together; of more, none would wait less."""
SHARES = np.concatenate([(np.arange(98) + 0.5) / 100, 0.98 + (np.arange(20) + 0.5) / 1000])
WEIGHTS = np.concatenate([np.full(98, 0.01), np.full(20, 0.001)])
"""Quantiles that stand for a distribution, and what each weighs: finer where the 99th percentile lies."""
MESSAGES, MESSAGES_WHEN_FULL = 5_000, 12_000
WARM_UP = 0.2
"""Share of the messages at the beginning that do not count, because the workers were empty."""


class Steady:
    """Latencies of ``traffic``'s messages with workers of one kind, at constant rates, as quantiles at ``SHARES``."""

    def __init__(self, traffic: Traffic, worker: Worker, *, seed: int = 0) -> None:
        # Bursts that come one by one are the aggregate's own.
        self._traffic = replace(traffic, burst=1) if traffic.bursts_are_rare else traffic
        self._worker, self._seed = worker.paced(traffic), seed
        self.pace = worker.pace(traffic) * (1 - traffic.host_errors)
        """Answers a second of one worker at most."""
        self.full_s = self._worker.lone_s(traffic)
        """Seconds in a worker whose batches are full, waiting left out."""
        self._known: dict[tuple[int, int], Floats] = {}
        self._means: dict[tuple[int, int], float] = {}

    def quantiles(self, size: int, load: int) -> Floats:
        """For ``SIZES[size]`` workers at the load ``LOADS[load]``."""
        if (size, load) not in self._known:
            self._known[size, load] = self._simulated(SIZES[size], LOADS[load])
        return self._known[size, load]

    def mean(self, tasks: float, load: float) -> float:
        """Mean latency of so many workers at this load, in seconds."""
        size, (low, high), share = size_of(tasks), *between(load)
        return self._mean(size, low) * (1 - share) + self._mean(size, high) * share

    def _mean(self, size: int, load: int) -> float:
        if (size, load) not in self._means:
            self._means[size, load] = float(self.quantiles(size, load) @ WEIGHTS)
        return self._means[size, load]

    def _simulated(self, tasks: int, load: float) -> Floats:
        rate = tasks * self.pace * load
        # A burst counts as one: as many of them are needed as of single messages.
        wanted = (MESSAGES_WHEN_FULL if load > 0.75 else MESSAGES) * min(self._traffic.burst, 20)
        seconds = wanted / rate
        done = Simulation(
            self._traffic.steady(rate), self._worker, Scaling(tasks, tasks), seed=self._seed, seconds=seconds
        ).run()
        late = done.latencies[done.arrived >= WARM_UP * seconds]
        if not len(late):
            return np.full(len(SHARES), self._worker.lone_s(self._traffic))
        return np.asarray(np.quantile(late, SHARES), dtype=np.float64)


def size_of(tasks: float) -> int:
    """The place in ``SIZES`` of the largest number that is not above ``tasks``."""
    return max(0, bisect_right(SIZES, tasks) - 1)


def between(load: float) -> tuple[tuple[int, int], float]:
    """The places in ``LOADS`` around a load, and how far it is from the first to the second."""
    high = min(max(1, bisect_left(LOADS, load)), len(LOADS) - 1)
    share = (load - LOADS[high - 1]) / (LOADS[high] - LOADS[high - 1])
    return (high - 1, high), min(1.0, max(0.0, share))
