"""The planner's proof runs, and its parts do what they are told to; whether bounds are kept is not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.config import Config
from load.proof.predict import Calibration, pace, predict
from load.proof.queue import FairQueue

ROOT = Path(__file__).parents[1]
FOUND = Calibration(lone_s=0.28, preprocess_s=0.002, download_s=0.001)


@pytest.fixture
def queue() -> Iterator[FairQueue]:
    with FairQueue(visibility=30, seed=1) as running:
        yield running


def client(queue: FairQueue) -> Any:
    return boto3.session.Session().client(
        "sqs",
        endpoint_url=queue.url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(max_pool_connections=8),
    )


def test_a_message_is_held_until_it_is_deleted_or_its_time_is_over(queue: FairQueue) -> None:
    sqs, url = client(queue), queue.queue_url
    sqs.send_message(QueueUrl=url, MessageBody="one")
    sqs.send_message(QueueUrl=url, MessageBody="two")
    # given both messages held, one of them for no time at all
    held = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
    assert [each["Body"] for each in held] == ["one", "two"]
    sqs.delete_message_batch(QueueUrl=url, Entries=[{"Id": "0", "ReceiptHandle": held[0]["ReceiptHandle"]}])
    sqs.change_message_visibility_batch(
        QueueUrl=url, Entries=[{"Id": "0", "ReceiptHandle": held[1]["ReceiptHandle"], "VisibilityTimeout": 0}]
    )
    # then that one comes again, and nothing else
    [again] = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=5)["Messages"]
    assert (again["Body"], again["Attributes"]["ApproximateReceiveCount"]) == ("two", "2")
    counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    assert (counts["ApproximateNumberOfMessages"], counts["ApproximateNumberOfMessagesNotVisible"]) == ("0", "1")


def test_calls_that_wait_get_their_share_by_chance(queue: FairQueue) -> None:
    sqs, url = client(queue), queue.queue_url

    def receive(_: int) -> list[str]:
        got = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=1, WaitTimeSeconds=10)
        return [each["Body"] for each in got.get("Messages", [])]

    # given four calls at a time, and as many messages
    with ThreadPoolExecutor(4) as pool:
        calls = pool.map(receive, range(40))
        for number in range(40):
            sqs.send_message(QueueUrl=url, MessageBody=str(number))
        got = Counter(body for bodies in calls for body in bodies)
    # then each message went to one of them
    assert got == Counter(map(str, range(40)))


def test_the_prediction_for_single_messages_is_what_was_measured_of_them() -> None:
    arrivals = np.arange(50) * 1.0
    found = predict(FOUND, 1, arrivals, 50.0)
    assert found.p50_s == pytest.approx(FOUND.lone_s, abs=0.005)
    assert pace(FOUND) == pytest.approx(20.0)


@pytest.mark.timeout(240)
def test_the_proof_writes_prediction_and_measurement_and_says_whether_they_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "load.proof", "--workers", "1", "--shares", "0.5", "--seconds", "2", "--lone", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "proof.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads((tmp_path / "proof.json").read_text())
    [row] = found["rows"]
    assert found["kept"] == row["kept"] == (done.returncode == 0)
    assert row["repeats"] == 0
    assert row["measured"]["p50_s"] > 0.22  # no answer is faster than its batch
    assert "predicted" in done.stdout
