"""What a fleet is for, what it is made of, and what came out of simulating it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cvworker.plan.aggregate import Flow
from cvworker.plan.autoscaler import Bill, Scaling
from cvworker.plan.capacity import Worker
from cvworker.plan.simulate import Outcome
from cvworker.plan.traffic import DAY_S, Traffic

DAYS_A_MONTH = 365 / 12
HOURS_A_MONTH = DAYS_A_MONTH * 24
SQS_IN_FLIGHT = 120_000
"""Messages of a standard queue that may be in flight; beyond that, receives bring nothing."""


@dataclass(frozen=True, slots=True)
class MachineType:
    """A machine, its price an hour, and the worker that each of its tasks is."""

    name: str
    worker: Worker
    tasks: int = 1
    """One for each GPU."""
    on_demand: float | None = None
    spot: float | None = None
    note: str = ""
    """Where its figures are not its own measurement: what they were scaled from."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the fleet is for."""

    traffic: Traffic
    latency_s: float
    """The 95th percentile, from sent to answered, over all images of the day."""
    start_s: float = 240.0
    spot_share: float = 0.0
    """Of the tasks at the busiest time; 0: all on demand."""
    interruptions_a_month: float = 1.0
    """Of one spot machine."""
    without_notice: float = 0.05
    """Share of them that come without the two minutes' notice."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Agreement:
    """Both simulations of one stretch."""

    start_s: float
    seconds: float
    share: float
    """Of the whole fleet and its traffic that was simulated."""
    events: Outcome
    flow: Flow

    def rows(self) -> list[tuple[str, float, float]]:
        """Name, by single events, aggregated."""
        events, flow = self.events, self.flow
        tasks = [bill.active / max(bill.seconds, 1e-9) for bill in (events.bill, flow.bill)]
        return [
            ("images/s", events.achieved, flow.achieved),
            *(
                (f"p{share * 100:.0f} s", events.percentile(share), flow.percentile(share))
                for share in (0.5, 0.95, 0.99)
            ),
            ("tasks", tasks[0], tasks[1]),
        ]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A fixed fleet: what it costs a month and how long its images take."""

    tasks: int
    month: float | None
    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """What one machine type would need."""

    machine: MachineType
    scaling: Scaling
    flow: Flow
    """The day, aggregated."""
    agreement: Agreement
    keeps: bool
    """Whether the target is kept."""
    fixed: int | None
    """Tasks of the smallest fixed fleet that keeps it."""
    curve: tuple[CurvePoint, ...]
    pace: float
    bound: str
    in_flight: int
    """Messages in flight at most, all workers full."""
    queues: int
    """Queues that are needed, because a standard queue has 120,000 messages in flight at most."""

    @property
    def whole_day(self) -> bool:
        """Whether the day was simulated message by message."""
        return self.agreement.seconds >= DAY_S and self.agreement.share >= 1

    def percentile(self, share: float) -> float:
        """Of the day: by single events where they were affordable, else aggregated."""
        return self.agreement.events.percentile(share) if self.whole_day else self.flow.percentile(share)

    @property
    def bill(self) -> Bill:
        return self.agreement.events.bill if self.whole_day else self.flow.bill

    @property
    def machines(self) -> float:
        """Paid for, on average."""
        bill = self.bill
        return (bill.machines + bill.spot_machines) / max(bill.seconds, 1e-9)

    @property
    def month(self) -> float | None:
        """Price of the machines a month."""
        return price_a_month(self.machine, self.bill)

    @property
    def limit(self) -> str:
        """What limits it: a part of the worker, or SQS where one queue would have to have too much in flight."""
        return "SQS: in flight" if self.queues > 1 else self.bound

    @property
    def load(self) -> float:
        """Share of what the active tasks could do that they did."""
        events = self.agreement.events
        if not self.whole_day:
            return self.flow.load
        return float(np.isfinite(events.latencies).sum()) / max(events.bill.active * self.pace, 1e-9)


def price_a_month(machine: MachineType, bill: Bill) -> float | None:
    """Dollars for machines that run as in ``bill``, day after day."""
    if machine.on_demand is None:
        return None
    spot = machine.on_demand if machine.spot is None else machine.spot
    dollars = (bill.machines * machine.on_demand + bill.spot_machines * spot) / 3600
    return dollars * DAYS_A_MONTH * DAY_S / max(bill.seconds, 1e-9)
