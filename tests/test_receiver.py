"""The receiver: long polls for as many messages as there is room, and no more calls than an idle queue needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cvworker.job import Job
from cvworker.queues import JobQueue
from cvworker.sqs.receiver import Receiver
from fakes import FakeSqs, StepClock, a_job, eventually, open_queue, throttled


class Station:
    """A receiver on a fake queue; each message becomes one job."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, limit: int = 100, threads: int = 3) -> None:
        self.clock = StepClock()
        self.sqs = FakeSqs(self.clock)
        self.outbox = JobQueue("download", limit, self.clock.monotonic)
        self.calls: list[tuple[str, int]] = []
        self.admit: Callable[[Any], list[Job]] = lambda message: [a_job(message["MessageId"])]
        self.receiver = Receiver(
            open_queue(self.sqs, monkeypatch),
            self.outbox,
            lambda message: self.admit(message),
            threads=threads,
            visibility=45,
            clock=self.clock,
            called=lambda outcome, _seconds, messages: self.calls.append((outcome, messages)),
        )

    def asked(self) -> list[int]:
        """How many messages each call was for."""
        return [entries[0]["max"] for entries in self.sqs.entries("receive")]

    def stop(self) -> None:
        self.receiver.stop()
        assert self.receiver.join(10)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Station]]:
    stations: list[Station] = []

    def start(prepare: Callable[[Station], object] = lambda _station: None, **more: int) -> Station:
        stations.append(Station(monkeypatch, **more))
        prepare(stations[-1])
        stations[-1].receiver.start()
        return stations[-1]

    yield start
    for station in stations:
        station.stop()


def test_messages_become_jobs_in_the_queue_each_once(start) -> None:
    station = start()
    sent = [station.sqs.send() for _ in range(45)]
    eventually(lambda: len(station.outbox) == 45)
    assert sorted(job.request.key for job in station.outbox.get(100)) == sorted(sent)


def test_the_visibility_timeout_is_asked_for_at_each_receive(start) -> None:
    station = start()
    station.sqs.send()
    eventually(lambda: len(station.outbox) == 1)
    assert station.sqs.hidden_for("m1") == 45


def test_no_more_is_received_than_there_is_room_for(start) -> None:
    station = start(lambda station: [station.sqs.send() for _ in range(50)], limit=4)
    eventually(lambda: len(station.outbox) == 4)
    assert station.asked() == [4]

    station.outbox.get(3)
    eventually(lambda: len(station.outbox) == 4)

    assert sum(message.receives for message in station.sqs.messages.values()) == 7


def test_several_threads_together_still_keep_to_the_room(start) -> None:
    longest: list[int] = []
    station = start(lambda station: [station.sqs.send() for _ in range(200)], limit=13)
    taken = 0
    while taken < 200:
        longest.append(len(station.outbox))
        taken += len(station.outbox.get(3, timeout=10))
    assert max(longest) <= 13


def test_a_message_with_several_jobs_is_taken_whole(start) -> None:
    def prepare(station: Station) -> None:
        station.admit = lambda message: [a_job(f"{message['MessageId']}-{n}") for n in range(5)]
        station.sqs.send()

    station = start(prepare, limit=2)
    assert len(eventually(lambda: station.outbox.get(10, timeout=0))) == 5


def test_an_idle_queue_sees_one_long_poll_at_a_time(start) -> None:
    station = start()
    eventually(lambda: len(station.asked()) >= 8)
    assert station.sqs.most_polling == 1


def test_once_there_are_messages_every_thread_receives(start) -> None:
    together = threading.Barrier(3)

    def prepare(station: Station) -> None:
        def admit(message: Any) -> list[Job]:
            if int(message["MessageId"][1:]) % 10 == 1:  # the first of a call
                together.wait(10)
            return [a_job()]

        station.admit = admit
        for _ in range(30):
            station.sqs.send()

    station = start(prepare)
    eventually(lambda: len(station.outbox) == 30, "three calls were under way at once")


def test_sqs_errors_are_waited_out_and_told(start) -> None:
    station = start(lambda station: station.sqs.faults["receive"].append(throttled("ReceiveMessage")), threads=1)
    eventually(lambda: not station.receiver.reachable)
    assert "Rate exceeded" in station.receiver.last_error
    assert station.calls == [("error", 0)]
    assert len(station.asked()) == 1, "it does not spin"

    station.sqs.send()
    eventually(lambda: len(station.outbox) == 1)

    assert station.receiver.reachable
    assert ("ok", 1) in station.calls


def test_places_not_used_are_given_back_whatever_came_of_the_call(start) -> None:
    station = start(lambda station: station.sqs.faults["receive"].append(throttled()), limit=10, threads=1)
    eventually(lambda: len(station.asked()) >= 4)
    station.stop()
    assert station.outbox.reserve(100, timeout=0) == 10


def test_it_knows_when_the_last_message_came(start) -> None:
    station = start()
    station.clock.advance(77)
    station.sqs.send()
    eventually(lambda: station.receiver.last_message_at == 1077)


def test_a_stop_begins_no_more_polls_and_keeps_what_those_under_way_find(start) -> None:
    station = start(lambda station: setattr(station.sqs, "poll_scale", 30.0), threads=1)
    eventually(lambda: station.sqs.polling == 1)
    station.receiver.stop()
    assert not station.receiver.join(0), "the poll under way is left to return"
    station.sqs.send()
    assert station.receiver.join(10)
    assert len(station.outbox) == 1
    assert len(station.asked()) == 1


def test_a_stop_does_not_wait_for_room(start) -> None:
    station = start(lambda station: station.sqs.send(), limit=1)
    eventually(lambda: len(station.outbox) == 1)
    station.stop()
