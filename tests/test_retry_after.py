"""`Retry-After`: how long a host asks to be left alone."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvworker.retry_after import MOST_S, retry_after

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.mark.parametrize(("value", "seconds"), [("0", 0), ("7", 7), (" 120 ", 120), ("3600", 3600)])
def test_a_number_is_seconds_from_now(value: str, seconds: float) -> None:
    assert retry_after(value) == seconds


@pytest.mark.parametrize(
    "date",
    [
        formatdate(NOW + 90, usegmt=True),
        time.strftime("%A, %d-%b-%y %H:%M:%S GMT", time.gmtime(NOW + 90)),
        time.asctime(time.gmtime(NOW + 90)),
    ],
    ids=["IMF-fixdate", "RFC 850", "asctime"],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_each_of_the_three_http_dates_is_a_moment_in_gmt(date: str, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert retry_after(date) == 90
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_a_date_that_has_passed_asks_for_nothing() -> None:
    assert retry_after(formatdate(NOW - 90, usegmt=True)) == 0


@pytest.mark.parametrize("value", ["1000000", formatdate(NOW + 1e6, usegmt=True), "9" * 400])
def test_more_than_an_hour_is_not_believed(value: str) -> None:
    assert retry_after(value) == MOST_S


@pytest.mark.parametrize("value", ["", " ", "soon", "-5"])
def test_what_makes_no_sense_is_no_wish(value: str) -> None:
    assert retry_after(value) is None


@given(st.text())
def test_whatever_a_host_sends_gives_nothing_or_a_time_within_the_bound(value: str) -> None:
    found = retry_after(value)
    assert found is None or 0 <= found <= MOST_S
