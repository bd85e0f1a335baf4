"""The lease table: every message held, once, from its receive until it is settled."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cvworker.sqs.leases import Lease, LeaseTable
from fakes import StepClock

VISIBILITY, MAX_LEASE = 32.0, 200.0  # powers of two in the steps below, so that sums are exact


@pytest.fixture
def clock() -> StepClock:
    return StepClock(0.0)


@pytest.fixture
def table(clock: StepClock) -> LeaseTable:
    return LeaseTable(VISIBILITY, MAX_LEASE, clock.monotonic)


def hold(table: LeaseTable, message_id: str = "m1", receipt: str = "r1", **more: int) -> Lease:
    lease = table.add(message_id, receipt, **more)
    assert lease is not None
    return lease


def test_a_lease_is_due_once_half_of_its_visibility_timeout_is_left(table: LeaseTable, clock: StepClock) -> None:
    lease = hold(table)
    assert table.next_due() == 16.0
    clock.advance(15.9)
    assert table.due() == []
    clock.advance(0.1)
    assert table.due() == [(lease, "r1")]


def test_an_extension_counts_from_its_call_not_from_its_answer(table: LeaseTable, clock: StepClock) -> None:
    lease = hold(table)
    clock.advance(16)
    called_at = clock.monotonic()
    clock.advance(5)
    table.extended(lease, "r1", called_at)
    assert lease.deadline == called_at + VISIBILITY


def test_what_is_not_recorded_as_extended_stays_due_and_expires(table: LeaseTable, clock: StepClock) -> None:
    lease = hold(table)
    clock.advance(20)
    assert table.due()
    assert table.due(), "asked again, it is still due"
    assert table.alive(lease)
    clock.advance(12)
    assert not table.alive(lease)


def test_a_message_received_again_keeps_its_lease_and_takes_the_newest_handle(
    table: LeaseTable, clock: StepClock
) -> None:
    lease = hold(table)
    clock.advance(33)  # it expired here, and SQS delivered it once more, to us
    assert table.add("m1", "r2", attempt=2) is None
    assert (lease.receipt, lease.attempt, lease.deadline) == ("r2", 2, 33 + VISIBILITY)
    assert table.alive(lease)
    assert len(table) == 1


def test_an_answer_about_an_older_handle_changes_nothing(table: LeaseTable, clock: StepClock) -> None:
    lease = hold(table)
    clock.advance(8)
    table.add("m1", "r2")
    deadline = lease.deadline
    clock.advance(8)
    table.extended(lease, "r1", clock.monotonic())
    assert lease.deadline == deadline
    assert not table.lose(lease, "r1")
    assert not lease.lost


def test_a_lost_lease_is_not_extended_until_its_message_is_received_again(table: LeaseTable, clock: StepClock) -> None:
    lease = hold(table)
    assert table.lose(lease, "r1")
    assert not table.lose(lease, "r1"), "counted once"
    clock.advance(16)
    assert (table.due(), table.next_due(), table.alive(lease)) == ([], None, False)
    table.add("m1", "r2")
    assert table.alive(lease)


def test_a_message_held_for_max_lease_is_let_go_however_often_it_was_extended(
    table: LeaseTable, clock: StepClock
) -> None:
    lease = hold(table)
    while clock.monotonic() < MAX_LEASE:
        assert table.let_go() == []
        for each, receipt in table.due():
            table.extended(each, receipt, clock.monotonic())
        clock.advance(4)
    assert table.due() == []
    assert table.let_go() == [lease]
    assert (len(table), lease.lost, table.alive(lease)) == (0, True, False)
    assert not table.remove(lease), "it is not held any more"


def test_the_lease_of_a_message_let_go_and_received_anew_is_another(table: LeaseTable, clock: StepClock) -> None:
    old = hold(table)
    clock.advance(MAX_LEASE)
    table.let_go()
    new = hold(table, receipt="r2")
    assert not table.remove(old)
    assert table.held() == [new]


class LeaseMachine(RuleBasedStateMachine):
    """Receives, extensions, losses and removals in any order, against a dictionary."""

    leases = Bundle("leases")
    calls = Bundle("calls")
    """Extensions under way: the lease, the handle it was asked with, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = StepClock(0.0)
        self.table = LeaseTable(VISIBILITY, MAX_LEASE, self.clock.monotonic)
        self.held: dict[str, Lease] = {}
        self.deadlines: dict[Lease, float] = {}
        self.ends: dict[Lease, float] = {}
        self.lost: set[Lease] = set()
        self.receives = 0

    @rule(target=leases, number=st.integers(0, 4))
    def receive(self, number: int) -> Lease:
        message_id, now = f"m{number}", self.clock.monotonic()
        self.receives += 1
        lease = self.table.add(message_id, f"r{self.receives}")
        if message_id in self.held:
            assert lease is None, "one lease for each message"
            lease = self.held[message_id]
            self.lost.discard(lease)
        else:
            assert lease is not None
            self.held[message_id] = lease
            self.ends[lease] = now + MAX_LEASE
        assert lease.receipt == f"r{self.receives}"
        self.deadlines[lease] = now + VISIBILITY
        return lease

    @rule(seconds=st.sampled_from([0.25, 1.0, 7.0, 16.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(target=calls)
    def ask(self) -> list[tuple[Lease, str, float]]:
        return [(lease, receipt, self.clock.monotonic()) for lease, receipt in self.table.due()]

    @rule(call=consumes(calls))
    def succeed(self, call: list[tuple[Lease, str, float]]) -> None:
        for lease, receipt, called_at in call:
            self.table.extended(lease, receipt, called_at)
            if lease.receipt == receipt:
                self.deadlines[lease] = max(self.deadlines[lease], called_at + VISIBILITY)

    @rule(call=consumes(calls))
    def refuse(self, call: list[tuple[Lease, str, float]]) -> None:
        for lease, receipt, _ in call:
            new = lease.receipt == receipt and not lease.lost
            assert self.table.lose(lease, receipt) == new
            if new:
                self.lost.add(lease)

    @rule(lease=leases)
    def settle(self, lease: Lease) -> None:
        held = self.held.get(lease.message_id) is lease
        assert self.table.remove(lease) == held, "settled once"
        if held:
            del self.held[lease.message_id]

    @rule(lease=leases)
    def set_its_delay(self, lease: Lease) -> None:
        lease.ending = True

    @rule()
    def look_again(self) -> None:
        lease = next(iter(self.held.values()), None)
        if lease is not None:
            asked = [(lease, lease.receipt), (lease, "older")]
            assert self.table.still(asked) == ([] if lease.ending else asked[:1])

    @rule()
    def let_go(self) -> None:
        over = {lease for lease in self.held.values() if self.ends[lease] <= self.clock.monotonic()}
        assert set(self.table.let_go()) == over
        for lease in over:
            assert lease.lost
            del self.held[lease.message_id]

    @invariant()
    def holds_what_the_dictionary_holds(self) -> None:
        assert len(self.table) == len(self.held)
        assert set(self.table.held()) == set(self.held.values())
        for lease in self.held.values():
            assert lease.deadline == self.deadlines[lease], "changed by a receive or a success only"
            assert lease.lost == (lease in self.lost)
            assert self.table.alive(lease) == (not lease.lost and self.clock.monotonic() < lease.deadline)

    @invariant()
    def is_due_for_those_held_not_lost_and_half_way_the_first_to_expire_in_front(self) -> None:
        now, due = self.clock.monotonic(), [lease for lease, _ in self.table.due()]
        well = [lease for lease in self.held.values() if lease not in self.lost and not lease.ending]
        assert set(due) == {x for x in well if now < self.ends[x] and self.deadlines[x] - now <= VISIBILITY / 2}
        assert [lease.deadline for lease in due] == sorted(lease.deadline for lease in due)

    @invariant()
    def wakes_up_for_the_first_that_needs_something(self) -> None:
        well = [lease for lease in self.held.values() if lease not in self.lost and not lease.ending]
        times = [min(self.deadlines[lease] - VISIBILITY / 2, self.ends[lease]) for lease in well]
        assert self.table.next_due() == min(times, default=None)


TestLeasesInAnyOrder = LeaseMachine.TestCase
TestLeasesInAnyOrder.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
