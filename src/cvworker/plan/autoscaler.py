"""How many workers run: target tracking on the backlog, as deploy/cloudformation/service.yaml has it, and machines that
take minutes to start."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

LOOK_S = 60.0
"""CloudWatch's metrics of SQS and of the service come once a minute."""
HIGH_MINUTES, LOW_MINUTES, ZERO_MINUTES = 3, 15, 2
"""Minutes in a row above the target before target tracking adds, below it before it takes away, and with requests but
without a task before the alarm of the template adds the first."""
LOW_SHARE = 0.9
"""Target tracking takes away only below this share of the target."""
TASK_START_S = 90.0
"""A task on a machine that is there: container, weights, warm-up."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The parameters of the service: MinTasks, MaxTasks, BacklogPerTask, and the times they work with, in seconds."""

    least: int
    most: int
    backlog_per_task: float = 1200.0
    start_s: float = 240.0
    """From the wish for a task to its first receive: machine, image, weights, warm-up."""
    give_back_s: float = 900.0
    """For so long an empty machine is paid for before ECS gives it back."""
    out_cooldown_s: float = 60.0
    in_cooldown_s: float = 300.0
    tasks_per_machine: int = 1
    on_demand: int | None = None
    """Tasks on demand, the others on spot; None: all."""
    interruptions_per_hour: float = 0.0
    """Of one spot machine."""

    @property
    def fixed(self) -> bool:
        return self.least == self.most

    def spot_tasks(self, tasks: int) -> int:
        return 0 if self.on_demand is None else max(0, tasks - self.on_demand)

    def machines(self, tasks: float) -> int:
        return math.ceil(tasks / self.tasks_per_machine - 1e-9)


class Autoscaler:
    """The wanted number of tasks, decided once a minute from figures that are a minute old."""

    def __init__(self, scaling: Scaling, desired: int) -> None:
        self._scaling = scaling
        self.desired = desired
        self._known: tuple[float, float] | None = None
        self._high = self._low = self._zero = 0
        self._changed_at = -math.inf

    def look(self, now: float, visible: float, in_flight: float) -> int:
        """The wanted number of tasks after this minute's look at the queue."""
        known, self._known = self._known, (visible, in_flight)
        if known is not None and not self._scaling.fixed:
            self._decide(now, *known)
        return self.desired

    def _decide(self, now: float, visible: float, in_flight: float) -> None:
        s = self._scaling
        if self.desired == 0:  # there is nothing to divide by: only the alarm works
            self._zero = self._zero + 1 if visible >= 1 else 0
            if self._zero >= ZERO_MINUTES:
                self._want(now, 1)
            return
        share = (visible + in_flight) / self.desired / s.backlog_per_task
        self._high = self._high + 1 if share > 1 else 0
        self._low = self._low + 1 if share < LOW_SHARE else 0
        wanted = math.ceil((visible + in_flight) / s.backlog_per_task - 1e-9)
        if self._high >= HIGH_MINUTES and now - self._changed_at >= s.out_cooldown_s:
            self._want(now, max(self.desired, wanted))
        elif self._low >= LOW_MINUTES and now - self._changed_at >= s.in_cooldown_s:
            self._want(now, min(self.desired, wanted))

    def _want(self, now: float, tasks: int) -> None:
        tasks = min(self._scaling.most, max(self._scaling.least, tasks))
        if tasks != self.desired:
            self.desired, self._changed_at, self._zero = tasks, now, 0


@dataclass(slots=True)
class Bill:
    """What was paid for, in task-seconds and machine-seconds."""

    seconds: float = 0.0
    """That the bill is for."""
    tasks: float = 0.0
    active: float = 0.0
    machines: float = 0.0
    spot_machines: float = 0.0
    most_tasks: int = 0


@dataclass(slots=True)
class Fleet:
    """Tasks that are wanted, starting, active and gone, and what they cost. Both simulations drive it."""

    scaling: Scaling
    active: int
    autoscaler: Autoscaler = field(init=False)
    bill: Bill = field(default_factory=Bill)
    _starting: list[float] = field(default_factory=list)
    """When each will be ready, ascending."""
    _leaving: deque[float] = field(default_factory=deque)
    """When each empty machine is given back, ascending."""
    _now: float = 0.0

    def __post_init__(self) -> None:
        self.autoscaler = Autoscaler(self.scaling, self.active)

    @property
    def next_ready(self) -> float:
        return self._starting[0] if self._starting else math.inf

    def advance(self, now: float) -> int:
        """Let time pass; how many became ready."""
        ready = 0
        while (due := min(self.next_ready, self._leaving[0] if self._leaving else math.inf)) <= now:
            self._account(max(due, self._now))
            if due == self.next_ready:
                self._starting.pop(0)
                self.active += 1
                ready += 1
            else:
                self._leaving.popleft()
        self._account(now)
        return ready

    def look(self, now: float, visible: float, in_flight: float) -> int:
        """The minute's look: starts are begun; the number of active tasks that must end is returned."""
        missing = self.autoscaler.look(now, visible, in_flight) - self.active - len(self._starting)
        for _ in range(missing):
            self._start(now)
        surplus = max(0, -missing)
        while surplus and self._starting:
            self._starting.pop()
            surplus -= 1
        self.active -= surplus
        self._leaving.extend([now + self.scaling.give_back_s] * surplus)
        return surplus

    def interrupted(self, now: float, tasks: int) -> None:
        """So many active tasks lost their spot machines: others are started for them."""
        self.active -= tasks
        for _ in range(tasks):
            self._start(now)

    def _start(self, now: float) -> None:
        """On a machine that is empty and still there, or on a new one."""
        takes = self.scaling.start_s
        if self._leaving:
            self._leaving.pop()
            takes = min(takes, TASK_START_S)
        insort(self._starting, now + takes)

    def _account(self, now: float) -> None:
        passed, self._now = now - self._now, now
        here = self.active + len(self._starting) + len(self._leaving)
        machines = self.scaling.machines(here)
        spot = self.scaling.spot_tasks(here)
        on_demand = self.scaling.machines(here - spot)
        self.bill.seconds += passed
        self.bill.tasks += here * passed
        self.bill.active += self.active * passed
        self.bill.machines += on_demand * passed
        self.bill.spot_machines += (machines - on_demand) * passed
        self.bill.most_tasks = max(self.bill.most_tasks, self.active + len(self._starting))
