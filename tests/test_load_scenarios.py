"""The parts of ``load.scenarios``: the fast queue, the world, and tables that are made of raw data only."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from load.scenarios import latency, raw, report
from load.scenarios.__main__ import main
from load.scenarios.broker import connect
from load.scenarios.images import read_urls
from load.scenarios.rows import SPLIT, Row, knee, pace, row, slopes
from load.scenarios.world import QUEUE, Peer, world

from cvworker.errors import StartupError

ROOT = Path(__file__).parents[1]


def test_a_file_of_urls_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("https://example.com/1.jpg\ns3://bucket/2.jpg\n")
    assert read_urls(path) == ("https://example.com/1.jpg", "s3://bucket/2.jpg")
    path.write_text("https://example.com/1.jpg\nfile:///etc/passwd\n")
    with pytest.raises(StartupError, match=r"line 2: 'file:///etc/passwd' is no URL"):
        read_urls(path)


@pytest.mark.parametrize(
    ("text", "median", "mean"),
    [("80", 0.08, 0.08), ("exp:80", 0.08 * math.log(2), 0.08), ("lognormal:80,400", 0.08, 0.1294), ("0", 0, 0)],
)
def test_latencies_have_the_distribution_that_they_are_given(text: str, median: float, mean: float) -> None:
    drawn = list(islice(latency.draws(text, 1), 50_000))
    assert np.median(drawn) == pytest.approx(median, rel=0.05)
    assert np.mean(drawn) == pytest.approx(mean, rel=0.05)
    assert drawn[:9] == list(islice(latency.draws(text, 1), 9))


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """An image host that fails a third of the requests, a receiver that refuses half, and the fast queue."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.jpg").write_bytes(b"a picture")
    with world(folder, ["--image-errors=0.33", "--callback-errors=0.5", "--seed=3"]) as running:
        yield running


def client(peer: Peer) -> Any:
    return connect(peer.base)[1]


def drained(sqs: Any, url: str) -> None:
    while got := sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages"):
        entries = [{"Id": str(n), "ReceiptHandle": each["ReceiptHandle"]} for n, each in enumerate(got)]
        sqs.delete_message_batch(QueueUrl=url, Entries=entries)


def test_the_fast_queue_gives_what_was_sent_and_gives_it_again(peer: Peer) -> None:
    sqs, url = client(peer), peer.base + QUEUE
    sqs.send_message(QueueUrl=url, MessageBody="one")
    sqs.send_message_batch(QueueUrl=url, Entries=[{"Id": n, "MessageBody": n} for n in ("two", "three")])
    # given all of them held, of which one is deleted and one given back
    held = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, AttributeNames=["All"])["Messages"]
    assert [each["Body"] for each in held] == ["one", "two", "three"]
    sent = [int(each["Attributes"]["SentTimestamp"]) for each in held]
    assert sent == sorted(sent)
    sqs.delete_message(QueueUrl=url, ReceiptHandle=held[0]["ReceiptHandle"])
    sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=held[1]["ReceiptHandle"], VisibilityTimeout=0)
    # then that one comes again
    [again] = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=5)["Messages"]
    assert again["Body"] == "two"
    for each in (again, held[2]):
        sqs.delete_message(QueueUrl=url, ReceiptHandle=each["ReceiptHandle"])
    counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    assert (counts["ApproximateNumberOfMessages"], counts["ApproximateNumberOfMessagesNotVisible"]) == ("0", "0")


def test_calls_that_wait_get_messages_at_once_each_once(peer: Peer) -> None:
    sqs, url = client(peer), peer.base + QUEUE

    def receive(_: int) -> list[str]:
        got = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=1, WaitTimeSeconds=20).get("Messages", [])
        for each in got:
            sqs.delete_message(QueueUrl=url, ReceiptHandle=each["ReceiptHandle"])
        return [each["Body"] for each in got]

    with ThreadPoolExecutor(4) as pool:
        calls = pool.map(receive, range(24))
        for number in range(24):
            sqs.send_message(QueueUrl=url, MessageBody=str(number))
        got = Counter(body for bodies in calls for body in bodies)
    assert got == Counter(map(str, range(24)))


def test_the_world_fails_by_its_shares_and_tells_of_the_callbacks_that_it_accepted(peer: Peer) -> None:
    with socket.create_connection(("127.0.0.1", peer.port), timeout=20) as line:
        line.sendall(b"GET /events/run-a HTTP/1.1\r\nHost: world\r\n\r\n")
        events = line.makefile("rb")
        while events.readline().strip():
            pass
        before = peer.counts()
        statuses: Counter[tuple[str, int]] = Counter()
        for number in range(90):
            timings = {"queue": 1.0, "total": 9.0}
            body = {"id": f"x-{number}", "status": "ok", "result": {}, "attempt": 1, "timings_ms": timings}
            statuses["image", status(f"{peer.base}/i/a.jpg")] += 1
            statuses["callback", status(f"{peer.base}/answers/run-a", json.dumps(body).encode())] += 1
        took = {name: value - before[name] for name, value in peer.counts().items()}
        assert statuses["image", 503] == took["images_refused"]
        assert 15 < statuses["image", 503] < 45
        assert statuses["callback", 503] == took["callbacks_refused"]
        assert 25 < statuses["callback", 503] < 65
        told = [json.loads(events.readline()) for _ in range(statuses["callback", 200])]
    # a refused callback is none that arrived, and the times are those of the answer
    assert len({each["id"] for each in told}) == len(told)
    assert {tuple(each["ms"]) for each in told} == {(1.0, None, None, None, 9.0)}
    assert before["at"] <= told[0]["at"] <= told[-1]["at"]


def status(url: str, body: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def a_row(
    name: str, rate: float, latency_s: float, *, late: int = 0, lost: int = 0, count: int = 200
) -> dict[str, Any]:
    """A row as a run would write it, every answer after the same time; ``late`` sends fell behind."""
    intended = [number / rate for number in range(count)]
    answered: list[float | None] = [each + latency_s for each in intended]
    answered[count - lost :] = [None] * lost
    codes = ["ok"] * (count - lost) + ["lost"] * lost
    ms = {"queue": 5.0, "download": 10.0, "preprocess": 3.0, "process": 20.0, "total": latency_s * 1000 - 2}
    looks = {"at": [1.0, 2.0], "download_queue": [0, 1], "inference_queue": [1, 1], "results_queue": [0, 0]}
    counters = {"batches": 50, "samples": 200, "callbacks": 200, "callback_s": 0.4, "cpu_s": 6.0, "at": 10.0}
    counters |= {"copies": 0, "copies_s": 0.0}
    return {
        "name": name,
        "traffic": f"constant:{rate}",
        "seconds": count / rate,
        "seed": 0,
        "samples": {
            "intended": intended,
            "sent": [each + (0.5 if number < late else 0.001) for number, each in enumerate(intended)],
            "answered": answered,
            "code": codes,
            "attempt": [1] * count,
            **{f"{key}_ms": [value] * count for key, value in ms.items()},
            "repeats": 0,
            "cpu_s": 0.5,
            "waited": count / rate + 60,
        },
        "counters": counters | {"world_cpu_s": 1.0, "queue_cpu_s": 0.5},
        "looks": looks,
        "sizes": {"at": [1.0, 2.0], "memory_bytes": [2**30, 2**30], "threads": [9, 9], "descriptors": [70, 70]},
        "gpu": {"busy": None, "memory_bytes": None},
    }


def a_raw(scenario: str, rows: list[dict[str, Any]]) -> raw.Raw:
    machine = {"type": None, "cpu": "a CPU", "cores": 2, "device_name": "a CPU"}
    return {
        "scenario": scenario, "made": "2026-11-22T12:00:00+00:00", "command": "python -m load.scenarios all",
        "commit": "abc", "seed": 0, "module": "threat", "workers": 1, "machine": machine,
        "model": {"precision": "bf16", "batch_size": 8, "preprocess_workers": 2},
        "versions": {"cvworker": "0.1.0"}, "queue": "fast", "ceiling": {"host": 9000.0, "queue": 4000.0},
        "pictures": "64 <pictures>", "world": "no latency", "pace_images_s": 50.0, "notes": [], "rows": rows,
    }  # fmt: skip


CURVE = [("20%", 10.0, 0.08), ("60%", 30.0, 0.09), ("90%", 45.0, 0.11), ("120%", 49.0, 2.0)]


def rows_of(curve: list[tuple[str, float, float]]) -> list[Row]:
    return [row(a_row(*each)) for each in curve]


def test_latency_counts_from_the_intended_time_and_what_was_lost_counts_with_all_its_waiting() -> None:
    late = row(a_row("late", 20.0, 0.1, late=50))
    assert late.latency_ms["p50"] == pytest.approx(100)  # and not less, for having been sent later
    lost = row(a_row("lost", 20.0, 0.1, lost=4))
    assert (lost.lost, lost.errors) == (4, 0)
    assert lost.latency_ms["p99"] > 60_000


def test_a_run_in_which_the_generator_fell_behind_is_invalid() -> None:
    assert row(a_row("as told", 20.0, 0.1, late=2)).valid
    behind = a_row("behind", 20.0, 0.1, late=3)  # of 200: more than one in a hundred
    assert not row(behind).valid
    text = report.page([a_raw("soak", [behind])])
    assert "NO: 1.5% late" in text
    assert "INVALID: behind" in text


def test_the_split_adds_up_to_the_latency() -> None:
    found = row(a_row("one", 20.0, 0.1))
    parts = [found.split_ms[name] for name in SPLIT if name != "callback"]
    assert sum(each or 0.0 for each in parts) == pytest.approx(found.latency_ms["avg"])
    # and waiting is by Little's law, half a message and one at 20 a second, as far as there is time left for it
    assert found.split_ms["download wait"] == pytest.approx(25.0 * 60 / 75)
    assert found.split_ms["preprocess wait"] == pytest.approx(50.0 * 60 / 75)
    roomy = row(a_row("roomy", 20.0, 0.3))
    assert (roomy.split_ms["download wait"], roomy.split_ms["preprocess wait"]) == pytest.approx((25.0, 50.0))
    assert (found.batch, found.cpu, found.cpu_beside) == (4.0, 0.6, pytest.approx(0.2))


def test_a_copy_to_the_device_is_told_as_the_worker_timed_it() -> None:
    assert row(a_row("on a CPU", 20.0, 0.1)).split_ms["to device"] == 0.0
    on_gpu = a_row("on a GPU", 20.0, 0.1)
    on_gpu["counters"] |= {"copies": 50, "copies_s": 0.1}
    assert row(on_gpu).split_ms["to device"] == pytest.approx(2.0)


def test_the_pace_of_a_full_queue_leaves_out_its_start_and_its_end() -> None:
    # given a start of ten seconds, then ten a second, then a last answer long after the others
    times = np.asarray([*(10 + np.arange(100) / 10), 60.0])
    assert pace(times, full=True) == pytest.approx(10.0)
    assert pace(times) < 3


def test_the_knee_is_the_last_row_before_latency_runs_away() -> None:
    found = knee(rows_of(CURVE))
    assert found is not None
    assert found.name == "90%"
    assert knee(rows_of(CURVE[:2])) is None
    # and rows that do not count are no part of the curve
    behind = [row(a_row(name, rate, latency_s, late=50)) for name, rate, latency_s in CURVE]
    assert knee(behind) is None


def test_growth_is_told_with_its_error() -> None:
    raw_row = a_row("soak", 20.0, 0.1)
    at = [float(each) for each in range(0, 3600, 60)]
    memory = [2**30 + 2**20 * second / 36 for second in at]  # a hundred MB an hour
    raw_row["sizes"] = {"at": at, "memory_bytes": memory, "threads": [9] * 60, "descriptors": [70] * 60}
    found = {each.name: each for each in slopes(raw_row)}
    assert found["memory"].an_hour == pytest.approx(100.0)
    assert found["memory"].error == pytest.approx(0.0, abs=1e-6)
    assert found["threads"].an_hour == 0


def test_the_report_is_the_same_byte_for_byte_from_the_same_raw_data(tmp_path: Path) -> None:
    # given raw data of every scenario, in files
    paths = []
    for scenario in ("offline", "online", "burst", "soak"):
        rows = [a_row(*each) for each in (CURVE if scenario == "online" else CURVE[:1])]
        paths.append(tmp_path / f"{scenario}.json")
        raw.save(a_raw(scenario, rows), paths[-1])
    written = []
    # when the report is made of them by two processes, with other hash seeds and in other places
    for number, more in enumerate(({"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}, {"PYTHONHASHSEED": "8"})):
        out = tmp_path / f"out-{number}"
        command = [sys.executable, "-m", "load.scenarios", "report", *map(str, paths), "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.append(
            ((out / "load.html").read_bytes(), (out / "load.csv").read_bytes(), done.stdout.splitlines()[:-1])
        )
    # then all of it is the same
    assert written[0] == written[1]
    # and complete: a page of its own with pictures, and a line for each row
    html = written[0][0].decode()
    assert html.count("<svg") >= 9
    assert "64 &lt;pictures&gt;" in html
    assert not re.search(r"(src|href)=.?http", html)
    lines = list(csv.DictReader(written[0][1].decode().splitlines()))
    assert [line["row"] for line in lines] == ["20%", *(name for name, *_ in CURVE), "20%", "20%"]
    assert lines[0]["latency_p50_ms"] == "80.000"
    assert {line["valid"] for line in lines} == {"yes"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "no raw data"),
        ("[", "not JSON"),
        ('{"format": "cvworker load", "version": 9}', "format 9"),
        (None, "read"),
    ],
)
def test_what_is_no_raw_data_is_one_line(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "online.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(path) in line
    assert said in line
    assert not (tmp_path / "out").exists()
