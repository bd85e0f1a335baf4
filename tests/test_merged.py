"""Several pipelines' metrics and status as one worker's."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cvworker.observe import merged_metrics, merged_status
from cvworker.observe.metrics import EXAMPLES, Metrics

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


def test_of_what_all_see_alike_the_largest_counts() -> None:
    one, other = Metrics(), Metrics()
    for metrics, waiting, age in ((one, 500, 30.0), (other, 480, 90.0)):
        metrics.backlog.labels("visible").set(waiting)
        metrics.oldest.set(age)
    found = together(one.text().decode(), other.text().decode())
    assert found["cvworker_backlog_messages", "visible"] == 500
    assert found["cvworker_oldest_message_age_seconds", ""] == 90.0


def test_a_process_is_as_old_as_the_oldest_and_memory_is_summed() -> None:
    text = Metrics().text().decode()
    alone, found = together(text), together(text, text)
    assert found["process_start_time_seconds", ""] == alone["process_start_time_seconds", ""]
    assert found["process_resident_memory_bytes", ""] == 2 * alone["process_resident_memory_bytes", ""]


def test_a_pipeline_that_has_ended_leaves_what_it_counted_and_not_what_it_held() -> None:
    ended = merged_metrics.totals(merged_metrics.read(said(answered=7, held=3)))
    found = {(each.name, each.labels.get("outcome")): each.value for family in ended for each in family.samples}
    assert found["cvworker_messages_total", "answered"] == 7
    assert "cvworker_inflight_messages" not in {name for name, _ in found}


def example(at: float) -> dict[str, Any]:
    return {"at": at, "code": "download_failed", "message": "HTTP 500", "id": f"req-{at:g}", "message_id": "m"}


def test_the_latest_examples_of_all_are_told_in_their_order() -> None:
    one, other = status(examples=[example(n) for n in range(0, 40, 2)]), status(examples=[example(5), example(39)])
    assert [each["at"] for each in merged_status.merge([one, other])["examples"]][-3:] == [36, 38, 39]
    assert len(merged_status.merge([one, other])["examples"]) == EXAMPLES
    assert merged_status.totals(one)["examples"] == one["examples"], "they stay when their pipeline has ended"


def test_histories_are_laid_side_by_side_at_their_ends() -> None:
    one = {"every_s": 5.0, "rate_per_s": [1.0, 2.0, 3.0], "p50_ms": [10.0, None, 30.0], "p95_ms": [20.0, None, 40.0]}
    younger = {"every_s": 5.0, "rate_per_s": [10.0], "p50_ms": [50.0], "p95_ms": [90.0]}
    merged = merged_status.merge([status(history=one), status(history=younger)])["history"]
    assert merged["rate_per_s"] == [1.0, 2.0, 13.0]
    assert merged["p50_ms"] == [10.0, None, 40.0]
    assert merged["p95_ms"] == [20.0, None, 90.0]


def test_the_backlog_is_the_queues_and_the_oldest_message_that_of_all() -> None:
    one = status(
        backlog={"visible": 500, "hidden": 9, "delayed": 0}, leases={"extended": 1, "lost": 0, "oldest_s": 3.0}
    )
    other = status(backlog={"visible": 480, "hidden": None, "delayed": 0})
    other["leases"] = {"extended": 2, "lost": 1, "oldest_s": 70.0}
    merged = merged_status.merge([one, other])
    assert merged["backlog"] == {"visible": 500, "hidden": 9, "delayed": 0}
    assert merged["leases"] == {"extended": 3, "lost": 1, "oldest_s": 70.0}
    assert merged_status.merge([])["backlog"]["visible"] is None


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
