"""How many tasks the service's own scaling wants, evaluated as AWS would."""

from __future__ import annotations

import pytest
from cloudformation import Scaling, metric_math, service
from hypothesis import given
from hypothesis import strategies as st


def counts(visible: int, in_work: int) -> dict[str, str]:
    return {"ApproximateNumberOfMessages": str(visible), "ApproximateNumberOfMessagesNotVisible": str(in_work)}


@given(st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 50), st.integers(1, 5000), st.integers(1, 50))
def test_with_tasks_their_number_becomes_backlog_over_target_from_wherever_it_was(
    visible: int, in_work: int, wanted: int, target: int, most: int
) -> None:
    scaling = Scaling(service(BacklogPerTask=target, MaxTasks=most))
    needed = -(-(visible + in_work) // target)
    # Floating-point arithmetic may round a quotient that is whole up by one.
    assert scaling.desired(wanted, counts(visible, in_work), wanted) - min(needed, most) in (0, 1)


@pytest.mark.parametrize("visible", [1, 10, 10**6])
@pytest.mark.parametrize("known", [0, None])
def test_from_none_there_is_one_for_the_first_request_also_where_none_is_not_counted(
    visible: int, known: int | None
) -> None:
    assert Scaling(service()).desired(known, counts(visible, 0), 0) == 1


def test_an_empty_queue_wants_no_task_or_as_few_as_are_kept() -> None:
    assert Scaling(service()).desired(3, counts(0, 0), 3) == 0
    assert Scaling(service(MinTasks=2)).desired(3, counts(0, 0), 3) == 2


def test_requests_in_work_keep_a_task() -> None:
    assert Scaling(service()).desired(1, counts(0, 1), 1) == 1


def test_a_count_of_tasks_that_is_late_takes_none_away_and_adds_one_at_most() -> None:
    assert Scaling(service(MaxTasks=50)).desired(None, counts(10**6, 0), 5) == 6
    assert Scaling(service(MaxTasks=50)).desired(None, counts(0, 10), 5) == 5


@pytest.mark.parametrize(
    ("expression", "tasks", "value"),
    [
        ("(visible + 2) / tasks", 2.0, 3.0),
        ("visible / tasks", 0.0, None),
        ("visible / tasks", None, None),
        ("FILL(tasks, 7) * 2 - 1", None, 13.0),
        ("IF(FILL(tasks, 0) > 0, 0, visible)", None, 4.0),
        ("IF(tasks > 0, 0, visible)", None, None),
    ],
)
def test_metric_math_is_evaluated_as_cloudwatch_does(expression: str, tasks: float | None, value: float | None) -> None:
    assert metric_math(expression, visible=4.0, tasks=tasks) == value


@pytest.mark.parametrize(("backlog", "tasks"), [(0, 0), (1, 1), (1200, 1), (1201, 2), (2400, 2), (10_000, 4)])
def test_the_numbers_of_tasks_on_the_page_are_the_stacks(backlog: int, tasks: int) -> None:
    assert Scaling(service()).desired(1, counts(backlog, 0), 1) == tasks
