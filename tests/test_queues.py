"""JobQueue: bounded, in order, shared by threads and event loops; nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cvworker.job import Job
from cvworker.queues import JobQueue, QueueClosed
from fakes import StepClock, a_job, eventually


def a_queue(limit: int = 2, clock: StepClock | None = None) -> JobQueue:
    return JobQueue("test", limit, (clock or StepClock()).monotonic)


def filled(limit: int) -> tuple[JobQueue, list[Job]]:
    queue, jobs = a_queue(limit), [a_job(f"m{n}") for n in range(limit)]
    for job in jobs:
        queue.put(job)
    return queue, jobs


class Waiting:
    """A call on a thread of its own, to see whether it waits."""

    def __init__(self, pool: ThreadPoolExecutor, call, *arguments) -> None:
        self._began = threading.Event()

        def run():
            self._began.set()
            return call(*arguments)

        self.future = pool.submit(run)
        self._began.wait()

    def waits(self) -> bool:
        """Still under way after long enough for a call that does not wait (a wait ends only by another call)."""
        try:
            self.future.result(0.05)
        except TimeoutError:
            return True
        return False

    def result(self):
        return self.future.result(10)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_jobs_come_out_in_the_order_they_went_in_stamped_with_when_they_did() -> None:
    clock = StepClock(100.0)
    queue, (first, second) = a_queue(2, clock), (a_job(), a_job())
    queue.put(first)
    clock.advance(5)
    queue.put(second)
    assert queue.get(10) == [first, second]
    assert (first.queued_at, second.queued_at) == (100.0, 105.0)


def test_a_put_waits_for_room_and_goes_in_once_there_is(pool) -> None:
    queue, jobs = filled(2)
    late = a_job("late")
    put = Waiting(pool, queue.put, late)
    assert put.waits()
    assert queue.get() == jobs[:1]
    put.result()
    assert queue.get(10) == [jobs[1], late]


def test_several_jobs_go_in_as_far_as_there_is_room_and_the_rest_when_there_is_more(pool) -> None:
    queue, jobs = a_queue(2), [a_job(str(number)) for number in range(3)]
    put = Waiting(pool, queue.put, *jobs)
    assert put.waits()
    assert queue.get(10) == jobs[:2]
    put.result()
    assert queue.get(10) == jobs[2:]


def test_a_larger_limit_lets_everybody_in_who_fits(pool) -> None:
    queue, _ = filled(1)
    puts = [Waiting(pool, queue.put, a_job()) for _ in range(3)]
    assert all(put.waits() for put in puts)
    queue.limit = 4
    for put in puts:
        put.result()
    assert len(queue) == 4


def test_a_smaller_limit_takes_nothing_away_and_lets_nothing_in(pool) -> None:
    queue, jobs = filled(3)
    queue.limit = 1
    assert queue.reserve(10, timeout=0) == 0
    assert queue.get(2) == jobs[:2]
    assert queue.reserve(10, timeout=0) == 0, "the limit is reached by the one that is left"
    queue.get()
    assert queue.reserve(10, timeout=0) == 1


def test_a_get_waits_for_a_job(pool) -> None:
    queue, job = a_queue(), a_job()
    get = Waiting(pool, queue.get)
    assert get.waits()
    queue.put(job)
    assert get.result() == [job]


def test_a_get_that_timed_out_takes_no_wake_up_from_those_who_still_wait() -> None:
    async def scenario() -> None:
        queue, job = a_queue(), a_job()
        assert queue.get(timeout=0) == []
        waiting = asyncio.create_task(queue.aget())
        await asyncio.sleep(0)
        queue.put(job)
        assert await asyncio.wait_for(waiting, 5) == [job]

    asyncio.run(scenario())


def test_a_coroutine_that_is_cancelled_as_it_is_woken_passes_the_wake_up_on() -> None:
    async def scenario() -> None:
        queue, job = a_queue(), a_job()
        first, second = asyncio.create_task(queue.aget()), asyncio.create_task(queue.aget())
        await asyncio.sleep(0)
        queue.put(job)
        first.cancel()
        assert await asyncio.wait_for(second, 5) == [job]

        full, _ = filled(1)
        first, second = asyncio.create_task(full.aput(a_job())), asyncio.create_task(full.aput(job))
        await asyncio.sleep(0)
        full.get()
        first.cancel()
        await asyncio.wait_for(second, 5)
        assert full.get() == [job]

    asyncio.run(scenario())


def test_reserved_places_are_kept_free_until_they_are_given_back() -> None:
    async def scenario() -> None:
        queue, first, second = a_queue(2), a_job(), a_job()
        assert queue.reserve(10, timeout=0) == 2
        putting = asyncio.create_task(queue.aput(second))
        await asyncio.sleep(0)
        assert len(queue) == 0
        queue.fill([first], 2)
        await asyncio.wait_for(putting, 5)
        assert queue.get(10) == [first, second]

    asyncio.run(scenario())


def test_a_reserve_takes_what_comes_free_while_it_waits(pool) -> None:
    queue, _ = filled(3)
    reserve = Waiting(pool, lambda: queue.reserve(10, timeout=10))
    assert reserve.waits()
    queue.get(2)
    assert reserve.result() in (1, 2)


def test_a_reserve_waits_for_as_many_places_as_it_can_use_while_the_queue_is_well_filled(pool) -> None:
    queue, _ = filled(40)
    reserve = Waiting(pool, lambda: queue.reserve(10, timeout=10))
    queue.get(9)
    assert reserve.waits()
    queue.get(1)
    assert reserve.result() == 10


def test_a_reserve_takes_the_only_place_where_the_queue_runs_low(pool) -> None:
    queue, _ = filled(40)
    queue.limit = 8
    reserve = Waiting(pool, lambda: queue.reserve(10, timeout=10))
    queue.get(32)
    assert reserve.waits()
    queue.get(4)
    assert reserve.result() == 4


def test_a_message_with_more_jobs_than_places_is_taken_whole() -> None:
    queue, jobs = a_queue(2), [a_job(f"m1-{n}") for n in range(5)]
    queue.fill(jobs, queue.reserve(1, timeout=0))
    assert queue.reserve(1, timeout=0) == 0
    assert queue.get(10) == jobs


def test_a_closed_queue_gives_out_what_is_left_and_keeps_nobody_waiting(pool) -> None:
    queue, jobs = filled(1)
    put = Waiting(pool, queue.put, a_job())
    assert put.waits()
    queue.close()
    put.result()
    assert queue.get(10)[0] is jobs[0]
    with pytest.raises(QueueClosed):
        queue.get()

    empty = a_queue()
    get = Waiting(pool, queue.get)
    aget = Waiting(pool, lambda: asyncio.run(empty.aget()))
    empty.close()
    for each in (get, aget):
        with pytest.raises(QueueClosed):
            each.result()


def test_a_drained_queue_has_room_for_those_who_waited(pool) -> None:
    queue, jobs = filled(2)
    put = Waiting(pool, queue.put, late := a_job("late"))
    assert put.waits()
    assert queue.drain() == jobs
    put.result()
    assert queue.get() == [late]


def test_nothing_is_lost_duplicated_or_beyond_the_bound_with_many_threads_and_loops(pool) -> None:
    limit, each = 5, 150
    queue = a_queue(limit)
    jobs = [[a_job(f"{sender}-{n}") for n in range(each)] for sender in range(6)]
    over: list[int] = []

    def put_all(mine: list[Job]) -> None:
        for job in mine:
            queue.put(job)
            if len(queue) > limit:
                over.append(len(queue))

    def fill_all(mine: list[Job]) -> None:
        rest = deque(mine)
        while rest:
            places = queue.reserve(3, timeout=5)
            queue.fill([rest.popleft() for _ in range(min(places, len(rest)))], places)

    async def aput_all(mine: list[Job]) -> None:
        for job in mine:
            await queue.aput(job)

    def get_all() -> list[Job]:
        taken: list[Job] = []
        try:
            while True:
                taken += queue.get(4)
        except QueueClosed:
            return taken

    async def aget_all() -> list[Job]:
        taken: list[Job] = []
        try:
            while True:
                taken += await queue.aget(3)
        except QueueClosed:
            return taken

    async def two_of(one, *arguments) -> list:
        return await asyncio.gather(*(one(*argument) for argument in arguments))

    takers = [pool.submit(get_all) for _ in range(2)] + [pool.submit(lambda: asyncio.run(aget_all()))]
    both = pool.submit(lambda: asyncio.run(two_of(aget_all, (), ())))
    givers = [pool.submit(put_all, mine) for mine in jobs[:2]]
    givers += [pool.submit(fill_all, mine) for mine in jobs[2:4]]
    givers += [pool.submit(lambda: asyncio.run(two_of(aput_all, *((mine,) for mine in jobs[4:]))))]
    for giver in givers:
        giver.result(30)
    eventually(lambda: not len(queue))
    queue.close()

    by_taker = [taker.result(30) for taker in takers] + both.result(30)
    taken = [job for mine in by_taker for job in mine]
    assert sorted(job.number for job in taken) == sorted(job.number for mine in jobs for job in mine)
    assert not over
    for mine in by_taker:  # each sender's order is kept, as far as one taker can tell
        keys = [tuple(int(part) for part in job.request.key.split("-")) for job in mine]
        for sender in range(6):
            numbers = [number for who, number in keys if who == sender]
            assert numbers == sorted(numbers)


class QueueMachine(RuleBasedStateMachine):
    """One caller, against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 3
        self.queue = a_queue(self.limit)
        self.model: list[Job] = []
        self.reserved: list[int] = []

    @property
    def room(self) -> int:
        return self.limit - len(self.model) - sum(self.reserved)

    @precondition(lambda self: self.room > 0)
    @rule()
    def put(self) -> None:
        self.model.append(a_job())
        self.queue.put(self.model[-1])

    @rule(at_most=st.integers(1, 5))
    def get(self, at_most: int) -> None:
        assert self.queue.get(at_most, timeout=0) == self.model[:at_most]
        del self.model[:at_most]

    @rule(at_most=st.integers(1, 5))
    def reserve(self, at_most: int) -> None:
        taken = self.queue.reserve(at_most, timeout=0)
        assert taken == max(0, min(at_most, self.room))
        if taken:
            self.reserved.append(taken)

    @precondition(lambda self: self.reserved)
    @rule(count=st.integers(0, 5))
    def fill(self, count: int) -> None:
        jobs = [a_job() for _ in range(count)]
        self.queue.fill(jobs, self.reserved.pop(0))
        self.model += jobs

    @rule(limit=st.integers(1, 6))
    def resize(self, limit: int) -> None:
        self.queue.limit = self.limit = limit

    @rule()
    def drain(self) -> None:
        assert self.queue.drain() == self.model
        self.model = []

    @invariant()
    def is_as_long_as_the_list(self) -> None:
        assert len(self.queue) == len(self.model)


TestQueueAgainstAList = QueueMachine.TestCase
TestQueueAgainstAList.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
