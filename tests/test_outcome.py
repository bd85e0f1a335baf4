"""How long a message waits before SQS delivers it again, and which end wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvworker.sqs.outcome import ANSWERED, LEFT, LOST, RELEASED, End, Outcome, later

attempts = st.integers(1, 10_000)


def test_delays_double_from_five_seconds_and_end_at_fifteen_minutes() -> None:
    delays = [later(attempt, uniform=lambda _low, _high: 1.0).delay for attempt in range(1, 11)]
    assert delays == [5, 10, 20, 40, 80, 160, 320, 640, 900, 900]


@given(attempts, st.floats(0, 1))
def test_a_delay_is_within_a_fifth_of_its_step(attempt: int, luck: float) -> None:
    step = min(5 * 2 ** (attempt - 1), 900)
    outcome = later(attempt, uniform=lambda low, high: low + luck * (high - low))
    assert outcome.end is End.LATER
    assert 0.8 * step <= (outcome.delay or 0) <= 1.2 * step


@given(attempts)
def test_the_jitter_never_goes_beyond_the_cap(attempt: int) -> None:
    assert (later(attempt, uniform=lambda _low, high: high).delay or 0) <= 900


@given(attempts, st.floats(0, 3600), st.floats(0, 1))
def test_a_host_that_asked_for_time_is_given_at_least_that(attempt: int, wished: float, luck: float) -> None:
    assert (later(attempt, wished, uniform=lambda low, high: low + luck * (high - low)).delay or 0) >= wished


@given(st.floats(900, 3600))
def test_messages_that_wait_for_one_host_do_not_come_back_all_at_once(wished: float) -> None:
    soonest = later(1, wished, uniform=lambda low, _high: low).delay or 0
    latest = later(1, wished, uniform=lambda _low, high: high).delay or 0
    assert latest - soonest >= 0.1 * wished


def test_the_end_that_keeps_the_message_outranks_the_one_that_deletes_it() -> None:
    worst_first = [LOST, RELEASED, Outcome(End.LATER, 5), LEFT, ANSWERED]
    assert sorted(worst_first, key=lambda outcome: outcome.rank) == worst_first[::-1]


def test_released_messages_are_visible_at_once_and_left_ones_stay_as_they_are() -> None:
    assert (RELEASED.delay, LEFT.delay) == (0, None)


def test_an_outcome_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ANSWERED.delay = 5  # type: ignore[misc]
