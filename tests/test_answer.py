"""The body of a callback, field by field."""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest

from cvworker.answer import WorkerInfo, answer_body
from cvworker.errors import DownloadTimeout, ImageNotFound, ProcessFailed, UnsupportedTask
from cvworker.messages import MAX_METADATA_DEPTH, Request

WORKER = WorkerInfo("0.1.0", "threat", "sha256:abc", "bf16")
TIMINGS = {"queue": 41.04, "download": 83.26, "preprocess": 6.1, "process": 11.91, "total": 160.349}


def request(**fields: Any) -> Request:
    values: dict[str, Any] = {
        "key": "m",
        "id": "req-1",
        "image_url": "https://images.example/1.jpg",
        "callback_url": "https://client.example/",
        "task": None,
        "metadata": {},
        "error": None,
    }
    return Request(**{**values, **fields})


def answer(asked: Request | None = None, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "result": {"threat": 0.5},
        "error": None,
        "attempt": 1,
        "timings_ms": TIMINGS,
        "worker": WORKER,
    }
    decoded = json.loads(answer_body(asked or request(), **{**arguments, **changes}))
    assert isinstance(decoded, dict)
    return decoded


def test_an_answer_has_exactly_the_fields_of_the_contract():
    assert answer() == {
        "id": "req-1",
        "status": "ok",
        "task": "threat",
        "result": {"threat": 0.5},
        "image_url": "https://images.example/1.jpg",
        "metadata": {},
        "attempt": 1,
        "timings_ms": {"queue": 41.0, "download": 83.3, "preprocess": 6.1, "process": 11.9, "total": 160.3},
        "worker": {"version": "0.1.0", "module": "threat", "weights": "sha256:abc", "precision": "bf16"},
    }


def test_an_error_stands_in_place_of_the_result():
    body = answer(result=None, error=ImageNotFound("HTTP 404"), attempt=3)
    assert body["status"] == "error"
    assert body["error"] == {"code": "image_not_found", "message": "HTTP 404", "retryable": False}
    assert body["attempt"] == 3
    assert "result" not in body
    assert set(body) ^ set(answer()) == {"result", "error"}


def test_a_transient_error_says_that_it_may_be_retried():
    error = answer(result=None, error=DownloadTimeout("too slow"))["error"]
    assert error == {"code": "download_failed", "message": "too slow", "retryable": True}


def test_an_error_wins_over_a_result():
    assert "result" not in answer(error=ProcessFailed("x"))


def test_the_requests_task_is_echoed_and_else_the_modules_name_is_given():
    assert answer(request(task="scene"), result=None, error=UnsupportedTask("x"))["task"] == "scene"
    assert answer(request(task=None))["task"] == "threat"


def test_steps_that_did_not_run_are_left_out_and_unknown_ones_too():
    assert answer(timings_ms={"callback": 1.0, "total": 2, "queue": 1.25})["timings_ms"] == {"queue": 1.2, "total": 2}


def test_the_queues_time_and_the_total_are_never_left_out():
    with pytest.raises(KeyError):
        answer(timings_ms={"total": 1.0})


def test_a_clock_behind_that_of_the_queue_gives_zero():
    timings = answer(timings_ms={"queue": -12.0, "total": -0.01})["timings_ms"]
    assert timings == {"queue": 0.0, "total": 0.0}
    assert math.copysign(1, timings["total"]) == 1


def test_weights_are_left_out_where_there_are_none():
    assert answer(worker=WorkerInfo("0.1.0", "threat", None))["worker"] == {"version": "0.1.0", "module": "threat"}


def test_an_unusable_image_url_is_null():
    assert answer(request(image_url=None), result=None, error=ProcessFailed("x"))["image_url"] is None


def test_lone_surrogates_come_back_as_they_were_sent():
    body = answer(request(id="\ud800", metadata={"\udfff": "\ud800x"}), error=ProcessFailed("\ud83d"))
    assert (body["id"], body["metadata"], body["error"]["message"]) == ("\ud800", {"\udfff": "\ud800x"}, "\ud83d")


def test_metadata_of_the_greatest_depth_can_be_written_from_deep_in_the_stack():
    metadata: dict[str, Any] = {}
    for _ in range(MAX_METADATA_DEPTH - 1):
        metadata = {"a": metadata}

    def descend(levels: int) -> dict[str, Any]:
        return descend(levels - 1) if levels else answer(request(metadata=metadata))

    assert descend(500)["metadata"] == metadata


@pytest.mark.parametrize("mapping", [OrderedDict(a=1), MappingProxyType({"a": 1})])
def test_a_result_may_be_any_mapping(mapping):
    assert answer(result=mapping)["result"] == {"a": 1}


def _circular() -> dict[str, Any]:
    result: dict[str, Any] = {}
    result["self"] = result
    return result


def _deep() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for _ in range(100_000):
        result = {"a": result}
    return result


@pytest.mark.parametrize(
    "result",
    [None, [], "x", {"x": math.nan}, {"x": [math.inf]}, {"x": object()}, {"x": b""}, {(1, 2): 3}, _circular(), _deep()],
    ids=["none", "list", "text", "nan", "inf", "object", "bytes", "tuple-key", "circular", "deep"],
)
def test_a_result_that_is_not_json_is_the_modules_failure(result):
    with pytest.raises(ProcessFailed):
        answer(result=result)


def test_the_body_is_ascii():
    body = answer_body(
        request(metadata={"ü": "日本"}), result={}, error=None, attempt=1, timings_ms=TIMINGS, worker=WORKER
    )
    assert body.isascii()


def test_writing_an_answer_takes_microseconds():
    asked = request(metadata={"user": "u", "tags": ["a", "b"]})
    result = {"threat": 0.5, "classes": {"weapon": 0.1, "nudity": 0.2}}

    def once() -> float:
        start = time.perf_counter()
        for _ in range(100):
            answer_body(asked, result=result, error=None, attempt=1, timings_ms=TIMINGS, worker=WORKER)
        return (time.perf_counter() - start) / 100

    assert min(once() for _ in range(10)) < 200e-6  # about 20 on an idle machine
