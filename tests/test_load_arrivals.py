"""Schedules of ``load.scenarios``: what they promise, and what is said of those that cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from load.scenarios.__main__ import main
from load.scenarios.arrivals import FORMS, length, schedule
from load.scenarios.plans import BURST_S, BURST_SHARE, MAKERS, Sizes

from cvworker.errors import StartupError

RATES = st.floats(min_value=0.5, max_value=200)
SECONDS = st.floats(min_value=1, max_value=60)
SEEDS = st.integers(min_value=0, max_value=2**32)


def close_to(count: int, expected: float) -> bool:
    """Within six standard deviations of a Poisson count."""
    return abs(count - expected) <= 6 * math.sqrt(expected) + 3


@settings(deadline=None)
@given(RATES, SECONDS, SEEDS)
def test_a_poisson_schedule_is_sorted_inside_its_time_and_has_its_rate(rate: float, seconds: float, seed: int) -> None:
    try:
        times = schedule(f"poisson:{rate}", seconds, seed)
    except StartupError:  # by chance there was nothing in it
        assert rate * seconds < 40
        return
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < seconds
    assert close_to(len(times), rate * seconds)
    assert np.array_equal(times, schedule(f"poisson:{rate}", seconds, seed))


@settings(deadline=None)
@given(RATES, SECONDS)
def test_a_constant_schedule_is_even(rate: float, seconds: float) -> None:
    times = schedule(f"constant:{rate}", seconds, 0)
    assert times[0] == 0
    assert times[-1] < seconds
    assert abs(len(times) - rate * seconds) <= 1
    assert np.allclose(np.diff(times), 1 / rate)


@settings(deadline=None)
@given(RATES, RATES, SEEDS)
def test_a_ramp_has_each_half_of_its_area(first: float, last: float, seed: int) -> None:
    seconds = 100.0
    times = schedule(f"ramp:{first}-{last}", seconds, seed)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] <= seconds
    middle = (first + last) / 2
    for half, rate in ((times < 50, (first + middle) / 2), (times >= 50, (middle + last) / 2)):
        assert close_to(int(half.sum()), rate * 50)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 5, 80]), st.integers(1, 20)), min_size=1, max_size=6), SEEDS)
def test_steps_have_each_its_own_rate_and_pauses_are_empty(steps: list[tuple[int, int]], seed: int) -> None:
    text = "step:" + ",".join(f"{rate}@{seconds}" for rate, seconds in steps)
    try:
        times = schedule(text, 1.0, seed)
    except StartupError:
        assert sum(rate * seconds for rate, seconds in steps) < 40
        return
    assert (np.diff(times) >= 0).all()
    begin = 0.0
    for rate, seconds in steps:
        inside = int(((times >= begin) & (times < begin + seconds)).sum())
        assert inside == 0 if rate == 0 else close_to(inside, rate * seconds)
        begin += seconds
    assert length(text, 1.0) == begin


def test_a_burst_is_ten_times_the_mean_after_nothing() -> None:
    [each] = MAKERS["burst"](100.0, Sizes(bursts=2))
    times, lasts = schedule(each.traffic, each.seconds, 1), length(each.traffic, each.seconds)
    assert close_to(len(times), BURST_SHARE * 100.0 * lasts)
    assert times[0] > 10
    first = times[times < lasts / 2]
    assert first[-1] - first[0] < BURST_S
    assert len(first) / BURST_S > 8 * BURST_SHARE * 100.0


def test_a_replayed_file_may_have_seconds_json_lines_or_times_of_a_clock(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.txt"
    path.write_text("3\n0.5\n\n1\n")
    assert schedule(str(path), 0, 0).tolist() == [0.5, 1, 3]
    path.write_text('{"at": 2, "more": 1}\n{"at": "7"}\n')
    assert schedule(str(path), 0, 0).tolist() == [2, 7]
    # and those of a clock count from the first
    path.write_text("2026-11-22T18:30:00+00:00\n2026-11-22T18:30:01.5+00:00\n")
    assert schedule(str(path), 0, 0).tolist() == [0, 1.5]
    assert length(str(path), 0) == 1.5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1\n2\nlater\n", "row 3: must be seconds"),
        ("1\n-2\n", "row 2: must be seconds, 0 or more"),
        ("1\nnan\n", "row 2: must be"),
        ('{"at": 1}\n{"when": 2}\n', "row 2, at: is missing"),
        ('{"at": 1}\n{"at": true}\n', "row 2, at: must be seconds"),
        ('{"at": 1}\n{"at": [1]}\n', "row 2, at: must be seconds"),
        ('{"at": 1}\n{"at": \n', "row 2, at: not JSON"),
        ("[1]\n", "row 1: must be seconds"),
        ("\n", "there is no message in it"),
    ],
)
def test_a_wrong_arrivals_file_is_one_line_with_row_and_field(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "arrivals.jsonl"
    path.write_text(content)
    assert main(["offer", "--arrivals", str(path), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"{path}" in line
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arrivals", "poisson:many"], "'many' is no number of messages a second"),
        (["--arrivals", "ramp:5"], "must be FROM-TO"),
        (["--arrivals", "step:5@10,5"], "step 2"),
        (["--arrivals", "constant:1e9"], "more than the 10,000,000"),
        (["--arrivals", "full:all"], "must be a number of messages"),
        (["--arrivals", "poison:5"], "no form that is known"),
        (["--arrivals", "poisson:0"], "there is no message in it"),
        (["--arrivals", "poisson:5", "--image-latency", "normal:5"], "image-latency: 'normal:5' is none of"),
        (["--arrivals", "poisson:5", "--callback-latency", "lognormal:9,5"], "callback-latency"),
        (["--arrivals", "poisson:5", "--workers", "0"], "--queue-url"),
        (["--arrivals", "poisson:5", "--workers", "0", "--queue-url", "http://q"], "--shown"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["offer", *arguments, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line
    assert not (tmp_path / "out").exists()


def test_every_form_of_arrivals_is_told_in_the_help() -> None:
    told = [line.split()[0].partition(":")[0] for line in FORMS.splitlines()]
    assert " ".join(told) == "poisson constant ramp step full FILE"
