"""The settings of a fleet under the names they have in ``deploy/``, ready to paste."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cvworker.plan.autoscaler import Scaling
from cvworker.plan.fleet import DAYS_A_MONTH, HOURS_A_MONTH, SQS_IN_FLIGHT, Fleet, Wish
from cvworker.plan.traffic import Traffic

SQS_DOLLARS = 0.40e-6
"""A call, us-east-1, before the discounts from 100 billion calls a month on."""
SQS_BATCH = 10
LEAST_VISIBILITY_S, VISIBILITY_STEP_S, MOST_VISIBILITY_S = 30, 10, 900
LEAST_RECEIVES, MOST_RECEIVES = 4, 10
"""Three receives without an answer, and a message is run alone: the next one tells."""
AGE_SLACK = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """What to set, worked out for one fleet."""

    least: int
    most: int
    backlog_per_task: int
    on_demand: int
    instance_type: str
    batch_size: int
    max_queue_size: int
    visibility_s: int
    max_receives: int
    max_age_s: int
    processes: int
    spot: bool

    def queue_parameters(self) -> str:
        """For deploy/cloudformation/queue.yaml."""
        return f"VisibilityTimeout={self.visibility_s} MaxReceiveCount={self.max_receives} MaxAge={self.max_age_s}"

    def service_parameters(self) -> str:
        """For deploy/cloudformation/service.yaml."""
        found = (
            f"InstanceType={self.instance_type} MinTasks={self.least} MaxTasks={self.most} "
            f"OnDemandTasks={self.on_demand} BacklogPerTask={self.backlog_per_task} BatchSize={self.batch_size}"
        )
        return found + (f" SpotInstanceTypes={self.instance_type}" if self.spot else "")

    def keda(self) -> str:
        """For deploy/kubernetes/base/scaledobject.yaml."""
        return f'minReplicaCount: {self.least}\nmaxReplicaCount: {self.most}\nqueueLength: "{self.backlog_per_task}"'

    def environment(self) -> str:
        """For the worker, where neither of them is used."""
        lines = [
            f"CVWORKER_BATCH_SIZE={self.batch_size}",
            f"CVWORKER_MAX_QUEUE_SIZE={self.max_queue_size}",
            f"CVWORKER_VISIBILITY_TIMEOUT={self.visibility_s}",
        ]
        return "\n".join([*lines, *([f"CVWORKER_PROCESSES={self.processes}"] if self.processes > 1 else [])])


def recommend(fleet: Fleet, wish: Wish) -> Settings:
    """The settings of ``fleet``.

    ``max_queue_size`` is what ``auto`` comes to, or less where all workers together would have more than SQS lets be in
    flight. ``visibility_timeout``: a worker that lives extends it, so that it has to cover twice what a message takes
    in a full worker, and no more, since so long the messages of one that was killed are missing.
    """
    worker, traffic, scaling = fleet.machine.worker, wish.traffic, fleet.scaling
    size = worker.queue_size(traffic)
    while size > 1 and replace(worker, max_queue_size=size).held(traffic) * scaling.most > SQS_IN_FLIGHT * fleet.queues:
        size -= 1
    inside = worker.held(traffic) / fleet.pace + worker.lone_s(traffic)
    visibility = min(MOST_VISIBILITY_S, max(LEAST_VISIBILITY_S, _up(2 * inside, VISIBILITY_STEP_S)))
    return Settings(
        least=scaling.least,
        most=scaling.most,
        backlog_per_task=round(scaling.backlog_per_task),
        on_demand=scaling.most if scaling.on_demand is None else scaling.on_demand,
        instance_type=fleet.machine.name,
        batch_size=worker.batch_size,
        max_queue_size=size,
        visibility_s=visibility,
        max_receives=_receives(traffic, wish, inside),
        max_age_s=max(60, _up(AGE_SLACK * wish.latency_s + (wish.start_s if scaling.least == 0 else 0), 60)),
        processes=worker.processes,
        spot=scaling.spot_tasks(scaling.most) > 0,
    )


def remarks(fleet: Fleet, wish: Wish) -> list[str]:
    """What to know besides, one sentence each: limits of SQS, calls and bytes that are paid for, doubts."""
    traffic, found = wish.traffic, []
    if fleet.machine.note:
        found.append(f"The figures of {fleet.machine.name} are {fleet.machine.note}: measure them before you buy.")
    if fleet.queues > 1:
        found.append(
            f"A standard queue has {SQS_IN_FLIGHT:,} messages in flight at most, and the busiest time has more: "
            f"share the traffic out over {fleet.queues} queues, each with its part of the fleet."
        )
    elif fleet.in_flight > SQS_IN_FLIGHT:
        found.append(
            f"All workers full would have {fleet.in_flight:,} messages in flight, and SQS lets {SQS_IN_FLIGHT:,} be in "
            "one queue: set the max_queue_size below, which is lowered for that."
        )
    a_month = traffic.a_day * DAYS_A_MONTH
    calls = a_month * (1 + 2 / SQS_BATCH)  # each is sent by itself, received and deleted ten at a time
    found.append(
        f"Beside the machines: about {calls / 1e6:,.1f} million SQS calls a month "
        f"(${calls * SQS_DOLLARS:,.0f} at $0.40 a million; with ten messages a send a quarter of it) and "
        f"{a_month * traffic.mean_bytes / 1e12:,.1f} TB of pictures, which a NAT gateway charges by the gigabyte."
    )
    if wish.spot_share and fleet.machine.on_demand is not None and fleet.machine.spot is None:
        found.append(f"No spot price of {fleet.machine.name} is known, so all is at the other price: see --prices.")
    if wish.traffic.host_errors:
        found.append("Downloads that fail for now come back after 5, 10, 20 … seconds: the percentiles have them in.")
    if fleet.scaling.least == 0:
        found.append(f"With MinTasks 0 the first image after a pause waits about {wish.start_s + 120:.0f} s.")
    return found


def _receives(traffic: Traffic, wish: Wish, inside_s: float) -> int:
    """Receives before a message is given up, so that bad luck alone sends less than one a month to the dead letters."""
    spot = wish.interruptions_a_month / HOURS_A_MONTH / 3600 * inside_s if wish.spot_share else 0.0
    fails = min(0.9, max(traffic.host_errors + spot, 1e-3))
    a_month = max(traffic.a_day * DAYS_A_MONTH, 1.0)
    return min(MOST_RECEIVES, max(LEAST_RECEIVES + 1, math.ceil(math.log(a_month) / -math.log(fails))))


def _up(value: float, step: int) -> int:
    return math.ceil(value / step - 1e-9) * step


def scaling_in_words(scaling: Scaling) -> str:
    """``12`` or ``2 to 12``."""
    return f"{scaling.most}" if scaling.fixed else f"{scaling.least} to {scaling.most}"
