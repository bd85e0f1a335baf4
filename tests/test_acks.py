"""Acks: deletes and delays, ten at a time, until SQS has taken them or never will."""

from __future__ import annotations

import random

import pytest
from botocore.exceptions import EndpointConnectionError

from cvworker.sqs.acks import Acks
from cvworker.sqs.leases import Lease, LeaseTable
from cvworker.sqs.outcome import ANSWERED, LEFT, LOST, RELEASED, End, Outcome
from cvworker.sqs.queue import Queue
from fakes import FakeSqs, StepClock, eventually, open_queue, throttled


class Desk:
    """Acks on a fake queue; what has ended, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = StepClock()
        self.sqs = FakeSqs(self.clock)
        self.queue: Queue = open_queue(self.sqs, monkeypatch)
        self.leases = LeaseTable(30, 900, self.clock.monotonic)
        self.ended: list[tuple[str, Outcome]] = []
        self.acks = Acks(self.queue, self.clock, lambda lease, how: self.ended.append((lease.message_id, how)))

    def receive(self, count: int) -> list[Lease]:
        sent = [self.sqs.send() for _ in range(count)]
        while len(self.leases.held()) < len(sent):
            for message in self.queue.receive(10, 30, wait_s=0):
                self.leases.add(message["MessageId"], message["ReceiptHandle"])
        return self.leases.held()

    def flush(self, *, within: float = 10) -> None:
        """Send everything and end the thread."""
        if not self.acks.thread.is_alive():
            self.acks.start()
        self.acks.stop(self.clock.monotonic() + within)
        eventually(lambda: not self.acks.thread.is_alive())


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


def receipts(calls: list[list[dict[str, str]]]) -> list[list[str]]:
    return [[entry["ReceiptHandle"] for entry in entries] for entries in calls]


def test_messages_are_deleted_ten_a_call_with_the_index_as_the_entrys_id(desk: Desk) -> None:
    for lease in desk.receive(25):
        desk.acks.put(lease, ANSWERED)
    desk.flush()
    calls = desk.sqs.entries("delete")
    assert [len(entries) for entries in calls] == [10, 10, 5]
    assert [entry["Id"] for entry in calls[0]] == [str(n) for n in range(10)]
    assert desk.sqs.messages == {}
    assert sorted(desk.ended) == sorted((f"m{n}", ANSWERED) for n in range(1, 26))


def test_acks_that_come_one_by_one_are_sent_together(desk: Desk) -> None:
    leases = desk.receive(10)
    desk.acks.start()
    for lease in leases:
        desk.acks.put(lease, ANSWERED)
    eventually(lambda: len(desk.ended) == 10)
    assert len(desk.sqs.entries("delete")) <= 2
    desk.flush()


def test_a_delay_becomes_the_messages_visibility_and_is_never_cut_short(desk: Desk) -> None:
    first, second, third = desk.receive(3)
    desk.acks.put(first, Outcome(End.LATER, 4.2))
    desk.acks.put(second, Outcome(End.LATER, 900.0))
    desk.acks.put(third, RELEASED)
    desk.flush()
    assert [desk.sqs.hidden_for(m) for m in ("m1", "m2", "m3")] == [5, 900, 0]


def test_deletes_and_delays_go_in_calls_of_their_own(desk: Desk) -> None:
    answered, later = desk.receive(2)
    desk.acks.put(answered, ANSWERED)
    desk.acks.put(later, Outcome(End.LATER, 10))
    desk.flush()
    assert receipts(desk.sqs.entries("delete")) == [["m1/1"]]
    assert receipts(desk.sqs.entries("change")) == [["m2/1"]]


def test_only_the_entries_that_failed_are_sent_again(desk: Desk) -> None:
    desk.sqs.faults["delete"] += [{1: "InternalError", 3: "ThrottlingException"}]
    for lease in desk.receive(5):
        desk.acks.put(lease, ANSWERED)
    desk.acks.start()
    eventually(lambda: len(desk.ended) == 5)
    assert receipts(desk.sqs.entries("delete"))[1:] == [["m2/1", "m4/1"]]
    assert [message_id for message_id, _ in desk.ended] == ["m1", "m3", "m5", "m2", "m4"]
    desk.flush()


@pytest.mark.parametrize("error", [throttled(), EndpointConnectionError(endpoint_url="http://sqs")])
def test_a_call_that_failed_is_made_again_and_nothing_has_ended_before(desk: Desk, error: Exception) -> None:
    desk.sqs.faults["delete"] += [error, error]
    seen: list[int] = []
    desk.sqs.during = lambda _name: seen.append(len(desk.ended))
    for lease in desk.receive(3):
        desk.acks.put(lease, ANSWERED)
    desk.acks.start()
    eventually(lambda: len(desk.ended) == 3)
    assert seen == [0, 0, 0]
    assert desk.sqs.messages == {}
    desk.flush()


def test_another_try_uses_the_newest_handle(desk: Desk) -> None:
    (lease,) = desk.receive(1)
    desk.sqs.faults["delete"] += [throttled()]

    def expire_and_come_again(_name: str) -> None:
        if not desk.sqs.entries("delete"):
            desk.clock.advance(31)
            (message,) = desk.queue.receive(1, 30, wait_s=0)
            assert desk.leases.add("m1", message["ReceiptHandle"]) is None

    desk.sqs.during = expire_and_come_again
    desk.acks.put(lease, ANSWERED)
    desk.acks.start()
    eventually(lambda: desk.ended)
    assert receipts(desk.sqs.entries("delete")) == [["m1/1"], ["m1/2"]]
    assert desk.sqs.messages == {}
    desk.flush()


@pytest.mark.parametrize("code", ["ReceiptHandleIsInvalid", "MessageNotInflight"])
def test_a_handle_that_sqs_no_longer_knows_is_not_tried_again(desk: Desk, code: str) -> None:
    (lease,) = desk.receive(1)
    desk.sqs.faults["change"] += [{0: code}]
    desk.acks.put(lease, Outcome(End.LATER, 10))
    desk.flush()
    assert desk.ended == [("m1", Outcome(End.LATER, 10))]
    assert len(desk.sqs.entries("change")) == 1


@pytest.mark.parametrize("outcome", [LEFT, LOST])
def test_what_sqs_need_not_know_ends_without_a_call(desk: Desk, outcome: Outcome) -> None:
    (lease,) = desk.receive(1)
    desk.acks.put(lease, outcome)
    assert desk.ended == [("m1", outcome)]
    desk.flush()
    assert desk.sqs.entries("delete") == desk.sqs.entries("change") == []


def test_a_lost_message_is_not_delayed_but_an_answered_one_is_deleted_all_the_same(desk: Desk) -> None:
    """After ``max_lease`` the handle may still hold the message, and its client must not be answered twice."""
    first, second = desk.receive(2)
    first.lost = second.lost = True
    desk.acks.put(first, Outcome(End.LATER, 10))
    desk.acks.put(second, ANSWERED)
    desk.flush()
    assert desk.sqs.entries("change") == []
    assert list(desk.sqs.messages) == ["m1"]
    assert len(desk.ended) == 2


def test_a_stop_sends_what_waits(desk: Desk) -> None:
    desk.acks.start()
    for lease in desk.receive(3):
        desk.acks.put(lease, RELEASED)
    desk.flush()
    assert [desk.sqs.hidden_for(message_id) for message_id in desk.sqs.messages] == [0, 0, 0]


def test_a_stop_gives_up_in_time_when_sqs_does_not_answer(desk: Desk) -> None:
    desk.sqs.faults["delete"] += [throttled()] * 50
    for lease in desk.receive(2):
        desk.acks.put(lease, ANSWERED)
    desk.flush(within=0)
    assert len(desk.ended) == 2, "they are held no more: SQS will deliver them again"
    assert len(desk.sqs.messages) == 2


def test_each_message_ends_once_whatever_goes_wrong(desk: Desk) -> None:
    chance = random.Random(7)
    for name in ("delete", "change"):
        desk.sqs.faults[name] += [
            throttled() if chance.random() < 0.2 else {n: "InternalError" for n in range(10) if chance.random() < 0.2}
            for _ in range(4)
        ]
    leases = desk.receive(60)
    later = {lease.message_id for lease in leases if chance.random() < 0.5}
    desk.acks.start()
    for lease in leases:
        desk.acks.put(lease, Outcome(End.LATER, 40) if lease.message_id in later else ANSWERED)
    eventually(lambda: len(desk.ended) >= 60)
    desk.flush()
    assert sorted(message_id for message_id, _ in desk.ended) == sorted(lease.message_id for lease in leases)
    assert {message_id: desk.sqs.hidden_for(message_id) for message_id in desk.sqs.messages} == dict.fromkeys(later, 40)
