"""The heartbeat: every held message stays hidden for as long as it is held, and no longer than ``max_lease``."""

from __future__ import annotations

import pytest

from cvworker.sqs.heartbeat import Heartbeat
from cvworker.sqs.leases import Lease, LeaseTable
from fakes import FakeSqs, StepClock, eventually, open_queue, throttled


class Ward:
    """A fake queue, the leases of its messages, and the heartbeat that keeps them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = StepClock()
        self.sqs = FakeSqs(self.clock, visibility=30)
        self.queue = open_queue(self.sqs, monkeypatch)
        self.leases = LeaseTable(30, 900, self.clock.monotonic)
        self.events: list[str] = []
        self.heartbeat = Heartbeat(self.queue, self.leases, self.clock, lambda what, n: self.events.extend([what] * n))

    def hold(self, count: int = 1) -> list[Lease]:
        sent = [self.sqs.send() for _ in range(count)]
        self.receive()
        return [lease for lease in self.leases.held() if lease.message_id in sent]

    def receive(self) -> int:
        """Hold everything that can be received; how much that was."""
        count = 0
        while messages := self.queue.receive(10, 30, wait_s=0):
            count += len(messages)
            for message in messages:
                self.leases.add(message["MessageId"], message["ReceiptHandle"])
        return count


@pytest.fixture
def ward(monkeypatch: pytest.MonkeyPatch) -> Ward:
    return Ward(monkeypatch)


def test_nobody_else_gets_a_message_while_it_is_held(ward: Ward) -> None:
    ward.hold(3)
    for _ in range(800):
        ward.clock.advance(1)
        ward.heartbeat.beat()
        assert ward.receive() == 0


def test_only_what_is_due_is_extended_ten_a_call(ward: Ward) -> None:
    ward.hold(23)
    ward.clock.advance(10)
    young = ward.hold(1)[0]
    ward.heartbeat.beat()
    assert ward.sqs.entries("change") == []

    ward.clock.advance(5)
    ward.heartbeat.beat()

    assert [len(entries) for entries in ward.sqs.entries("change")] == [10, 10, 3]
    assert ward.sqs.hidden_for("m1") == 30
    assert ward.sqs.hidden_for(young.message_id) == 25
    assert ward.events == ["extended"] * 23


def test_an_extension_that_failed_is_made_again_at_the_next_beat(ward: Ward) -> None:
    (lease,) = ward.hold()
    ward.sqs.faults["change"] += [throttled()]
    ward.clock.advance(15)
    ward.heartbeat.beat()
    assert lease.deadline == ward.clock.monotonic() + 15, "recorded only after it succeeded"
    ward.clock.advance(1)
    ward.heartbeat.beat()
    assert lease.deadline == ward.clock.monotonic() + 30
    assert ward.leases.alive(lease)


def test_of_a_call_that_failed_in_part_only_the_failed_entries_are_due_again(ward: Ward) -> None:
    ward.hold(3)
    ward.sqs.faults["change"] += [{1: "InternalError"}]
    ward.clock.advance(15)
    ward.heartbeat.beat()
    ward.heartbeat.beat()
    assert [[entry["ReceiptHandle"] for entry in entries] for entries in ward.sqs.entries("change")] == [
        ["m1/1", "m2/1", "m3/1"],
        ["m2/1"],
    ]


@pytest.mark.parametrize("code", ["ReceiptHandleIsInvalid", "MessageNotInflight"])
def test_a_handle_that_sqs_no_longer_knows_means_the_lease_is_lost_once(ward: Ward, code: str) -> None:
    (lease,) = ward.hold()
    ward.sqs.faults["change"] += [{0: code}]
    for _ in range(3):
        ward.clock.advance(16)
        ward.heartbeat.beat()
    assert lease.lost
    assert ward.events == ["lost"]
    assert len(ward.sqs.entries("change")) == 1


def test_a_loss_told_of_an_older_handle_is_none(ward: Ward) -> None:
    (lease,) = ward.hold()
    ward.clock.advance(31)

    def come_again(_name: str) -> None:
        assert ward.receive() == 1

    ward.sqs.during = come_again
    ward.heartbeat.beat()
    assert not lease.lost
    assert ward.events == []
    assert (lease.receipt, ward.leases.alive(lease)) == ("m1/2", True)


def test_a_message_settled_during_a_beat_is_not_extended_after_it(ward: Ward) -> None:
    """An extension would change the delay that its ack has just set."""
    leases = ward.hold(15)
    ward.clock.advance(15)

    def settle_the_last(_name: str) -> None:
        ward.leases.remove(leases[-1])

    ward.sqs.during = settle_the_last
    ward.heartbeat.beat()
    extended = [entry["ReceiptHandle"] for entries in ward.sqs.entries("change") for entry in entries]
    assert len(extended) == 14
    assert leases[-1].receipt not in extended


def test_a_message_received_again_during_a_beat_is_not_extended_by_its_older_handle(ward: Ward) -> None:
    leases = ward.hold(15)
    ward.clock.advance(15)

    def renew_the_last(_name: str) -> None:
        ward.leases.add(leases[-1].message_id, "m15/2")

    ward.sqs.during = renew_the_last
    ward.heartbeat.beat()
    assert "m15/1" not in [e["ReceiptHandle"] for entries in ward.sqs.entries("change") for e in entries]


def test_a_message_held_for_max_lease_is_let_go_and_comes_back(ward: Ward) -> None:
    (lease,) = ward.hold()
    for _ in range(900):
        ward.clock.advance(1)
        ward.heartbeat.beat()
    assert ward.events.count("let_go") == 1
    assert (lease.lost, len(ward.leases)) == (True, 0)
    ward.clock.advance(30)
    assert ward.receive() == 1


def test_the_thread_beats_by_itself_and_ends_when_told(ward: Ward) -> None:
    ward.hold()
    ward.heartbeat.start()
    ward.sqs.faults["change"] += [throttled()]
    ward.clock.advance(16)
    eventually(lambda: ward.events == ["extended"], "the message was extended at the second try")
    ward.heartbeat.stop()
    assert not ward.heartbeat.thread.is_alive()
