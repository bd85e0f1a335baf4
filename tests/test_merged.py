"""Several pipelines' metrics and status as one worker's."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cvworker.observe import merged_metrics, merged_status
from cvworker.observe.metrics import Metrics

SECONDS = st.lists(st.floats(0, 100), max_size=5)


def said(*, answered: int = 0, held: int = 0, busy: float = 0.0, downloads: list[float] | None = None) -> str:
    metrics = Metrics()
    metrics.messages.labels("answered").inc(answered)
    metrics.inflight.set(held)
    metrics.stage_busy.labels("process").set(busy)
    for seconds in downloads or []:
        metrics.timed("download", seconds)
    return metrics.text().decode()


def together(*texts: str) -> dict[tuple[str, str], float]:
    """The merged exposition, read as Prometheus reads it: a sample by its name and its first label."""
    text = merged_metrics.write(merged_metrics.add(merged_metrics.read(each) for each in texts)).decode()
    assert text.count("# TYPE cvworker_messages_total ") == 1
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 100), SECONDS), min_size=1, max_size=4))
def test_what_is_counted_and_held_is_the_sum(pipelines: list[tuple[int, int, list[float]]]) -> None:
    found = together(*(said(answered=a, held=h, downloads=d) for a, h, d in pipelines))
    assert found["cvworker_messages_total", "answered"] == sum(a for a, _, _ in pipelines)
    assert found["cvworker_inflight_messages", ""] == sum(h for _, h, _ in pipelines)
    assert found["cvworker_stage_duration_seconds_count", "download"] == sum(len(d) for _, _, d in pipelines)


def test_a_share_is_the_mean() -> None:
    assert together(said(busy=0.2), said(busy=0.8))["cvworker_stage_busy_ratio", "process"] == 0.5


def test_a_pipeline_that_has_ended_leaves_what_it_counted_and_not_what_it_held() -> None:
    ended = merged_metrics.totals(merged_metrics.read(said(answered=7, held=3)))
    found = {sample.name: sample.value for family in ended for sample in family.samples}
    assert found["cvworker_messages_total"] == 7
    assert "cvworker_inflight_messages" not in found


def status(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(merged_status.EMPTY) | {"queue": {"url": "q", "reachable": True, "max_receives": 5}} | changes


def test_the_queue_is_reachable_when_every_pipeline_reaches_it() -> None:
    cut_off = status(queue={"url": "q", "reachable": False, "max_receives": 5})
    assert merged_status.merge([status(), status()])["queue"] == {"url": "q", "reachable": True, "max_receives": 5}
    assert not merged_status.merge([status(), cut_off])["queue"]["reachable"]
    assert not merged_status.merge([])["queue"]["reachable"], "nobody has said so yet"


def test_amounts_are_summed_the_worst_p95_counts_and_names_are_said_once() -> None:
    one = status(held=3, messages={"answered": 5}, latency_ms={"total": {"p50": 10.0, "p95": 20.0}})
    other = status(held=4, messages={"answered": 6, "later": 1}, latency_ms={"total": {"p50": 30.0, "p95": 90.0}})
    merged = merged_status.merge([one, other])
    assert (merged["held"], merged["messages"]) == (7, {"answered": 11, "later": 1})
    assert merged["latency_ms"] == {"total": {"p50": 20.0, "p95": 90.0}}
    named = {**merged_status.EMPTY["model"], "module": "threat"}
    assert merged_status.merge([status(model=named), status(model=named)])["model"]["module"] == "threat"
