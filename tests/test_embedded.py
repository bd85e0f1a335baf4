"""The servers of the demo: a queue that keeps every message, a host of pictures, a receiver of answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import psutil
import pytest

from cvworker.embedded.image_host import ImageHost
from cvworker.embedded.receiver import CallbackReceiver
from cvworker.embedded.sqs import EmbeddedSqs
from cvworker.errors import StartupError


@pytest.fixture(scope="module")
def sqs():
    with EmbeddedSqs() as sqs:
        yield sqs


def fetch(url):
    """Status and body."""
    try:
        with urlopen(url, timeout=10) as response:
            return response.status, response.read()
    except HTTPError as error:
        return error.code, error.read()


def post(receiver, answer, key=None, path="/"):
    """Deliver an answer as the worker would; returns the status."""
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    headers = {"Content-Type": "application/json", **({"webhook-id": key} if key else {})}
    return fetch(Request(receiver.url + path, data=body, headers=headers))[0]


# The queue


def test_messages_go_to_the_dead_letter_queue_after_so_many_receives(sqs):
    client, queue = sqs.client(), sqs.create_queue("short", visibility_timeout=7, max_receives=2)
    attributes = client.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
    assert attributes["VisibilityTimeout"] == "7"
    client.send_message(QueueUrl=queue, MessageBody="{}")
    for _ in range(2):
        [message] = client.receive_message(QueueUrl=queue, WaitTimeSeconds=5)["Messages"]
        client.change_message_visibility(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0)
    assert "Messages" not in client.receive_message(QueueUrl=queue)
    [dead] = client.receive_message(QueueUrl=client.get_queue_url(QueueName="short-dead")["QueueUrl"])["Messages"]
    assert dead["Body"] == "{}"


def test_a_queue_without_a_limit_of_receives_has_no_redrive_policy(sqs):
    queue = sqs.create_queue("endless", max_receives=None)
    assert (
        "RedrivePolicy" not in sqs.client().get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
    )


def test_senders_receivers_and_deleters_at_once_neither_lose_nor_double_a_message(sqs):
    client, queue, total = sqs.client(), sqs.create_queue("busy", visibility_timeout=300), 300
    seen = Counter()
    lock, done = threading.Lock(), threading.Event()

    def send(first):
        for n in range(first, first + 100, 10):
            entries = [{"Id": str(i), "MessageBody": str(n + i)} for i in range(10)]
            client.send_message_batch(QueueUrl=queue, Entries=entries)

    def receive():
        while not done.is_set():
            answer = client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, WaitTimeSeconds=1)
            for message in answer.get("Messages", []):
                client.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
                with lock:
                    seen[message["Body"]] += 1
                    if len(seen) == total:
                        done.set()

    with ThreadPoolExecutor(7) as pool:
        for work in [pool.submit(receive) for _ in range(4)] + [pool.submit(send, n) for n in range(0, total, 100)]:
            work.add_done_callback(lambda work: done.set() if work.exception() else None)
        assert done.wait(60)
    assert seen == Counter(str(n) for n in range(total))
    counts = client.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
    assert {name: value for name, value in counts.items() if "NumberOfMessages" in name and value != "0"} == {}


def test_a_long_poll_returns_as_soon_as_a_message_comes_or_becomes_visible_again(sqs):
    client, queue = sqs.client(), sqs.create_queue("polled")
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        polling = pool.submit(client.receive_message, QueueUrl=queue, WaitTimeSeconds=20, VisibilityTimeout=1)
        client.send_message(QueueUrl=queue, MessageBody="{}")
        assert polling.result()["Messages"]
        again = client.receive_message(
            QueueUrl=queue, WaitTimeSeconds=20, MessageSystemAttributeNames=["ApproximateReceiveCount"]
        )
        assert again["Messages"][0]["Attributes"]["ApproximateReceiveCount"] == "2"
        assert time.monotonic() - started < 10


def test_a_long_poll_of_an_empty_queue_ends_on_time_and_keeps_nobody_waiting(sqs):
    client, empty, other = sqs.client(), sqs.create_queue("empty"), sqs.create_queue("other")
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        polling = pool.submit(client.receive_message, QueueUrl=empty, WaitTimeSeconds=2)
        client.send_message(QueueUrl=other, MessageBody="{}")
        assert client.receive_message(QueueUrl=other)["Messages"]
        assert not polling.done()
        assert "Messages" not in polling.result()
        assert 1.9 < time.monotonic() - started < 10


def test_a_deep_queue_answers_about_as_fast_as_an_empty_one(sqs):
    client, queue = sqs.client(), sqs.create_queue("deep")

    def seconds(calls):
        started = time.perf_counter()
        for _ in range(calls):
            client.send_message_batch(QueueUrl=queue, Entries=[{"Id": str(i), "MessageBody": "{}"} for i in range(10)])
        return time.perf_counter() - started

    shallow = seconds(10)
    seconds(130)
    assert seconds(10) < 10 * shallow  # moto as it is takes more than twenty times as long


def test_the_environment_leads_boto3_to_this_queue_whatever_the_users_own_says(sqs, monkeypatch, tmp_path):
    config = tmp_path / "config"
    config.write_text("[profile own]\nregion = eu-west-1\nendpoint_url = http://127.0.0.1:9/\n")
    own = {
        "AWS_CONFIG_FILE": str(config),
        "AWS_PROFILE": "own",
        "AWS_ENDPOINT_URL_SQS": "http://127.0.0.1:9",
        "AWS_SESSION_TOKEN": "own-token",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "example.com",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    sqs.create_queue("found")  # by the client of its own, which the user's settings do not reach either
    for name, value in sqs.environment().items():
        monkeypatch.setenv(name, value)
    session = boto3.Session()
    assert session.client("sqs").get_queue_url(QueueName="found")["QueueUrl"].startswith(sqs.endpoint + "/")
    assert (session.region_name, session.get_credentials().token) == ("us-east-1", None)
    assert "example.com" in os.environ["NO_PROXY"]


def test_the_queue_survives_ctrl_c_and_ends_when_it_is_closed(capfd):
    sqs = EmbeddedSqs()
    sqs.start()
    process = psutil.Process(sqs.pid)
    assert os.getpgid(sqs.pid) != os.getpgid(0)
    process.send_signal(signal.SIGINT)
    assert sqs.create_queue("after")
    sqs.close()
    sqs.close()
    assert not process.is_running()
    assert capfd.readouterr() == ("", "")


def test_the_queue_ends_when_its_parent_is_killed():
    script = (
        "import sys; from cvworker.embedded.sqs import EmbeddedSqs\n"
        "with EmbeddedSqs() as sqs: print(sqs.pid, flush=True); sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    queue = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    psutil.wait_procs([queue], timeout=20)
    assert not queue.is_running() or queue.status() == psutil.STATUS_ZOMBIE


def test_a_queue_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "moto").mkdir()
    (tmp_path / "moto" / "__init__.py").write_text("raise ImportError('no moto today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StartupError, match=r"ended as it started.*no moto today"), EmbeddedSqs():
        pass


def test_a_queue_that_starts_too_slowly_is_given_up_and_ended():
    children = set(psutil.Process().children())
    with pytest.raises(StartupError, match=r"did not answer within 0\.01 s"):
        EmbeddedSqs(start_timeout=0.01).start()
    assert set(psutil.Process().children()) <= children


# The image host


def test_pictures_are_served_with_their_type_and_may_be_added_while_it_runs():
    with ImageHost({"a b.jpg": (b"JPEG", "image/jpeg")}) as host:
        assert host.url.startswith("http://127.0.0.1:")
        with urlopen(host.url_of("a b.jpg")) as response:
            assert (response.read(), response.headers["Content-Type"]) == (b"JPEG", "image/jpeg")
        assert fetch(host.url + "/new.png") == (404, b"no such picture")
        assert fetch(host.add("/new.png", b"PNG", "image/png")) == (200, b"PNG")
        assert (host.requests, host.requests_for("new.png"), host.requests_for("none")) == (3, 2, 0)


def test_a_connection_is_kept_for_the_next_picture():
    from http.client import HTTPConnection

    with ImageHost({"a": (b"1", "image/png"), "b": (b"2", "image/png")}) as host:
        connection = HTTPConnection(host.url.removeprefix("http://"))
        sockets = set()
        for path in ("/a", "/b", "/missing", "/a"):
            connection.request("GET", path)
            connection.getresponse().read()
            sockets.add(connection.sock)
        connection.close()
    assert len(sockets) == 1


def test_failures_can_be_lasting_or_run_out():
    with ImageHost({"a": (b"1", "image/png"), "b": (b"2", "image/png")}, fail={"a": 500, "b": [503, 429]}) as host:
        assert [fetch(host.url_of("a"))[0] for _ in range(3)] == [500, 500, 500]
        assert [fetch(host.url_of("b"))[0] for _ in range(3)] == [503, 429, 200]
        host.fail.clear()
        assert fetch(host.url_of("a"))[0] == 200


def test_latency_delays_each_answer_and_not_one_after_the_other():
    with ImageHost({"a": (b"1", "image/png")}, latency=0.3) as host, ThreadPoolExecutor(20) as pool:
        started = time.monotonic()
        assert {status for status, _ in pool.map(fetch, [host.url_of("a")] * 20)} == {200}
        assert 0.3 <= time.monotonic() - started < 3


def test_a_port_that_is_taken_is_an_error_where_the_host_is_started():
    with ImageHost() as host:
        port = int(host.url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"), ImageHost(port=port):
            pass


# The receiver


def test_answers_are_kept_with_their_headers_bytes_and_time():
    with CallbackReceiver() as receiver:
        before = time.time()
        assert post(receiver, {"id": "a", "status": "ok"}, key="m-1", path="/hook?x=1") == 204
        [received] = receiver.received
    assert (received.id, received.webhook_id, received.path) == ("a", "m-1", "/hook")
    assert received.headers["content-type"] == "application/json"
    assert json.loads(received.body) == received.json == receiver.answers["a"]
    assert before <= received.at <= time.time()


def test_waiting_ends_with_the_last_answer_and_repeats_do_not_count():
    with CallbackReceiver() as receiver, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receiver.wait_for, 3, 30)
        for key in ("m-1", "m-2", "m-2"):
            post(receiver, {"id": key}, key=key)
        assert receiver.wait_for(3, timeout=0) is False
        assert not waiting.done()
        post(receiver, {"id": "m-3"}, key="m-3")
        assert waiting.result() is True
        assert (receiver.count, len(receiver.accepted), receiver.duplicates) == (3, 4, {"m-2": 2})
        receiver.clear()
        assert (receiver.count, receiver.received, receiver.duplicates) == (0, [], {})


def test_answers_without_a_webhook_id_count_one_by_one():
    with CallbackReceiver() as receiver:
        post(receiver, {"id": "same"})
        post(receiver, {"id": "same"})
        assert (receiver.count, receiver.duplicates) == (2, {})


def test_a_reply_chosen_by_a_test_decides_whether_an_answer_counts():
    replies = iter([(503, {"Retry-After": "7"}), 410, 200])
    with CallbackReceiver(respond=lambda received: next(replies)) as receiver:
        request = Request(receiver.url, data=b'{"id": "a"}', headers={"webhook-id": "m"})
        with pytest.raises(HTTPError) as refused:
            urlopen(request)
        assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "7")
        assert (post(receiver, {"id": "a"}, "m"), post(receiver, {"id": "a"}, "m")) == (410, 200)
        assert (len(receiver.received), receiver.count, receiver.duplicates) == (3, 1, {})


def test_a_reply_that_raises_is_a_500_and_the_post_is_still_kept():
    with CallbackReceiver(respond=lambda received: 1 // 0) as receiver:
        assert post(receiver, {"id": "a"}) == 500
        assert (len(receiver.received), receiver.count) == (1, 0)


def test_what_is_not_json_or_not_a_post_is_seen_too():
    with CallbackReceiver() as receiver:
        assert post(receiver, b"\xff not json") == 204
        assert fetch(receiver.url)[0] == 405
        [received] = receiver.received
    assert (received.body, received.json, received.id, receiver.answers) == (b"\xff not json", None, None, {})


def test_an_answer_larger_than_a_message_is_received():
    with CallbackReceiver() as receiver:
        assert post(receiver, {"id": "a", "metadata": "x" * 3_000_000}) == 204


def test_a_reply_held_back_does_not_hold_back_others_nor_the_end():
    with CallbackReceiver(delay=600) as receiver, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post, receiver, {"id": "slow"})
        assert receiver.wait_until(lambda: len(receiver.received) == 1, 30)
        receiver.delay = 0
        assert post(receiver, {"id": "quick"}) == 204
        assert list(receiver.answers) == ["quick"]
        receiver.close()
        with pytest.raises(OSError, match=r"closed|reset"):
            slow.result()
