"""What holds a worker back, in words."""

from __future__ import annotations

from typing import Any

import pytest

from cvworker.observe.verdict import LOOKS, Judge
from cvworker.settings import Settings

ROOM = {name: {"depth": 3, "limit": 28} for name in ("download", "inference", "results")}


def a_status(**changes: Any) -> dict[str, Any]:
    """Of a worker whose process step is at its limit."""
    return {
        "state": "running",
        "problems": [],
        "missing": [],
        "queue": {"reachable": True},
        "model": {"device": "NVIDIA T4", "precision": "fp16", "preprocess_workers": 2},
        "held": 118,
        "rate_per_s": 27.6,
        "image_bytes": 61_000_000,
        "download_concurrency": 54,
        "busy": {"receive": 0.21, "download": 0.41, "preprocess": 0.714, "process": 0.973, "callback": 0.05},
        "queues": ROOM,
        "settings": Settings().shown(),
        **changes,
    }


def judged(*, looks: int = LOOKS, **changes: Any) -> tuple[str, str, str | None]:
    judge, status = Judge(), a_status(**changes)
    for _ in range(looks):
        judge.look(status["queues"])
    verdict = judge.verdict(status)
    return verdict.text, verdict.hint, verdict.step


def full(*names: str) -> dict[str, dict[str, int]]:
    return ROOM | {name: {"depth": 28, "limit": 28} for name in names}


@pytest.mark.parametrize(
    ("changes", "text", "hint", "step"),
    [
        ({}, "process holds it back: 97% busy.", "batch_size (8)", "process"),
        ({"held": 0, "rate_per_s": 0.0}, "Idle: no messages to work on.", "", None),
        ({"state": "starting", "missing": ["not warm"]}, "Starting: no messages taken yet.", "not warm", None),
        ({"state": "stopping", "missing": ["stopping"]}, "Stopping: 118 messages in hand.", "given back", None),
        ({"problems": ["a thread died", "another"]}, "Failing: a thread died.", "another", None),
        ({"missing": ["sqs: denied"], "queue": {"reachable": False}}, "Not ready.", "sqs: denied", "receive"),
        ({"missing": ["the model is not warm yet"]}, "Not ready.", "not warm", None),
        ({"busy": {"download": 0.3}}, "It keeps up with what arrives.", "(auto, now 54)", "download"),
        ({"busy": {"download": 0.01}}, "It keeps up with what arrives.", "Every step has room.", None),
        ({"busy": {"preprocess": 0.99}}, "preprocess holds it back: 99% busy.", "(auto, now 2)", "preprocess"),
        ({"queues": full("results")}, "callback holds it back: 5% busy.", "callback_concurrency (64)", "callback"),
        ({"queues": full("download", "inference")}, "process holds it back: 97% busy.", "", "process"),
        ({"busy": {"download": 0.6}, "queues": full("download")}, "download holds it back: 60% busy.", "", "download"),
        (
            {"image_bytes": 512 * 2**20, "busy": {"download": 1.0, "process": 0.2}},
            "Too little memory for images holds it back.",
            "max_inflight_bytes (512 MiB)",
            "download",
        ),
    ],
)
def test_the_verdict(changes: dict[str, Any], text: str, hint: str, step: str | None) -> None:
    found = judged(**changes)
    assert (found[0], found[2]) == (text, step)
    assert hint in found[1]


def test_a_queue_that_is_full_for_a_moment_does_not_count() -> None:
    judge = Judge()
    for _ in range(LOOKS - 1):
        judge.look(ROOM)
    judge.look(full("results"))
    assert judge.verdict(a_status()).step == "process"


def test_two_steps_alike_do_not_change_places_at_each_look() -> None:
    judge, steps = Judge(), []
    for turn in range(6):
        busy = {"preprocess": 0.93 + 0.01 * (turn % 2), "process": 0.94 - 0.01 * (turn % 2)}
        steps.append(judge.verdict(a_status(busy=busy)).step)
    assert steps == ["process"] * 6
    assert judge.verdict(a_status(busy={"preprocess": 0.99, "process": 0.93})).step == "preprocess"


def test_before_any_look_only_the_busy_shares_count() -> None:
    assert judged(looks=0)[2] == "process"
