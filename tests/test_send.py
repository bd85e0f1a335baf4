"""`send`: requests from every kind of source, checked with their line, onto a real queue."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from cvworker.embedded.sqs import EmbeddedSqs
from cvworker.errors import StartupError, WorkerFailed
from cvworker.send import ATTEMPTS, MAX_BYTES, read_requests, send


@pytest.fixture(scope="module")
def sqs() -> Iterator[EmbeddedSqs]:
    with EmbeddedSqs() as sqs:
        yield sqs


@pytest.fixture
def queue(sqs: EmbeddedSqs, request: pytest.FixtureRequest) -> str:
    return sqs.create_queue(f"q-{abs(hash(request.node.name))}", max_receives=None)


@pytest.fixture
def s3(sqs: EmbeddedSqs, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in sqs.environment().items():
        monkeypatch.setenv(name, value)
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket="pictures")
    return client


def drain(sqs: EmbeddedSqs, queue: str) -> list[dict[str, Any]]:
    client, bodies = sqs.client(), []
    while messages := client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages"):
        bodies += [json.loads(message["Body"]) for message in messages]
    return bodies


def file(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def urls(n: int) -> list[dict[str, Any]]:
    return [{"image_url": f"http://host/{i}.jpg"} for i in range(n)]


class Flaky:
    """A queue client whose first sends go wrong as told: each fault turns entries into what SQS answers instead."""

    def __init__(self, client: Any, *faults: Any) -> None:
        self._client = client
        self._faults = list(faults)
        self.calls: list[list[str]] = []

    def get_queue_attributes(self, **wanted: Any) -> Any:
        return self._client.get_queue_attributes(**wanted)

    def send_message_batch(self, QueueUrl: str, Entries: list[dict[str, str]]) -> Any:
        self.calls.append([entry["Id"] for entry in Entries])
        fault = self._faults.pop(0) if self._faults else {}
        if isinstance(fault, Exception):
            raise fault
        good = [entry for entry in Entries if entry["Id"] not in fault]
        answer = self._client.send_message_batch(QueueUrl=QueueUrl, Entries=good) if good else {}
        failed = [{"Id": key, "SenderFault": mine, "Code": "Because"} for key, mine in fault.items()]
        return {**answer, "Failed": failed}


def refusal(code: str, status: int) -> ClientError:
    answer: Any = {"Error": {"Code": code, "Message": "so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "SendMessageBatch")


# Reading


def test_a_file_may_mix_requests_and_urls_and_the_template_fills_in_what_they_lack(tmp_path: Path):
    source = file(
        tmp_path,
        "work.jsonl",
        '{"image_url": "https://a/1.jpg", "id": "one", "metadata": {"shop": 7}, "callback_url": "https://own/"}\n'
        "\n"
        "   s3://bucket/key with spaces.png  \n",
    )
    template = {"callback_url": "https://default/", "task": "threat", "metadata": {"shop": 1, "run": "r1"}}
    assert list(read_requests(source, template=template)) == [
        {
            "image_url": "https://a/1.jpg",
            "id": "one",
            "metadata": {"shop": 7, "run": "r1"},
            "callback_url": "https://own/",
            "task": "threat",
        },
        {"image_url": "s3://bucket/key with spaces.png", **template},
    ]


def test_stdin_is_read_as_it_comes():
    reader, writer = os.pipe()
    with open(reader) as stdin, open(writer, "w", buffering=1) as typed:
        requests = read_requests("-", stdin=stdin)
        typed.write("http://host/1.jpg\n")
        first = next(requests)  # while the other end is still open
        typed.write('{"image_url": "http://host/2.jpg"}\n')
        assert [first, next(requests)] == [{"image_url": "http://host/1.jpg"}, {"image_url": "http://host/2.jpg"}]


def test_a_pipe_given_as_a_file_is_read_once(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("http://host/1.jpg\nhttp://host/2.jpg\n",))
    writer.start()
    assert len(list(read_requests(str(pipe)))) == 2
    writer.join()


def test_one_url_is_one_request():
    assert list(read_requests("https://a/1.jpg", template={"id": "x"})) == [{"image_url": "https://a/1.jpg", "id": "x"}]


def test_a_csv_has_metadata_as_columns_of_its_own_or_as_json(tmp_path: Path):
    source = file(
        tmp_path,
        "orders.CSV",
        "\ufeffimage_url,id,metadata,metadata.shop\r\n"
        'https://a/1.jpg,one,"{""nested"": {""a"": [1]}}",north\r\n'
        ",,,\r\n"
        '"https://a/2,3.jpg",,,\r\n',
    )
    assert list(read_requests(source)) == [
        {"image_url": "https://a/1.jpg", "id": "one", "metadata": {"nested": {"a": [1]}, "shop": "north"}},
        {"image_url": "https://a/2,3.jpg", "metadata": {}},
    ]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.jsonl", 'http://h/1\n{"image_url": }', r"line 2: not JSON: Expecting value at character 15"),
        ("a.jsonl", '["http://h/1"]', r"line 1: must be a JSON object or the URL"),
        ("a.jsonl", '{"image_url": "http://h/1", "metadata": {"x": NaN}}', r"line 1: cannot be sent as JSON"),
        ("a.jsonl", '\n{"id": "x"}', r"line 2: image_url is missing"),
        ("a.jsonl", '{"image_url": "http://h/1", "id": ""}', r"line 1: id is empty"),
        ("a.jsonl", '{"image_url": "http://h/1", "id": 5}', r"line 1: id must be a string"),
        ("a.jsonl", '{"image_url": "http://h/1", "task": 5}', r"line 1: task must be a string"),
        ("a.jsonl", '{"image_url": "http://h/1", "metadata": []}', r"line 1: metadata must be an object"),
        ("a.jsonl", '{"image_url": "http://h/1", "callback_url": "ftp://h"}', r"line 1: callback_url must begin with"),
        ("a.txt", "http://h/1\n/data/2.jpg", r"line 2: image_url must begin with http://"),
        ("a.txt", "s3://bucket", r"line 1: image_url: names no key"),
        ("a.csv", "image_url,callbackurl\n", r"line 1: the column 'callbackurl' is none of image_url, callback_url"),
        ("a.csv", "image_url,id\nhttp://h/1,x,y\n", r"line 2: has more cells than the header row"),
        ("a.csv", "image_url,metadata\nhttp://h/1,{\n", r"line 2, metadata: not JSON"),
        ("a.csv", 'image_url\n"http://h/1', r"not CSV in UTF-8: unexpected end of data"),
        ("a.csv", "image_url,id\nhttp://h/1,x\n,y\n", r"line 3: image_url is missing"),
        (
            "a.jsonl",
            json.dumps({"image_url": "http://h/1", "id": "x" * MAX_BYTES}),
            r"line 1: the message is 1,048,6..",
        ),
    ],
)
def test_a_bad_line_is_named_before_anything_is_sent(tmp_path: Path, name: str, text: str, complaint: str):
    with pytest.raises(StartupError, match=complaint) as caught:
        read_requests(file(tmp_path, name, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path, name: str):
    with pytest.raises(StartupError, match=r"^cannot read .*(No such file|Is a directory)"):
        read_requests(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_picture_given_as_the_list_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"image_url\n\xff\xd8\xff\xe0")
    with pytest.raises(StartupError, match="UTF-8"):
        list(read_requests(str(tmp_path / name)))


def test_a_prefix_gives_the_images_below_it_page_by_page(s3: Any):
    for n in range(5):
        s3.put_object(Bucket="pictures", Key=f"in/{n} ü.JPG", Body=b"x")
    for other in ("in/", "in/notes.txt", "out/5.jpg"):
        s3.put_object(Bucket="pictures", Key=other, Body=b"x")

    class SmallPages:
        def get_paginator(self, name: str) -> Any:
            return self

        def paginate(self, **wanted: Any) -> Any:
            return s3.get_paginator("list_objects_v2").paginate(**wanted, PaginationConfig={"PageSize": 2})

    images = [f"s3://pictures/in/{n} ü.JPG" for n in range(5)]
    assert [request["image_url"] for request in read_requests("s3://pictures/in/", s3=SmallPages())] == images
    every = [request["image_url"] for request in read_requests("s3://pictures/in/", every_key=True)]
    assert every == [*images, "s3://pictures/in/notes.txt"]


@pytest.mark.parametrize("source", ["s3://nosuchbucket/x", "s3://", "s3://Not A Bucket/x"])
def test_a_bucket_that_cannot_be_listed_is_one_clear_line(s3: Any, source: str):
    with pytest.raises(StartupError, match=f"^cannot list {source}: [^\n]+$"):
        list(read_requests(source, s3=s3))


# Sending


def test_every_request_arrives_once_and_progress_adds_up(sqs: EmbeddedSqs, queue: str):
    told: list[int] = []
    sent = send(sqs.client(), queue, urls(37), progress=told.append)
    assert (sent.sent, sent.retries, sent.failures) == (37, 0, [])
    assert told == [10, 10, 10, 7]
    assert sorted(drain(sqs, queue), key=str) == sorted(urls(37), key=str)


def test_text_of_any_script_arrives_as_it_was(sqs: EmbeddedSqs, queue: str):
    odd = {"image_url": "http://host/1.jpg", "metadata": {"text": "ü 図 🙂 \x00 \ufffe \ufffd \x1f"}}
    send(sqs.client(), queue, [odd])
    assert drain(sqs, queue) == [odd]


def test_a_call_never_carries_more_than_sqs_takes(sqs: EmbeddedSqs, queue: str):
    large = [{"image_url": "http://host/1.jpg", "metadata": {"x": "é" * 40_000}, "id": str(n)} for n in range(9)]
    client = Flaky(sqs.client())
    assert send(client, queue, large).sent == 9
    assert [len(call) for call in client.calls] == [4, 4, 1]
    assert sorted(body["id"] for body in drain(sqs, queue)) == [str(n) for n in range(9)]


def test_only_what_failed_is_sent_again_after_a_growing_jittered_wait(sqs: EmbeddedSqs, queue: str):
    waits: list[float] = []
    client = Flaky(sqs.client(), {"1": False, "4": False}, {"1": False})
    sent = send(client, queue, urls(5), sleep=waits.append, jitter=lambda: 1.0)
    assert client.calls == [["0", "1", "2", "3", "4"], ["0", "1"], ["0"]]
    assert (sent.sent, sent.retries) == (5, 3)
    assert waits == [0.3, 0.6]
    assert len(drain(sqs, queue)) == 5


def test_what_is_the_messages_own_fault_is_reported_and_not_sent_again(sqs: EmbeddedSqs, queue: str):
    client = Flaky(sqs.client(), {"2": True, "3": False})
    sent = send(client, queue, urls(4), sleep=lambda wait: None)
    assert sent.sent == 3
    assert [(failure.where, failure.code) for failure in sent.failures] == [("request 3", "Because")]
    assert "http://host/2.jpg" not in str(drain(sqs, queue))


@pytest.mark.parametrize(
    "fault",
    [EndpointConnectionError(endpoint_url="http://x"), refusal("InternalError", 500), refusal("RequestThrottled", 403)],
)
def test_a_call_that_fails_for_a_while_is_made_again(sqs: EmbeddedSqs, queue: str, fault: Exception):
    client = Flaky(sqs.client(), {}, fault, fault)
    assert send(client, queue, urls(15), sleep=lambda wait: None).sent == 15
    assert len(drain(sqs, queue)) == 15


def test_sqs_that_stays_away_ends_the_sending_with_the_count(sqs: EmbeddedSqs, queue: str):
    waits: list[float] = []
    away = EndpointConnectionError(endpoint_url="http://x")
    client = Flaky(sqs.client(), {}, *[away] * ATTEMPTS)
    with pytest.raises(WorkerFailed, match=r"request 11 in 8 tries: EndpointConnectionError \(10 requests were sent"):
        send(client, queue, urls(30), sleep=waits.append, jitter=lambda: 0.0)
    assert len(waits) == ATTEMPTS - 1
    assert max(waits) <= 10


def test_a_refusal_that_waiting_does_not_mend_ends_at_once(sqs: EmbeddedSqs, queue: str):
    client = Flaky(sqs.client(), refusal("AccessDenied", 403))
    with pytest.raises(StartupError, match=r"refuses to take messages.*AccessDenied"):
        send(client, queue, urls(3))
    assert len(client.calls) == 1


def test_a_bad_line_on_stdin_comes_after_everything_before_it_was_sent(sqs: EmbeddedSqs, queue: str):
    typed = io.StringIO("\n".join([f"http://host/{n}.jpg" for n in range(12)] + ["nonsense", "http://host/13.jpg"]))
    with pytest.raises(StartupError, match=r"^stdin, line 13: image_url must.*\(12 requests were sent before that\)$"):
        send(sqs.client(), queue, read_requests(None, stdin=typed))
    assert len(drain(sqs, queue)) == 12


def test_a_queues_own_smaller_limit_is_kept_and_the_line_named(sqs: EmbeddedSqs, queue: str, tmp_path: Path):
    sqs.client().set_queue_attributes(QueueUrl=queue, Attributes={"MaximumMessageSize": "2048"})
    lines = [{"image_url": "http://host/1.jpg"}, {"image_url": "http://host/2.jpg", "id": "x" * 200}]
    lines[1]["metadata"] = {"x": "y" * 2000}
    source = file(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(
        StartupError, match=r"a\.jsonl, line 2: the message is 2,\d+ bytes long.*2,048 at most.*\(1 req"
    ):
        send(sqs.client(), queue, read_requests(source))


def test_a_sender_without_leave_to_ask_about_the_queue_can_still_send(sqs: EmbeddedSqs, queue: str):
    class SendOnly(Flaky):
        def get_queue_attributes(self, **wanted: Any) -> Any:
            raise refusal("AccessDeniedException", 400)

    assert send(SendOnly(sqs.client()), queue, urls(3)).sent == 3


@pytest.mark.parametrize("ending", ["missing", "orders.fifo"])
def test_a_queue_that_cannot_serve_is_refused_before_the_first_request(sqs: EmbeddedSqs, queue: str, ending: str):
    read: list[int] = []

    def requests() -> Iterator[dict[str, Any]]:
        read.append(1)
        yield {"image_url": "http://host/1.jpg"}

    with pytest.raises(StartupError, match=f"queue_url: .*{ending}"):
        send(sqs.client(), queue.rpartition("/")[0] + f"/{ending}", requests())
    assert not read
