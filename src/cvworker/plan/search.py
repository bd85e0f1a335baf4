"""The cheapest fleet of each machine type that keeps the latency target, and what the others would cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cvworker.plan.aggregate import Aggregate, Flow
from cvworker.plan.autoscaler import Bill, Scaling
from cvworker.plan.capacity import Worker
from cvworker.plan.fleet import (
    HOURS_A_MONTH,
    SQS_IN_FLIGHT,
    Agreement,
    CurvePoint,
    Fleet,
    MachineType,
    Wish,
    price_a_month,
)
from cvworker.plan.simulate import Simulation
from cvworker.plan.steady import Steady
from cvworker.plan.traffic import DAY_S, Traffic

SINGLE_EVENTS = 150_000
"""Messages that are simulated one by one for each machine type: the whole day where it has no more, else a stretch."""
RISE = 0.4
"""Share of the stretch that lies before the busiest time."""
LEAST_STRETCH_S, MOST_STRETCH_S = 5.0, 7200.0
CELL, CELL_S = (4, 32), 120.0
"""Workers that are simulated one by one: of a larger fleet so many are a fair sample, and more of them only where they
are slow enough to be simulated for so long."""
PATIENCE = (0.25, 0.5, 1.0)
"""Shares of the latency target that may be spent waiting before more tasks are started."""
CHANCES = 3
"""Days that a fleet which follows the backlog has to keep the target on: it may swing, and then minutes decide."""
TRIES = 4
TOLERANCE = 1.02
"""What single events may be above the target: their percentiles vary by chance."""
WORTH = 0.97
"""Scaling has to be that much cheaper than a fixed fleet: it is the more delicate."""
MOST_OVER_PEAK = 1.25
"""MaxTasks of a fleet that follows the backlog, beside what the busiest time needs: it has to catch up."""
CURVE_POINTS = 8
CURVE_REACH = 2.5
"""The curve of latency over price ends at so many times the smallest fleet that keeps up."""


class Planner:
    """Looks for the fleet of one machine type."""

    def __init__(self, machine: MachineType, wish: Wish, *, tell: Callable[[str], None] = lambda _: None) -> None:
        self._machine, self._wish, self._tell = machine, wish, tell
        self._traffic = wish.traffic
        self._steady = Steady(wish.traffic, machine.worker, seed=wish.seed)
        self._keep_up = max(1, math.ceil(wish.traffic.a_day / DAY_S / self._steady.pace - 1e-9))
        self._at_peak = max(1, math.ceil(wish.traffic.busiest / self._steady.pace - 1e-9))

    def plan(self) -> Fleet:
        """The cheapest fleet that keeps the target, or the best there is where none does."""
        self._tell("fixed fleets")
        fixed = self._smallest_fixed()
        self._tell("fleets that follow the backlog")
        scaling = self._cheapest(fixed)
        self._tell("single events")
        scaling, flow, agreement, keeps = self._checked(scaling, fixed is not None)
        self._tell("latency over price")
        worker, traffic = self._machine.worker, self._traffic
        return Fleet(
            machine=self._machine,
            scaling=scaling,
            flow=flow,
            agreement=agreement,
            keeps=keeps,
            fixed=fixed,
            curve=self._curve(),
            pace=self._steady.pace,
            bound=worker.bound(traffic),
            in_flight=worker.held(traffic) * scaling.most,
            queues=max(1, math.ceil(traffic.busiest * worker.lone_s(traffic) / SQS_IN_FLIGHT)),
        )

    def _scaling(self, least: int, most: int, backlog: float = 0.0) -> Scaling:
        wish = self._wish
        on_demand = None if not wish.spot_share else max(0, math.ceil(most * (1 - wish.spot_share) - 1e-9))
        return Scaling(
            least=least,
            most=most,
            backlog_per_task=max(1.0, backlog or self._backlog(PATIENCE[1])),
            start_s=wish.start_s,
            tasks_per_machine=self._machine.tasks,
            on_demand=on_demand,
            interruptions_per_hour=wish.interruptions_a_month / HOURS_A_MONTH if wish.spot_share else 0.0,
        )

    def _backlog(self, patience: float) -> float:
        """BacklogPerTask: the wait to be tolerated times what a task answers in a second."""
        return float(max(1, round(self._steady.pace * self._wish.latency_s * patience)))

    def _flow(self, scaling: Scaling, chance: int = 0) -> Flow:
        first = min(
            scaling.most, max(scaling.least, math.ceil(self._traffic.rate_at(np.zeros(1))[0] / self._steady.pace))
        )
        return Aggregate(self._traffic, self._steady, scaling, seed=self._wish.seed + chance, first=first).run()

    def _keeps(self, scaling: Scaling) -> bool:
        chances = 1 if scaling.fixed else CHANCES
        return all(self._flow(scaling, n).percentile(0.95) <= self._wish.latency_s for n in range(chances))

    def _smallest_fixed(self) -> int | None:
        """None where no number of them keeps the target."""
        low, high = self._keep_up, max(self._keep_up, self._at_peak)
        while not self._keeps(self._scaling(high, high)):
            if high > 8 * self._at_peak + 8:
                return None
            low, high = high + 1, math.ceil(high * 1.5) + 1
        return _smallest(low, high, lambda tasks: self._keeps(self._scaling(tasks, tasks)))

    def _cheapest(self, fixed: int | None) -> Scaling:
        if fixed is None:  # none keeps the target; this one at least keeps up
            tasks = max(self._at_peak + 1, math.ceil(self._at_peak * 1.2))
            return self._scaling(tasks, tasks)
        best = self._scaling(fixed, fixed)
        price = WORTH * _cost(self._machine, self._flow(best).bill)
        most = max(fixed, math.ceil(self._at_peak * MOST_OVER_PEAK))
        for patience in PATIENCE:
            candidate = self._least_following(fixed, most, self._backlog(patience))
            flow = self._flow(candidate)
            if not candidate.fixed and _cost(self._machine, flow.bill) < price and self._keeps(candidate):
                best, price = candidate, _cost(self._machine, flow.bill)
        return best

    def _least_following(self, fixed: int, most: int, backlog: float) -> Scaling:
        """With the fewest tasks that always run."""
        least = _smallest(0, fixed, lambda tasks: self._keeps(self._scaling(tasks, most, backlog)))
        return self._scaling(least, most, backlog)

    def _checked(self, scaling: Scaling, may: bool) -> tuple[Scaling, Flow, Agreement, bool]:
        """Single events have the last word: where they miss the target, the fleet grows, a few times at most."""
        for attempt in range(TRIES):
            flow, agreement = self._flow(scaling), self.compare(scaling)
            whole = agreement.seconds >= DAY_S and agreement.share >= 1
            seen = agreement.events.percentile(0.95) if whole else flow.percentile(0.95)
            keeps = may and seen <= self._wish.latency_s * TOLERANCE
            if keeps or not may or attempt == TRIES - 1:
                break
            least = max(scaling.least + 1, math.ceil(scaling.least * 1.05))
            most = least if scaling.fixed else max(scaling.most, least)
            scaling = replace(scaling, least=least, most=most)
        return scaling, flow, agreement, keeps

    def compare(self, scaling: Scaling) -> Agreement:
        """Both simulations of the whole day, or of its busiest stretch, with the same fleet."""
        cell = min(CELL[1], max(CELL[0], int(SINGLE_EVENTS / CELL_S / self._steady.pace)))
        share, seconds = min(1.0, cell / scaling.most), DAY_S
        if self._traffic.a_day * share > SINGLE_EVENTS:
            share_rate = self._traffic.busiest * share
            seconds = max(LEAST_STRETCH_S, min(MOST_STRETCH_S, SINGLE_EVENTS / share_rate))
        elif self._traffic.a_day <= SINGLE_EVENTS:  # a large fleet for few images, which are slow
            share = 1.0
        start = 0.0
        if seconds < DAY_S:  # the rise is in it, where tasks are being started
            start = max(0.0, self._traffic.busiest_stretch(seconds) - seconds * RISE)
        return compare(self._traffic, self._machine.worker, scaling, self._wish, start, seconds, share)

    def _curve(self) -> tuple[CurvePoint, ...]:
        numbers = np.geomspace(self._keep_up, max(self._keep_up + 3, self._at_peak * CURVE_REACH), CURVE_POINTS)
        points = []
        for tasks in sorted({round(number) for number in numbers}):
            flow = self._flow(replace(self._scaling(tasks, tasks), on_demand=None))
            month = price_a_month(self._machine, flow.bill)
            points.append(CurvePoint(tasks, month, flow.percentile(0.5), flow.percentile(0.95)))
        return tuple(point for point in points if math.isfinite(point.p95_s))


def compare(
    traffic: Traffic, worker: Worker, scaling: Scaling, wish: Wish, start: float, seconds: float, share: float = 1.0
) -> Agreement:
    """Simulate a stretch of the day both ways, with a share of the fleet and of its traffic."""
    cell = replace(
        scaling,
        least=max(min(1, scaling.least), round(scaling.least * share)) if share < 1 else scaling.least,
        most=max(1, round(scaling.most * share)) if share < 1 else scaling.most,
        on_demand=None if scaling.on_demand is None else round(scaling.on_demand * share),
    )
    part = traffic.scaled(cell.most / scaling.most) if share < 1 else traffic
    steady = Steady(part, worker, seed=wish.seed)
    wanted = math.ceil(float(part.rate_at(np.asarray([start]))[0]) / steady.pace)
    first = min(cell.most, max(cell.least, wanted))
    events = Simulation(
        part,
        worker,
        cell,
        seed=wish.seed,
        start=start,
        seconds=seconds,
        first=first,
        without_notice=wish.without_notice,
    ).run()
    flow = Aggregate(part, steady, cell, seed=wish.seed, start=start, seconds=seconds, first=first).run()
    return Agreement(start, seconds, cell.most / scaling.most, events, flow)


def _smallest(low: int, high: int, keeps: Callable[[int], bool]) -> int:
    """The smallest number from ``low`` to ``high`` that keeps; ``high`` is known to."""
    while low < high:
        middle = (low + high) // 2
        if keeps(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _cost(machine: MachineType, bill: Bill) -> float:
    """What fleets are compared by: their price, or where that is not known their machines' time."""
    price = price_a_month(machine, bill)
    return (bill.machines + bill.spot_machines) / max(bill.seconds, 1e-9) if price is None else price
