"""How much the worker holds: bounds that follow what it can do, not what happens to arrive."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvworker.queues import JobQueue
from cvworker.tuning import (
    HOLD_S,
    LEAST_DOWNLOADS,
    MOST_DOWNLOADS,
    NUM_QUEUES,
    Pace,
    Tuner,
    download_concurrency,
    queue_limit,
)
from fakes import StepClock, a_job

rates = st.floats(0, 10_000)


@given(rates, st.integers(4, 43_200), st.integers(1, 512), st.integers(1, 256))
def test_the_bound_follows_the_rule_of_the_article_and_feeds_every_step(
    rate: float, visibility: int, batch_size: int, downloads: int
) -> None:
    limit = queue_limit(rate, visibility=visibility, batch_size=batch_size, downloads=downloads)
    least = math.ceil((2 * batch_size + downloads) / NUM_QUEUES)
    assert limit >= least, "two batches and the downloads under way fit into the three queues"
    if limit > least:
        assert limit <= math.ceil(rate * visibility / NUM_QUEUES), "messages would time out in the worker"
        assert limit <= math.ceil(rate * HOLD_S / NUM_QUEUES), "messages would be hidden from other workers"


def test_a_short_visibility_timeout_bounds_the_queues_before_three_seconds_of_work_do() -> None:
    assert queue_limit(300, visibility=1, batch_size=1, downloads=1) == 100
    assert queue_limit(300, visibility=30, batch_size=1, downloads=1) == 300


def test_downloads_grow_only_while_all_are_in_use_and_the_next_step_starves() -> None:
    assert download_concurrency(32, in_hand=32, waiting=5, next_hungry=True) == 64
    assert download_concurrency(32, in_hand=15, waiting=5, next_hungry=True) == 32
    assert download_concurrency(32, in_hand=32, waiting=0, next_hungry=True) == 32
    assert download_concurrency(32, in_hand=32, waiting=5, next_hungry=False) == 32


@given(st.integers(LEAST_DOWNLOADS, MOST_DOWNLOADS), st.integers(0, 300), st.integers(0, 50), st.booleans())
def test_download_concurrency_stays_within_its_bounds(now: int, in_hand: int, waiting: int, hungry: bool) -> None:
    following = download_concurrency(now, in_hand=in_hand, waiting=waiting, next_hungry=hungry)
    assert LEAST_DOWNLOADS <= following <= MOST_DOWNLOADS


def test_a_quiet_queue_leaves_the_pace_as_it_is() -> None:
    pace = Pace()
    pace.observe(100, 1.0, saturated=True)
    for _ in range(60):
        pace.observe(0, 1.0, saturated=False)
    assert pace.rate == 100


def test_the_pace_falls_when_work_waits_and_little_is_done() -> None:
    pace = Pace()
    pace.observe(100, 1.0, saturated=True)
    for _ in range(30):
        pace.observe(10, 1.0, saturated=True)
    assert pace.rate == pytest.approx(10, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1))
def test_the_pace_is_never_more_than_what_was_seen(seen: list[tuple[int, bool]]) -> None:
    pace = Pace()
    for done, saturated in seen:
        pace.observe(done, 1.0, saturated=saturated)
    assert 0 <= pace.rate <= max(done for done, _ in seen)


def queues() -> list[JobQueue]:
    return [JobQueue(name, 1, StepClock().monotonic) for name in ("download", "inference", "results")]


def test_auto_bounds_and_downloads_follow_the_measured_pace() -> None:
    three = queues()
    tuner = Tuner(three, max_queue_size="auto", concurrency="auto", visibility=30, batch_size=8)
    start = three[0].limit
    assert {queue.limit for queue in three} == {start}
    three[0].put(a_job())  # work waits, and nothing for the model

    tuner.look(done=600, seconds=2.0, downloading=LEAST_DOWNLOADS)

    assert {queue.limit for queue in three} == {300}
    assert tuner.downloads == 2 * LEAST_DOWNLOADS


def test_numbers_are_left_alone() -> None:
    three = queues()
    tuner = Tuner(three, max_queue_size=7, concurrency=5, visibility=30, batch_size=8)
    three[0].put(a_job())
    tuner.look(done=600, seconds=1.0, downloading=5)
    assert [queue.limit for queue in three] == [7, 7, 7]
    assert tuner.downloads == 5
