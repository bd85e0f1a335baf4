"""The stop sequence as a state machine: whatever the worker is in the middle of, nothing is lost and it ends in time.

A real worker runs on a queue whose time can jump; image hosts, the model process and callback receivers are stand-ins
that do with each picture what its plan says.
"""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cvworker import worker as worker_module
from cvworker.arena import PAGE
from cvworker.errors import WorkerFailed
from cvworker.job import Job
from cvworker.observe.metrics import Metrics
from cvworker.settings import Settings
from cvworker.sqs import heartbeat as heartbeat_module
from cvworker.sqs.leases import Lease, LeaseTable
from cvworker.sqs.outcome import End
from cvworker.steps import inference as inference_module
from cvworker.worker import Worker
from fakes import CALLBACK, eventually, open_queue, throttled
from stand_ins import VISIBILITY, Fetches, JumpClock, Model, Plan, Sqs, Stage
from test_custody import s3_event

GRACE_S = 0.6
SLACK_S = 3.5
"""For three threads that may be inside a call, each of which is waited for a second, and for busy cores."""


def often(*usual: str, seldom: str) -> st.SearchStrategy[str]:
    return st.sampled_from([*usual, *usual, *seldom.split()])


PLANS = st.builds(
    Plan,
    download=often("ok", "ok", seldom="slow hangs missing interrupted"),
    model=often("ok", "slow", seldom="hangs invalid dies"),
    callback=often("ok", "slow", seldom="hangs refused busy gone"),
)
MESSAGES = st.lists(st.lists(PLANS, min_size=1, max_size=3), min_size=1, max_size=5)


class StopMachine(RuleBasedStateMachine):
    """Messages arrive, steps go on, SQS fails and time passes in any order, until the worker is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.stage, self.clock = Stage(), JumpClock()
        self.sqs = Sqs(self.clock)
        self.sent = 0
        self.stopped, self.sent_in_time = False, 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Any, timeout: float = 20) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    @initialize(bound=st.integers(1, 4), at_once=st.integers(1, 4), latency=st.sampled_from([0, 0, 0.02]))
    def begin(self, bound: int, at_once: int, latency: float) -> None:
        open_queue(self.sqs, self.patch)
        self.patch.setattr(worker_module, "Fetcher", partial(Fetches, self.stage))
        self.patch.setattr(inference_module, "ModelLink", partial(Model, self.stage))
        self.patch.setattr(heartbeat_module, "TICK_S", 0.02)
        self.patch.setattr(LeaseTable, "_when", lambda _table, _lease: 0.0)  # each beat extends all that it may
        self.sqs.latency = latency
        # fmt: off
        given = {
            "queue_url": "https://sqs.eu-west-1.amazonaws.com/1/images", "module": "threat", "callback_url": CALLBACK,
            "allowed_buckets": ["pictures"], "shutdown_grace": GRACE_S, "max_queue_size": bound, "batch_size": 1,
            "download_concurrency": at_once, "download_threads": 2, "callback_concurrency": at_once,
            "max_image_bytes": PAGE, "max_inflight_bytes": 6 * PAGE, "preprocess_workers": 1,
        }
        # fmt: on
        self.worker = worker = Worker(Settings(**given), Metrics(), self.clock)
        self.leases: dict[str, Lease] = {}
        self.jobs: list[Job] = []
        admit = worker.custody.admit

        def admitted(message: Any) -> list[Job]:
            jobs = admit(message)
            self.jobs += jobs
            for job in jobs:
                self.stage.jobs[job.request.key] = job
                self.leases[job.lease.receipt] = job.lease
            return jobs

        self.patch.setattr(worker.custody, "admit", admitted)
        worker.warm_up()
        self.answering = self.run(worker.start(self.stage))  # type: ignore[arg-type]

    @rule(messages=MESSAGES, seconds=st.sampled_from([0.0, 0.01, 0.05]))
    def arrive(self, messages: list[list[Plan]], seconds: float) -> None:
        for plans in messages:
            self.sent += 1
            keys = [f"m{self.sent}-{n}" for n in range(1, len(plans) + 1)] if len(plans) > 1 else [f"m{self.sent}"]
            self.stage.plans |= dict(zip(keys, plans, strict=True))
            self.sqs.send(s3_event(*keys))
        time.sleep(seconds)

    @precondition(lambda self: not self.stopped)
    @rule(step=st.sampled_from(["download", "model", "callback"]), seconds=st.sampled_from([0.0, 0.02]))
    def go_on(self, step: str, seconds: float) -> None:
        if step == "model":
            assert self.stage.model is not None
            self.stage.model.go_on()
        else:
            self.stage.rounds[step] += 1
        time.sleep(seconds)

    @precondition(lambda self: not self.stopped)
    @rule(operation=st.sampled_from(["receive", "delete", "change"]), wholly=st.booleans())
    def sqs_fails_once(self, operation: str, wholly: bool) -> None:
        self.sqs.faults[operation].append(throttled() if wholly or operation == "receive" else {0: "InternalError"})

    @precondition(lambda self: not self.stopped)
    @rule()
    def sqs_is_away_for_a_moment(self) -> None:
        self.sqs.trouble = "unreachable"
        time.sleep(0.05)
        self.sqs.trouble = None

    @precondition(lambda self: not self.stopped)
    @rule()
    def time_passes(self) -> None:
        """Messages that were put off come back; those held must not expire while SQS cannot be told."""
        far = self.clock.now + VISIBILITY / 2 + 10
        if all(lease.deadline > far for lease in self.worker.leases.held()):
            self.clock.advance(VISIBILITY / 2 + 1)

    @precondition(lambda self: self.sent > 4 and not self.stopped)
    @rule(
        trouble=st.sampled_from([None, None, None, "unreachable", "hangs"]),
        again=st.sampled_from(["", "after", "meanwhile"]),
        failed=st.sampled_from([False, False, False, True]),
        late=st.lists(st.lists(PLANS, min_size=1, max_size=2), max_size=3),
    )
    def stop(self, trouble: str | None, again: str, failed: bool, late: list[list[Plan]]) -> None:
        self.stopped, self.sqs.trouble = True, trouble
        if failed:
            self.worker.failure = WorkerFailed("a thread ended")
        arrivals = threading.Timer(0.05, self.arrive, (late, 0.0))
        arrivals.start()
        began = time.monotonic()
        self.run(self._stop(twice=again == "meanwhile"))
        took = time.monotonic() - began
        assert took < GRACE_S + SLACK_S, f"stopped after {took:.2f} s"
        if again == "after":
            self.run(self._stop(twice=False))
        arrivals.join()
        self.sent_in_time = self.sent
        self.check(trouble)

    async def _stop(self, *, twice: bool) -> None:
        await asyncio.gather(*(self.worker.stop(self.answering) for _ in range(1 + twice)))

    def check(self, trouble: str | None) -> None:
        worker, sqs, stage = self.worker, self.sqs, self.stage

        def alive() -> list[str]:
            return [thread.name for thread in worker.threads() if thread.is_alive()]

        eventually(lambda: worker.arena.used == 0, "every image is let go", 2)
        if trouble != "hangs":
            eventually(lambda: not alive(), f"these end: {alive()}", 2)
            assert worker.leases.held() == []
        assert stage.posted_after_the_end == []
        for lease in self.leases.values():
            jobs = [job for job in self.jobs if job.lease is lease]
            assert all(job.ended for job in jobs), f"{lease.message_id} has jobs without an end"
            assert len(lease.outcomes) == len(self.keys(lease.message_id)), f"{lease.message_id}: one end for each job"
        for number in range(1, self.sent + 1):
            self.check_message(f"m{number}", trouble)
        released: set[str] = set()
        for entry in (entry for entries in sqs.entries("change") for entry in entries):
            extends = entry["VisibilityTimeout"] == VISIBILITY
            assert not (extends and entry["ReceiptHandle"] in released), "extended after it was given back"
            released |= set() if extends else {entry["ReceiptHandle"]}

    def check_message(self, message_id: str, trouble: str | None) -> None:
        sqs = self.sqs
        message = sqs.messages.get(message_id)
        if message is None:
            assert self.keys(message_id) <= self.stage.accepted, f"{message_id} is deleted, and not answered"
            return
        if sqs.hidden_for(message_id) <= 0:
            return
        lease = self.leases.get(message.receipt)
        if lease is None:  # no job of it was begun, or nobody knows of it
            assert message.receipt in sqs.told or message.receipt in sqs.lost, f"{message_id} is held by nobody"
            return
        if not sqs.told.get(message.receipt, not trouble):
            return  # SQS could not be told
        ends = {outcome.end for outcome in lease.outcomes}
        assert End.LATER in ends
        assert End.RELEASED not in ends, f"{message_id} was given back, and is hidden"

    def keys(self, message_id: str) -> set[str]:
        return {key for key in self.stage.plans if key.split("-")[0] == message_id}

    def teardown(self) -> None:
        try:
            if not self.stopped:
                self.stop(None, "", False, [])
            nobodys = [f"m{number}" for number in range(self.sent_in_time + 1, self.sent + 1)]
            assert not any(self.sqs.messages[each].receives for each in nobodys), "received after the stop"
        finally:
            self.sqs.back.set()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.patch.undo()


TestWorkerToldToStopAtAnyMoment = StopMachine.TestCase
TestWorkerToldToStopAtAnyMoment.settings = settings(
    max_examples=25,
    stateful_step_count=12,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],  # each example takes a second, and to shrink one would take hundreds
)


@pytest.mark.parametrize("plan", [Plan(download="hangs"), Plan(model="hangs"), Plan(callback="hangs")], ids=str)
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_step_that_hangs_with_everything_behind_it_full_costs_no_message(plan: Plan, at_once: int) -> None:
    machine = StopMachine()
    machine.begin(bound=1, at_once=at_once, latency=0)
    machine.arrive([[plan]] * 4 + [[Plan(), plan, Plan()]] * 12, seconds=0.3)
    machine.teardown()
