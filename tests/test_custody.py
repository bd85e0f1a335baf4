"""Custody with heartbeat and acks, on a queue whose visibility timeouts tick: each message ends once, and rightly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from cvworker.arena import Slot
from cvworker.errors import DownloadInterrupted, ImageNotFound, InvalidMessage
from cvworker.sqs import custody as custody_module
from cvworker.sqs.outcome import ANSWERED, LEFT, LOST, RELEASED, UNANSWERABLE_S, End, Outcome
from fakes import CALLBACK, EPOCH, FakeSqs, Keeper, StepClock, open_queue, throttled

Make = Callable[..., tuple[Keeper, FakeSqs, StepClock]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(*, max_receives: int | None = None, **more: object) -> tuple[Keeper, FakeSqs, StepClock]:
        clock = StepClock()
        sqs = FakeSqs(clock, visibility=30, max_receives=max_receives)
        return Keeper(open_queue(sqs, monkeypatch), clock, **more), sqs, clock  # type: ignore[arg-type]

    return make


def s3_event(*keys: str) -> str:
    records = [
        {
            "eventSource": "aws:s3",
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": "pictures"}, "object": {"key": key}},
        }
        for key in keys
    ]
    return json.dumps({"Records": records})


def test_a_message_becomes_a_job_that_knows_when_it_was_sent_and_how_often_received(make: Make) -> None:
    keeper, sqs, clock = make()
    sqs.send()
    clock.advance(3)
    job = keeper.receive_one()
    assert (job.request.key, job.lease.message_id, job.lease.attempt) == ("m1", "m1", 1)
    assert (job.lease.sent_at, job.lease.received_at) == (EPOCH + 1000, EPOCH + 1003)
    assert keeper.custody.alive(job)


def test_an_answered_message_is_deleted_however_long_the_answer_took(make: Make) -> None:
    keeper, sqs, clock = make()
    sqs.send()
    job = keeper.receive_one()
    for _ in range(600):
        clock.advance(1)
        keeper.heartbeat.beat()
        assert keeper.receive() == []
    keeper.custody.settle(job, ANSWERED)
    assert keeper.wait_ended() == [("m1", ANSWERED)]
    assert (sqs.messages, len(keeper.leases)) == ({}, 0)


def test_a_message_is_held_until_sqs_was_told_how_it_ended(make: Make) -> None:
    keeper, sqs, _ = make()
    sqs.send()
    job = keeper.receive_one()
    held: list[int] = []

    def look(name: str) -> None:
        if name == "delete":
            held.append(len(keeper.leases))

    sqs.during = look
    sqs.faults["delete"] += [throttled(), {0: "InternalError"}]
    keeper.custody.settle(job, ANSWERED)
    keeper.wait_ended()
    assert held == [1, 1, 1]


def test_a_message_received_again_while_it_is_held_stays_one_job_and_ends_by_the_newest_handle(make: Make) -> None:
    keeper, sqs, clock = make()
    sqs.send()
    job = keeper.receive_one()
    clock.advance(31)  # the heartbeat could not reach SQS
    assert not keeper.custody.alive(job)
    assert keeper.receive() == []
    assert keeper.custody.alive(job)
    assert job.lease.attempt == 2
    keeper.custody.settle(job, ANSWERED)
    keeper.wait_ended()
    assert sqs.entries("delete")[0][0]["ReceiptHandle"] == "m1/2"
    assert sqs.messages == {}


def test_an_extension_under_way_does_not_undo_the_delay_of_a_message_settled_meanwhile(make: Make) -> None:
    keeper, sqs, clock = make()
    sqs.send()
    job = keeper.receive_one()
    clock.advance(16)
    called, go_on = threading.Event(), threading.Event()

    def hold_up_the_extension(_name: str) -> None:
        if not called.is_set():
            called.set()
            go_on.wait(10)

    sqs.during = hold_up_the_extension
    beat = threading.Thread(target=keeper.heartbeat.beat)
    beat.start()
    assert called.wait(10)
    keeper.custody.settle(job, Outcome(End.LATER, 5))
    go_on.set()
    beat.join(10)
    keeper.wait_ended()
    assert sqs.hidden_for("m1") == 5


def test_a_message_on_its_way_back_is_not_extended_any_more(make: Make) -> None:
    keeper, sqs, clock = make()
    sqs.send()
    job = keeper.receive_one()
    sqs.faults["change"] += [throttled()]
    keeper.custody.settle(job, Outcome(End.LATER, 5))
    clock.advance(16)
    keeper.heartbeat.beat()
    keeper.wait_ended()
    assert {entry["VisibilityTimeout"] for entries in sqs.entries("change") for entry in entries} == {5}


def test_a_transient_error_comes_back_after_the_delay_of_its_attempt(make: Make) -> None:
    keeper, sqs, clock = make(max_receives=4)
    sqs.send()
    for attempt, step in ((1, 5), (2, 10), (3, 20)):
        job = keeper.receive_one()
        outcome = keeper.custody.verdict(job, DownloadInterrupted("reset"))
        assert outcome is not None
        keeper.custody.settle(job, outcome)
        keeper.wait_ended(attempt)
        assert 0.8 * step <= sqs.hidden_for("m1") <= 1.2 * step
        clock.advance(1.2 * step)


def test_a_host_that_asked_to_be_left_alone_is(make: Make) -> None:
    keeper, sqs, _ = make()
    sqs.send()
    job = keeper.receive_one()
    outcome = keeper.custody.verdict(job, DownloadInterrupted("busy", retry_after=120))
    assert outcome is not None
    assert (outcome.delay or 0) >= 120
    assert (keeper.custody.unanswered(job, retry_after=200).delay or 0) >= 200


@pytest.mark.parametrize(("max_receives", "last"), [(3, 3), (None, 5)])
def test_the_last_allowed_receive_answers_the_error(make: Make, max_receives: int | None, last: int) -> None:
    keeper, sqs, clock = make(max_receives=max_receives)
    sqs.send()
    for _ in range(last - 1):
        job = keeper.receive_one()
        assert keeper.custody.verdict(job, DownloadInterrupted("reset")) is not None
        keeper.leases.remove(job.lease)
        clock.advance(31)
    assert keeper.custody.verdict(keeper.receive_one(), DownloadInterrupted("reset")) is None


def test_the_last_receive_is_the_last_even_when_the_message_was_still_held(make: Make) -> None:
    keeper, sqs, clock = make(max_receives=2)
    sqs.send()
    job = keeper.receive_one()
    clock.advance(31)
    assert keeper.receive() == []
    assert keeper.custody.verdict(job, DownloadInterrupted("reset")) is None


def test_a_permanent_error_is_answered_at_once(make: Make) -> None:
    keeper, sqs, _ = make()
    sqs.send()
    assert keeper.custody.verdict(keeper.receive_one(), ImageNotFound("404")) is None


def test_without_a_redrive_policy_a_hopeless_message_comes_back_once_an_hour_at_most(make: Make) -> None:
    keeper, sqs, clock = make(max_attempts=3)
    sqs.send('{"image_url": "http://host/a.jpg"}')  # no callback, and no default
    received: list[float] = []
    while clock.now < 1000 + 24 * 3600:
        for job in keeper.receive():
            received.append(clock.now)
            keeper.custody.settle(job, keeper.custody.unanswerable(job))
            keeper.wait_ended(len(received))
        clock.advance(15)
    pauses = [after - before for before, after in pairwise(received)]
    assert pauses[:2] == [30, 30], "it keeps the visibility it has"
    assert min(pauses[2:]) >= UNANSWERABLE_S
    assert len(received) >= 24


def test_with_a_redrive_policy_a_hopeless_message_goes_to_the_dead_letter_queue(make: Make) -> None:
    keeper, sqs, clock = make(max_receives=3)
    sqs.send('{"image_url": "http://host/a.jpg"}')
    for _ in range(4):
        for job in keeper.receive():
            keeper.custody.settle(job, keeper.custody.unanswerable(job))
        clock.advance(31)
    assert sqs.dead == ["m1"]
    assert keeper.ended == [("m1", LEFT)] * 3
    assert sqs.entries("change") == sqs.entries("delete") == []


def test_an_answer_that_is_never_accepted_comes_back_with_growing_delays_then_once_an_hour(make: Make) -> None:
    keeper, sqs, clock = make(max_attempts=3)
    sqs.send()
    delays: list[float] = []
    for attempt in range(1, 6):
        job = keeper.receive_one()
        keeper.custody.settle(job, keeper.custody.unanswered(job))
        keeper.wait_ended(attempt)
        delays.append(sqs.hidden_for("m1"))
        clock.advance(delays[-1])
    assert 4 <= delays[0] <= 6 < 8 <= delays[1] <= 12
    assert delays[2:] == [UNANSWERABLE_S] * 3


def test_a_message_with_several_records_ends_once_all_have_with_the_end_that_keeps_it(make: Make) -> None:
    keeper, sqs, _ = make(default_callback=CALLBACK)
    sqs.send(s3_event("a.jpg", "b.jpg", "c.jpg"))
    first, second, third = keeper.receive()
    assert [job.request.key for job in (first, second, third)] == ["m1-1", "m1-2", "m1-3"]
    keeper.custody.settle(first, ANSWERED)
    keeper.custody.settle(second, Outcome(End.LATER, 7))
    assert keeper.ended == []
    keeper.custody.settle(third, Outcome(End.LATER, 40))
    assert keeper.wait_ended() == [("m1", Outcome(End.LATER, 40))]
    assert sqs.hidden_for("m1") == 40


def test_of_a_message_delivered_again_only_the_records_without_an_answer_begin(make: Make) -> None:
    keeper, sqs, _ = make(default_callback=CALLBACK)
    sqs.send(s3_event("a.jpg", "b.jpg", "c.jpg"))
    first, second, third = keeper.receive()
    keeper.custody.settle(first, ANSWERED)
    keeper.custody.settle(second, RELEASED)
    keeper.custody.settle(third, ANSWERED)
    keeper.wait_ended()

    again = keeper.receive_one()

    assert again.request.key == "m1-2"
    keeper.custody.settle(again, ANSWERED)
    assert keeper.wait_ended(2)[1] == ("m1", ANSWERED)
    assert sqs.messages == {}


def test_a_redelivery_of_an_answered_message_is_deleted_without_a_second_answer(make: Make) -> None:
    keeper, sqs, clock = make()
    sqs.send()
    job = keeper.receive_one()
    keeper.leases.lose(job.lease, "m1/1")
    clock.advance(31)
    stale = job.lease.receipt
    keeper.custody.settle(job, ANSWERED)  # its delete with an old handle succeeds, and deletes nothing
    sqs.messages["m1"].receipt = "m1/somebody else's"
    keeper.wait_ended()
    assert sqs.entries("delete")[0][0]["ReceiptHandle"] == stale

    assert keeper.receive() == []

    assert keeper.wait_ended(2)[1] == ("m1", ANSWERED)
    assert sqs.messages == {}


def test_only_the_newest_answers_are_remembered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custody_module, "REMEMBERED", 2)
    keeper, sqs, clock = make()
    for _ in range(3):
        sqs.send()
    for job in keeper.receive():
        keeper.leases.remove(job.lease)
        keeper.custody.settle(job, ANSWERED)
        sqs.messages[job.lease.message_id].receipt = "newer"
    clock.advance(31)
    assert [job.request.key for job in keeper.receive()] == ["m1"]


def test_a_test_event_of_s3_is_deleted_and_nobody_is_told(make: Make) -> None:
    keeper, sqs, _ = make()
    sqs.send('{"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "pictures"}')
    assert keeper.receive() == []
    assert keeper.wait_ended() == [("m1", ANSWERED)]
    assert sqs.messages == {}


@pytest.mark.parametrize("body", ["", "no json", "[]", '{"image_url": 5, "callback_url": "http://client.test/a"}'])
def test_what_is_no_valid_request_is_held_like_any_other_until_it_is_settled(make: Make, body: str) -> None:
    keeper, sqs, _ = make(default_callback=CALLBACK)
    sqs.send(body)
    job = keeper.receive_one()
    assert isinstance(job.error, InvalidMessage)
    assert len(keeper.leases) == 1
    keeper.custody.settle(job, ANSWERED)
    keeper.wait_ended()
    assert (sqs.messages, len(keeper.leases)) == ({}, 0)


def test_a_job_ends_once_whoever_says_so_first(make: Make) -> None:
    keeper, sqs, _ = make(default_callback=CALLBACK)
    sqs.send(s3_event("a.jpg", "b.jpg"))
    first, second = keeper.receive()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: keeper.custody.settle(first, ANSWERED), range(50)))
    keeper.custody.settle(second, RELEASED)
    keeper.custody.settle(second, ANSWERED)
    keeper.acks.stop(keeper.clock.monotonic() + 10)
    assert keeper.wait_ended() == [("m1", RELEASED)], "not before the other record had ended"


def test_a_message_whose_lease_is_lost_is_left_to_whoever_has_it(make: Make) -> None:
    keeper, sqs, _ = make()
    sqs.send()
    job = keeper.receive_one()
    keeper.leases.lose(job.lease, "m1/1")
    assert not keeper.custody.alive(job)
    keeper.custody.settle(job, Outcome(End.LATER, 10))
    assert keeper.ended == [("m1", LOST)]
    assert sqs.entries("change") == []


def test_a_settled_job_gives_its_image_back(make: Make) -> None:
    keeper, sqs, _ = make()
    sqs.send()
    job = keeper.receive_one()
    freed: list[bool] = []

    class Image(Slot):
        def __init__(self) -> None:
            pass

        def free(self) -> None:
            freed.append(True)

    job.image = Image()
    keeper.custody.settle(job, RELEASED)
    assert (freed, job.image) == ([True], None)
