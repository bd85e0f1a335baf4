"""The same system as a flow, in time steps: for rates at which single events are too many.

What waits in SQS is a level that arrivals fill and workers empty, and a message's wait is the time until as many have
been served as had arrived with it (first in, first out). What a message takes in a worker that keeps up, chance and
bursts included, comes from the event simulation at that load (:mod:`cvworker.plan.steady`). Both together are exact
where the rate changes slowly beside the workers' own times, and an approximation elsewhere; ``cvworker plan`` runs both
on a stretch and says how well they agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cvworker.plan.autoscaler import LOOK_S, Bill, Fleet, Scaling
from cvworker.plan.steady import LOADS, SIZES, WEIGHTS, Steady
from cvworker.plan.traffic import Floats, Traffic
from cvworker.tuning import HOLD_S

Places = NDArray[np.intp]

STEP_S = 10.0
FEW_STEPS = 360
"""A stretch is cut into at least so many steps."""
DRAIN_S = 86_400.0
FULL = LOADS[-1]
COARSE = slice(5, None, 10)
"""Quantiles enough for the moments in which something waits, of which there are many."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What came out. Latencies as values with weights (images)."""

    values: Floats
    weights: Floats
    at_s: Floats
    """Middle of each step, since the beginning of the stretch."""
    arrivals: Floats
    """Images in each step."""
    active: Floats
    waiting: Floats
    """Images in SQS or in workers beyond what those that keep up hold, at the end of each step."""
    served: float
    seconds: float
    load: float
    """Share of what the active workers could have done that they did."""
    bill: Bill

    def percentile(self, share: float) -> float:
        """The latency that this share of all images does not exceed, in seconds."""
        return weighted_percentile(self.values, self.weights, share)

    @property
    def achieved(self) -> float:
        """Answers a second within the stretch."""
        return self.served / self.seconds


class Aggregate:
    """One run; the arguments are those of :class:`cvworker.plan.simulate.Simulation`."""

    def __init__(
        self,
        traffic: Traffic,
        steady: Steady,
        scaling: Scaling,
        *,
        seed: int = 0,
        start: float = 0.0,
        seconds: float = 86_400.0,
        first: int | None = None,
    ) -> None:
        self._steady, self._scaling, self._seconds = steady, scaling, seconds
        self._random = np.random.default_rng(seed)
        step = min(STEP_S, seconds / FEW_STEPS)
        count = round(seconds / step)
        self._step = seconds / count
        self._at: Floats = (np.arange(count) + 0.5) * np.float64(self._step)
        self._rates = traffic.rate_at(start + self._at)
        self._arrivals = self._drawn(traffic)
        self._fleet = Fleet(scaling, scaling.least if first is None else first)

    def _drawn(self, traffic: Traffic) -> Floats:
        expected = self._rates * self._step
        self._at_once = traffic.bursts_are_rare
        if not self._at_once:
            return np.asarray(expected)
        return self._random.poisson(expected / traffic.burst).astype(np.float64) * traffic.burst

    def run(self) -> Flow:
        """Work off the whole stretch and what is left after it."""
        active, waiting, served = self._levels()
        latencies = self._latencies(active, waiting, served)
        capacity = float(active[: len(self._at)].sum()) * self._step * self._steady.pace
        total = float(served[len(self._at)])
        return Flow(
            *latencies,
            at_s=self._at,
            arrivals=self._arrivals,
            active=active[: len(self._at)],
            waiting=waiting[: len(self._at)],
            served=total,
            seconds=self._seconds,
            load=total / capacity if capacity else 0.0,
            bill=self._bill,
        )

    def _levels(self) -> tuple[Floats, Floats, Floats]:
        """Active workers and the level in each step; images served until the beginning of each, and its end."""
        fleet, pace, step = self._fleet, self._steady.pace, self._step
        arrivals, rates = self._arrivals.tolist(), self._rates.tolist()
        active: list[float] = []
        levels: list[float] = []
        served = [0.0]
        level, next_look, now, k = 0.0, LOOK_S, 0.0, 0
        while k <= len(arrivals) or (level > 1e-6 and now < self._seconds + DRAIN_S):
            if k == len(arrivals):
                self._close_bill(now)
            if fleet.next_ready <= now:
                fleet.advance(now)
            if now >= next_look:
                next_look += LOOK_S
                in_work = self._in_work(rates[k], fleet.active) if k < len(arrivals) else 0.0
                held = min(level, fleet.active * pace * HOLD_S)
                fleet.advance(now)
                # Whole messages, by chance: where few arrive there are minutes without any.
                fleet.look(now, level - held, held + float(self._random.poisson(in_work)))
                self._interrupt(now)
            came = arrivals[k] if k < len(arrivals) else 0.0
            done = min(level + came, fleet.active * pace * step)
            level += came - done
            active.append(fleet.active)
            levels.append(level)
            served.append(served[-1] + done)
            now += step
            k += 1
        return np.asarray(active, dtype=np.float64), np.asarray(levels), np.asarray(served)

    def _close_bill(self, now: float) -> None:
        """What comes after the stretch is worked off, and belongs to the next one's bill."""
        self._fleet.advance(now)
        bill = self._fleet.bill
        self._bill = replace(bill)

    def _in_work(self, rate: float, active: int) -> float:
        """Images in workers that keep up, by Little's law."""
        load = min(FULL, rate / max(active * self._steady.pace, 1e-12))
        return rate * self._steady.mean(active, load) if active else 0.0

    def _interrupt(self, now: float) -> None:
        spot = self._scaling.spot_tasks(self._fleet.active)
        if spot and self._scaling.interruptions_per_hour:
            lost = int(self._random.poisson(spot * self._scaling.interruptions_per_hour * LOOK_S / 3600))
            self._fleet.interrupted(now, min(lost, spot))

    def _latencies(self, active: Floats, levels: Floats, served: Floats) -> tuple[Floats, Floats]:
        count = len(self._at)
        arrivals = self._arrivals
        before = np.concatenate([[0.0], levels[: count - 1]])
        kept_up = (before <= 1e-6) & (levels[:count] <= 1e-6) & (active[:count] > 0)
        loads = np.minimum(FULL, self._rates / np.maximum(active[:count] * self._steady.pace, 1e-12))
        values, weights = self._steady_part(active[:count], loads, np.where(kept_up, arrivals, 0.0))
        late = np.flatnonzero(~kept_up & (arrivals > 0))
        if not len(late):
            return values, weights
        waits = self._waits(served, late)
        base = self._steady.full_s  # the time in a worker, where every batch is full
        own = self._own(active[late], loads[late])  # (late, quantiles)
        joined = np.maximum(own[:, None, :], waits[:, :, None] + base)
        each = np.broadcast_to(arrivals[late][:, None, None] / (joined.shape[1] * joined.shape[2]), joined.shape)
        return np.concatenate([values, joined.ravel()]), np.concatenate([weights, each.ravel()])

    def _own(self, active: Floats, loads: Floats) -> Floats:
        """Quantiles of the time that workers who keep up would take, for each of these steps."""
        sizes, low, share = cells(active, loads)
        found = np.empty((len(active), len(range(len(WEIGHTS))[COARSE])))
        for size, load in {*zip(sizes.tolist(), low.tolist(), strict=True)}:
            here = (sizes == size) & (low == load)
            ends = [self._steady.quantiles(size, index)[COARSE] for index in (load, load + 1)]
            found[here] = ends[0] * (1 - share[here, None]) + ends[1] * share[here, None]
        return found

    def _waits(self, served: Floats, late: Places) -> Floats:
        """How long images wait that arrive in these steps, three of each: until as many were served as had arrived."""
        edges = np.arange(len(served)) * self._step
        arrived = np.concatenate([[0.0], np.cumsum(self._arrivals)])
        inside = np.asarray([1 / 6, 1 / 2, 5 / 6])
        numbers = arrived[late][:, None] + inside * self._arrivals[late][:, None]
        begun = np.where(self._at_once, 0.0, inside) * self._step + edges[late][:, None]
        found = np.interp(numbers, served, edges, right=np.inf)
        return np.asarray(np.maximum(0.0, found - begun))

    def _steady_part(self, active: Floats, loads: Floats, weights: Floats) -> tuple[Floats, Floats]:
        """The mixture of steady states that the steps were in, each load between the two that were simulated."""
        sizes, low, share = cells(active, loads)
        weight = np.zeros((len(SIZES), len(LOADS)))
        np.add.at(weight, (sizes, low), weights * (1 - share))
        np.add.at(weight, (sizes, low + 1), weights * share)
        used = np.argwhere(weight > 0)
        values = [self._steady.quantiles(int(size), int(load)) for size, load in used]
        each = [weight[size, load] * WEIGHTS for size, load in used]
        empty = np.zeros(0)
        return np.concatenate([empty, *values]), np.concatenate([empty, *each])


def cells(active: Floats, loads: Floats) -> tuple[Places, Places, Floats]:
    """As :func:`size_of` and :func:`between`, for many: sizes, the lower loads, and the shares of the next ones."""
    sizes = np.maximum(0, np.searchsorted(SIZES, active, side="right") - 1)
    known = np.asarray(LOADS)
    low = np.clip(np.searchsorted(known, loads), 1, len(known) - 1) - 1
    share = np.clip((loads - known[low]) / (known[low + 1] - known[low]), 0.0, 1.0)
    return sizes, low, share


def weighted_percentile(values: Floats, weights: Floats, share: float) -> float:
    """The smallest value below or at which at least ``share`` of the weight lies; 0 without weight."""
    total = float(weights.sum())
    if total <= 0:
        return 0.0
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][min(int(np.searchsorted(reached, share * total)), len(order) - 1)])
