"""The comparison runs, counts and cleans up after itself; how fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import psutil
import pytest
from load.compare import pictures
from load.compare.contenders import CONTENDERS
from load.compare.measure import Sample, world
from load.compare.report import Report
from load.compare.task import LOADS, SIDE, decode, preprocess

from cvworker.bench.world import QUEUE, pace

ROOT = Path(__file__).parents[1]
MARK = "COMPARE_TEST_MARK"


def sample(worker: str, number: int, images_s: float) -> Sample:
    counted = {"repeats": 0, "errors": 0, "expired": 0, "held": 0, "extensions": 0}
    times = {"seconds": 1.0, "cpu_ms": 5.0, "world_cpu_ms": 0.1, "pss_mb": 1.0, "start_s": 1.0}
    numbers: Any = {**counted, **times, "split_cpu_ms": (5.0,), "processes": 1, "answers": 1}
    return Sample(worker, "cpu", number, images_s=images_s, **numbers)


@pytest.mark.timeout(120)
def test_two_workers_are_compared_and_nothing_is_left(tmp_path: Path) -> None:
    # given a name by which everything that the run starts can be found
    mark = {MARK: str(tmp_path)}
    command = [sys.executable, "-m", "load.compare", "--load", "cpu", "--worker", "asyncio", "cvworker"]
    # when they run for two seconds each
    done = subprocess.run(
        [*command, "--seconds", "2", "--rounds", "1", "--no-limits", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | mark,
        capture_output=True,
        text=True,
    )
    # then both have answered, without an error or a repeat
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [each["worker"] for each in found["samples"]] == ["asyncio", "cvworker"]
    for each in found["samples"]:
        assert each["answers"] > 0
        assert (each["errors"], each["repeats"], each["expired"]) == (0, 0, 0)
        assert each["cpu_ms"] > 0
        assert each["pss_mb"] > 0
    assert {"machine", "versions", "commit", "seeds", "rows", "limits", "ceiling", "when"} <= found.keys()
    assert found["rows"][0]["ratio"] == 1
    assert "cvworker" in done.stdout
    ElementTree.parse(tmp_path / "compare.svg")  # noqa: S314 - our own
    # and none of their processes is there
    assert not [each for each in psutil.process_iter() if _mark(each) == str(tmp_path)]


def test_a_ratio_is_taken_within_its_round() -> None:
    # given a machine that is half as fast in the second round
    report = Report(1.0, 2)
    for number, speed in ((1, 1.0), (2, 0.5)):
        report.samples += [sample("asyncio", number, 100 * speed), sample("cvworker", number, 150 * speed)]
    rows = {row.worker: row for row in report.rows()}
    # then the ratio does not see it
    assert rows["cvworker"].ratio == 1.5
    assert rows["cvworker"].images_s == 112.5


def test_answers_that_come_a_batch_at_a_time_are_counted_from_batch_to_batch() -> None:
    # given 16 answers every second, on the second, and looks at other moments
    before, after = ({"at": at, "latest": float(int(at)), "callbacks": 16 * int(at)} for at in (3.9, 8.1))
    # then neither end of the window adds or takes away a batch
    assert pace(before, after) == 16.0
    assert pace(before, before) == 0.0


def test_pictures_are_what_the_numbers_are_told_for() -> None:
    images = pictures.pictures()
    assert 120_000 < sum(map(len, images)) / len(images) < 140_000
    assert len(set(images)) == pictures.COUNT
    assert decode(images[0]).shape == (3, pictures.HEIGHT, pictures.WIDTH)
    assert min(decode(images[0], SIDE).shape[1:]) >= SIDE
    assert preprocess(decode(images[0])).shape == (3, SIDE, SIDE)


def test_the_queue_brings_back_what_expires_and_ends_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    with world(LOADS["cpu"], backlog=3) as peer:
        for name, value in CONTENDERS["asyncio"].environment(peer.base).items():
            monkeypatch.setenv(name, value)
        sqs = boto3.session.Session().client("sqs")
        url = peer.base + QUEUE
        # given three messages, of which one is deleted and one held for a second
        first = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
        assert len(first) == 3
        sqs.delete_message(QueueUrl=url, ReceiptHandle=first[0]["ReceiptHandle"])
        sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=first[1]["ReceiptHandle"], VisibilityTimeout=1)
        # when somebody waits, then that one comes again, once, and its old receipt is worth nothing
        again = sqs.receive_message(
            QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=5, MessageSystemAttributeNames=["All"]
        )["Messages"]
        assert [each["MessageId"] for each in again] == [first[1]["MessageId"]]
        assert again[0]["Attributes"]["ApproximateReceiveCount"] == "2"
        sqs.delete_message(QueueUrl=url, ReceiptHandle=first[1]["ReceiptHandle"])
        counts = peer.counts()
        assert (counts["receives"], counts["deletes"], counts["expired"], counts["held"]) == (4, 1, 1, 2)


def _mark(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except psutil.Error:  # another user's, or gone
        return ""
