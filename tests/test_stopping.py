"""Stopping: on time, in order, nothing lost, and what was not begun is at once somebody else's."""

from __future__ import annotations

import signal
import time

import psutil

from world import MODULES, World, poll

SLOW = f"{MODULES / 'mean.py'}:Slow"


def test_sigterm_under_load_ends_with_0_in_time_and_returns_what_was_not_begun(fast_world: World) -> None:
    # given a worker in the middle of more work than it can finish, and a queue whose messages stay hidden for long
    here = fast_world
    here.client.set_queue_attributes(QueueUrl=here.queue_url, Attributes={"VisibilityTimeout": "600"})
    here.send(*(here.request(n) for n in range(600)))
    worker = here.worker("--shutdown-grace", "15", module=SLOW).ready()
    assert here.receiver.wait_for(30, 60)
    # when it is told to stop
    began = time.monotonic()
    worker.signal()
    assert worker.wait(20) == 0
    assert time.monotonic() - began < 15
    # then every message is answered or visible, none hidden
    answered = {each.id for each in here.receiver.accepted}
    visible, hidden = here.counts()
    assert hidden == 0
    assert len(answered) + visible == 600
    assert worker.lines("stopped")[0]["held"] == 0
    # and another worker finishes without waiting for a visibility timeout
    other = here.worker("--exit-when-idle", "2")
    assert other.wait(90) == 0
    assert {each.id for each in here.receiver.received} == {f"req-{n}" for n in range(600)}
    assert not here.receiver.duplicates


def test_sigint_stops_like_sigterm(fast_world: World) -> None:
    worker = fast_world.worker().ready()
    worker.signal(signal.SIGINT)
    assert worker.wait(20) == 0


def test_a_second_signal_ends_at_once_with_1(fast_world: World) -> None:
    here = fast_world
    here.send(*(here.request(n) for n in range(200)))
    worker = here.worker(module=SLOW).ready()
    assert here.receiver.wait_for(1, 30)
    worker.signal()
    poll(lambda: worker.lines("stopping"), 10)
    began = time.monotonic()
    worker.signal()
    assert worker.wait(10) == 1
    assert time.monotonic() - began < 3


def test_sigterm_while_the_model_loads_ends_with_0(fast_world: World) -> None:
    worker = fast_world.worker()
    worker.url()
    began = time.monotonic()
    worker.signal()
    assert worker.wait(10) == 0
    assert time.monotonic() - began < 5


def test_an_idle_worker_ends_with_0_when_asked_to(fast_world: World) -> None:
    # given a queue with a little work
    here = fast_world
    here.send(*(here.request(n) for n in range(5)))
    worker = here.worker("--exit-when-idle", "5").ready()
    assert here.receiver.wait_for(5, 30)
    # when it has been empty for five seconds, then the worker ends
    began = time.monotonic()
    assert worker.wait(30) == 0
    assert 4 < time.monotonic() - began < 16


def test_a_worker_with_a_delayed_message_is_not_idle(fast_world: World) -> None:
    # given an answer that is refused once, so that its message comes back after some five seconds
    here = fast_world
    statuses = iter([400])
    here.receiver.respond = lambda received: next(statuses, 200)
    here.send(here.request(1))
    # when the worker may end after two idle seconds, then it waits for that message all the same
    assert here.worker("--exit-when-idle", "2").wait(60) == 0
    assert len(here.receiver.accepted) == 1


def _family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_processes_of_a_killed_worker_end_with_it(fast_world: World) -> None:
    worker = fast_world.worker("--preprocess-workers", "2").ready()
    family = _family(worker.process.pid)
    assert len(family) >= 4, "the model process, the fork server and two DataLoader processes"
    worker.kill()
    poll(lambda: not any(each.is_running() for each in family), 15, "all of them end")


def test_a_worker_that_stops_leaves_no_process_behind(fast_world: World) -> None:
    worker = fast_world.worker("--preprocess-workers", "2").ready()
    family = _family(worker.process.pid)
    worker.signal()
    assert worker.wait(20) == 0
    poll(lambda: not any(each.is_running() for each in family), 5, "all of them end")


def test_processes_of_a_killed_model_process_end_with_it(fast_world: World) -> None:
    here = fast_world
    worker = here.worker("--preprocess-workers", "2").ready()
    model = psutil.Process(worker.status()["model"]["pid"])
    family = model.children(recursive=True)
    model.kill()
    poll(lambda: not any(each.is_running() for each in family), 15, "all of them end")
    here.send(here.request(1))
    assert here.receiver.wait_for(1, 60), "a new one takes over"


def test_stopping_while_sqs_is_unreachable_ends_inside_the_grace(moto_world: World) -> None:
    here = moto_world
    here.send(*(here.request(n) for n in range(100)))
    worker = here.worker("--shutdown-grace", "10", module=SLOW).ready()
    assert here.receiver.wait_for(5, 30)
    here.sqs.close()
    poll(lambda: worker.lines("receive failed"), 30, "the worker notices")
    began = time.monotonic()
    worker.signal()
    assert worker.wait(15) == 0
    assert time.monotonic() - began < 10
