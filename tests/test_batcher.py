"""Dynamic batches: full, or as old as the first sample may get; in order; and some alone."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cvworker.model.batcher import Batcher, Sample
from fakes import StepClock

MAX_WAIT = 0.25  # a power of two, so that sums are exact


def sample(number: int, *, alone: bool = False) -> Sample:
    return Sample(number, f"value {number}", 1.0, alone)


def numbers(batch: list[Sample]) -> list[int]:
    return [each.number for each in batch]


@pytest.fixture
def clock() -> StepClock:
    return StepClock(0.0)


@pytest.fixture
def batcher(clock: StepClock) -> Batcher:
    return Batcher(4, MAX_WAIT, clock.monotonic)


def test_a_full_batch_leaves_at_once_and_the_rest_waits(batcher: Batcher) -> None:
    batcher.add([sample(n) for n in range(6)])
    assert numbers(batcher.ready()) == [0, 1, 2, 3]
    assert batcher.ready() == []
    assert len(batcher) == 2


def test_a_lone_sample_leaves_when_it_has_waited_max_wait_and_not_before(batcher: Batcher, clock: StepClock) -> None:
    batcher.add([sample(1)])
    clock.advance(MAX_WAIT - 1e-9)
    assert batcher.ready() == []
    clock.advance(1e-9)
    assert numbers(batcher.ready()) == [1]


def test_it_is_the_first_samples_wait_that_counts(batcher: Batcher, clock: StepClock) -> None:
    batcher.add([sample(1)])
    clock.advance(MAX_WAIT / 2)
    batcher.add([sample(2)])
    assert batcher.ready() == []
    clock.advance(MAX_WAIT / 2)
    assert numbers(batcher.ready()) == [1, 2]


def test_samples_go_on_joining_while_nobody_takes_the_batch(batcher: Batcher, clock: StepClock) -> None:
    batcher.add([sample(1)])
    clock.advance(10)
    batcher.add([sample(2), sample(3)])
    assert numbers(batcher.ready()) == [1, 2, 3]


def test_a_sample_that_must_be_alone_is_a_batch_and_keeps_its_place(batcher: Batcher) -> None:
    batcher.add([sample(1), sample(2, alone=True), sample(3, alone=True), sample(4)])
    assert [numbers(batcher.ready()) for _ in range(4)] == [[1], [2], [3], []]


def test_a_smaller_batch_size_counts_for_what_already_waits(batcher: Batcher) -> None:
    batcher.add([sample(n) for n in range(3)])
    assert batcher.ready() == []
    batcher.batch_size = 2
    assert numbers(batcher.ready()) == [0, 1]


def test_a_closed_batcher_waits_for_nothing(batcher: Batcher) -> None:
    batcher.add([sample(1)])
    batcher.close()
    assert numbers(batcher.take()) == [1]
    assert batcher.take() == []


def test_who_takes_waits_for_the_first_sample_and_then_for_the_batch() -> None:
    batcher = Batcher(2, 0.05, time.monotonic)
    batches: list[list[int]] = []

    def take_all() -> None:
        while batch := batcher.take():
            batches.append(numbers(batch))

    taker = threading.Thread(target=take_all)
    taker.start()
    batcher.add([sample(1), sample(2), sample(3)])
    taker.join(0.02)
    batcher.add([sample(4), sample(5)])
    batcher.close()
    taker.join(10)
    assert not taker.is_alive()
    assert [number for batch in batches for number in batch] == [1, 2, 3, 4, 5]
    assert batches[0] == [1, 2]


class BatcherMachine(RuleBasedStateMachine):
    """Samples come, time passes, batches are asked for; against a list."""

    @initialize(batch_size=st.integers(1, 5))
    def begin(self, batch_size: int) -> None:
        self.clock = StepClock(0.0)
        self.batch_size = batch_size
        self.batcher = Batcher(batch_size, MAX_WAIT, self.clock.monotonic)
        self.waiting: list[tuple[Sample, float]] = []
        self.number = 0

    @rule(alone=st.lists(st.sampled_from([False, False, False, True]), min_size=1, max_size=6))
    def add(self, alone: list[bool]) -> None:
        samples = []
        for each in alone:
            self.number += 1
            samples.append(sample(self.number, alone=each))
        self.batcher.add(samples)
        self.waiting += [(each, self.clock.now) for each in samples]

    @rule(eighths=st.integers(1, 9))
    def wait(self, eighths: int) -> None:
        self.clock.advance(eighths * MAX_WAIT / 8)

    @rule(batch_size=st.integers(1, 5))
    def resize(self, batch_size: int) -> None:
        self.batcher.batch_size = self.batch_size = batch_size

    @rule()
    def take(self) -> None:
        batch = self.batcher.ready()
        front = [each for each, _ in self.waiting[: len(batch)]]
        assert batch == front, "in order, none left out"
        assert len(batch) <= self.batch_size
        assert len(batch) == 1 or not any(each.alone for each in batch), "who must be alone is"
        del self.waiting[: len(batch)]
        if not batch and self.waiting:
            assert self.clock.now < self.waiting[0][1] + MAX_WAIT, "nobody waits longer than max_wait"
            assert len(self.waiting) < self.batch_size
            assert not any(each.alone for each, _ in self.waiting)
        elif batch and len(batch) < self.batch_size and not batch[0].alone:
            arrived = batch[0].arrived
            followed = bool(self.waiting) and self.waiting[0][0].alone
            assert followed or self.clock.now >= arrived + MAX_WAIT, "it left early"

    @invariant()
    def counts_what_waits(self) -> None:
        assert not hasattr(self, "batcher") or len(self.batcher) == len(self.waiting)


TestBatcherAgainstAList = BatcherMachine.TestCase
TestBatcherAgainstAList.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
