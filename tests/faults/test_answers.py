"""What the harness takes for a right answer, and what it takes for growth."""

from __future__ import annotations

from typing import Any

import pytest
from load.faults.requests import ERRORS, wrong
from load.faults.watch import SAMPLES, Sample, grown


def answer(**changed: Any) -> dict[str, Any]:
    right = {
        "id": "req-300",
        "metadata": {"number": 300},
        "attempt": 1,
        "status": "ok",
        "result": {"mean": [44, 1, 77]},
    }
    return {**right, **changed}


def verdict(nature: str = "good", failed_downloads: int = 0, **changed: Any) -> str:
    return wrong(answer(**changed), 300, nature, max_receives=3, failed_downloads=failed_downloads)


def test_the_answer_that_belongs_to_the_picture_is_right() -> None:
    assert verdict() == ""


def test_the_result_of_another_picture_or_the_metadata_of_another_request_are_wrong() -> None:
    assert "another picture" in verdict(result={"mean": [45, 1, 77]})
    assert "another request" in verdict(metadata={"number": 301})
    assert "another request" in verdict(id="req-301")


@pytest.mark.parametrize("nature", [*ERRORS])
def test_a_bad_request_is_answered_with_its_code_and_no_other(nature: str) -> None:
    assert verdict(nature, error={"code": ERRORS[nature]}) == ""
    assert verdict(nature, error={"code": "preprocess_failed"})
    assert verdict(nature), "an ok"


def test_a_download_that_failed_is_answered_on_the_last_receive_only() -> None:
    failed = {"code": "download_failed"}
    assert verdict(error=failed, failed_downloads=3, attempt=3) == ""
    assert verdict(error=failed, failed_downloads=3, attempt=2)
    assert verdict(error=failed, attempt=3), "and not where none failed"


FLAT = [Sample(500 * 2**20, 30, 90, 5)] * SAMPLES


def test_what_stays_as_it_was_has_not_grown_and_warming_up_does_not_count() -> None:
    assert grown(FLAT) == []
    assert grown([Sample(n * 2**20, 10, 50, 3) for n in range(SAMPLES // 4)] + FLAT) == []


def test_a_burst_is_not_growth() -> None:
    burst = [Sample(900 * 2**20, 60, 200, 9)] * 3
    assert grown(FLAT + burst + FLAT[:10]) == []


@pytest.mark.parametrize(
    ("last", "name"),
    [
        (Sample(560 * 2**20, 30, 90, 5), "memory"),
        (Sample(500 * 2**20, 33, 90, 5), "threads"),
        (Sample(500 * 2**20, 30, 110, 5), "descriptors"),
        (Sample(500 * 2**20, 30, 90, 6), "processes"),
    ],
)
def test_each_kind_of_growth_is_found(last: Sample, name: str) -> None:
    [line] = grown(FLAT + [last] * SAMPLES)
    assert line.startswith(name)


def test_a_few_samples_say_nothing() -> None:
    assert grown([Sample(n * 2**30, n, n, n) for n in range(SAMPLES - 1)]) == []
