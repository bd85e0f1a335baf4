"""Everything a message body can be: requests, envelopes, events and rubbish, and what becomes of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from cvworker.embedded.receiver import Received
from cvworker.embedded.sqs import EmbeddedSqs
from modules.contract_peers import OddHost, SqsProxy
from world import MODULES, picture, poll, world

PICKY = f"{MODULES / 'contract.py'}:Picky"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
GOOD, OWN = "{images}/7.png", "{receiver}/own"  # filled in with the addresses of the run

ID_OF_300 = "x" * 300
ECHOED = {
    "unicode": {"id": "żółw 🐢 \u202eabc", "metadata": {"ключ": "значение", "emoji": "🐢", "nul": "a\u0000b"}},
    "nested": {"id": "nested", "metadata": {"a": [1, 2.5, -0.0, 1.0, True, None, {"b": [[]]}], "": {}, "big": 2**70}},
    "half of a pair": {"id": "half", "metadata": {"half": "\ud83d"}},
    "long id": {"id": "i" * 256, "metadata": {"text": "m" * 100_000}},
    "task": {"id": "task", "task": "picky", "metadata": {}},
    "unknown fields": {"id": "unknown", "metadata": {"a": 1}, "priority": 9, "Records": None, "Type": "x", "ID": 4},
}
INVALID: dict[str, tuple[Any, str]] = {  # what is sent, and where the answer goes
    "empty object": ({}, "/default"),
    "no image_url": ({"id": "mine", "callback_url": OWN}, "/own"),
    "image_url null": ({"id": "mine", "image_url": None, "callback_url": OWN}, "/own"),
    "image_url empty": ({"id": "mine", "image_url": "", "callback_url": OWN}, "/own"),
    "image_url a number": ({"id": "mine", "image_url": 5, "callback_url": OWN}, "/own"),
    "image_url a list": ({"id": "mine", "image_url": [GOOD], "callback_url": OWN}, "/own"),
    "id empty": ({"id": "", "image_url": GOOD, "callback_url": OWN}, "/own"),
    "id too long": ({"id": ID_OF_300, "image_url": GOOD, "callback_url": OWN}, "/own"),
    "id a number": ({"id": 7, "image_url": GOOD, "callback_url": OWN}, "/own"),
    "task a number": ({"id": "mine", "task": 7, "image_url": GOOD, "callback_url": OWN}, "/own"),
    "metadata a list": ({"id": "mine", "metadata": [], "image_url": GOOD, "callback_url": OWN}, "/own"),
    "metadata a text": ({"id": "mine", "metadata": "m", "image_url": GOOD, "callback_url": OWN}, "/own"),
    "callback_url a number": ({"id": "mine", "image_url": GOOD, "callback_url": 5}, "/default"),
    "callback_url empty": ({"id": "mine", "image_url": GOOD, "callback_url": ""}, "/default"),
    "no JSON": ("not json", "/default"),
    "half of JSON": ('{"image_url": "http://host/', "/default"),
    "NaN": ('{"id": "mine", "image_url": "{images}/7.png", "metadata": {"x": NaN}}', "/default"),
    "Infinity": ('{"id": "mine", "image_url": "{images}/7.png", "metadata": {"x": -Infinity}}', "/default"),
    "number beyond doubles": ('{"id": "mine", "image_url": "{images}/7.png", "metadata": {"x": 1e999}}', "/default"),
    "list": ([], "/default"),
    "null": ("null", "/default"),
    "text": ('"http://host/7.png"', "/default"),
    "deep": ("[" * 100_000, "/default"),
    "deep metadata": (
        '{"image_url": "{images}/7.png", "metadata": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
        "/default",
    ),
    "long number": ('{"image_url": "{images}/7.png", "metadata": {"x": ' + "1" * 5000 + "}}", "/default"),
}


def s3_event(*records: tuple[str, str]) -> dict[str, Any]:
    return {
        "Records": [
            {
                "eventVersion": "2.1",
                "eventSource": "aws:s3",
                "awsRegion": "eu-west-1",
                "eventName": "ObjectCreated:Put",
                "s3": {"s3SchemaVersion": "1.0", "bucket": {"name": bucket}, "object": {"key": key, "size": 9}},
            }
            for bucket, key in records
        ]
    }


def sns(message: Any) -> dict[str, Any]:
    return {
        "Type": "Notification",
        "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
        "TopicArn": "arn:aws:sns:us-west-2:123456789012:images",
        "Message": json.dumps(message),
        "Timestamp": "2026-05-02T00:54:06.655Z",
        "SignatureVersion": "1",
        "UnsubscribeURL": "https://sns.us-west-2.amazonaws.com/?Action=Unsubscribe",
    }


def event_bridge(bucket: str, key: str) -> dict[str, Any]:
    return {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": "Object Created",
        "source": "aws.s3",
        "detail": {"version": "0", "bucket": {"name": bucket}, "object": {"key": key, "size": 5}},
    }


TEST_EVENT = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "pictures", "RequestId": "5582815E1AEA5ADF"}
MANY = [("pictures", "7.png"), ("pictures", "gone.png"), ("secrets", "7.png"), ("pictures", "a+b%2Bc+%C3%BC.png")]
ENVELOPES: dict[str, Any] = {
    "sns": sns({"id": "wrapped", "image_url": GOOD, "callback_url": OWN, "metadata": {"n": 1}}),
    "sns without id": sns({"image_url": GOOD, "callback_url": OWN}),
    "s3": s3_event(("pictures", "a+b%2Bc+%C3%BC.png")),
    "s3 through sns": sns(s3_event(("pictures", "7.png"))),
    "event bridge": event_bridge("pictures", "a b+c ü.png"),
    "event bridge, encoded": event_bridge("pictures", "a+b%2Bc+%C3%BC.png"),
    "many": s3_event(*MANY),
    "test event": TEST_EVENT,
    "test event through sns": sns(TEST_EVENT),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, endless: Any) -> Iterator[SimpleNamespace]:
    """One worker with a default callback, and every kind of message sent to it before it began."""
    with ExitStack() as stack:
        sqs = stack.enter_context(EmbeddedSqs())
        here = stack.enter_context(world(tmp_path_factory.mktemp("messages"), sqs=sqs, name="all", max_receives=2))
        s3 = boto3.Session().client(
            "s3", endpoint_url=sqs.endpoint, aws_access_key_id="t", aws_secret_access_key="t", region_name="us-east-1"
        )
        s3.create_bucket(Bucket="pictures")
        for key in ("7.png", "a b+c ü.png"):
            s3.put_object(Bucket="pictures", Key=key, Body=picture(7))
        here.images.add("/7.png", picture(7), "image/png")
        base = {"image_url": GOOD, "callback_url": OWN}
        bodies = {name: {**base, **fields} for name, fields in ECHOED.items()}
        bodies |= {name: body for name, (body, _) in INVALID.items()}
        bodies |= {**ENVELOPES, "other task": {**base, "task": "other"}, "no id": {"image_url": GOOD}}
        bodies["default"] = {"id": "default", "image_url": GOOD}
        sent: dict[str, str] = {}
        for name, body in bodies.items():
            text = body if isinstance(body, str) else json.dumps(body)
            text = text.replace("{images}", here.images.url).replace("{receiver}", here.receiver.url)
            sent[name] = here.client.send_message(QueueUrl=here.queue_url, MessageBody=text)["MessageId"]
        worker = here.worker(
            module=PICKY,
            CVWORKER_CALLBACK_URL=here.receiver.url + "/default",
            CVWORKER_CALLBACK_SECRET=SECRET,
            CVWORKER_ALLOWED_BUCKETS='["pictures"]',
        )

        def answer(name: str, suffix: str = "") -> Received:
            """The one answer to a message, told by the header that names it."""
            wanted = sent[name] + suffix

            def found() -> list[Received]:
                return [each for each in here.receiver.received if each.webhook_id == wanted]

            [one] = poll(found, 60, f"an answer to {name!r}")
            return one

        yield SimpleNamespace(here=here, sent=sent, answer=answer, worker=worker)


@pytest.mark.parametrize("name", ECHOED)
def test_what_the_client_sent_is_echoed_unchanged(case: SimpleNamespace, name: str) -> None:
    received = case.answer(name)
    assert received.path == "/own"
    assert (received.json["status"], received.json["task"]) == ("ok", "picky")
    assert received.json["id"] == ECHOED[name]["id"]
    assert json.dumps(received.json["metadata"]) == json.dumps(ECHOED[name].get("metadata", {}))


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_message_is_told_to_its_own_callback_or_the_default(case: SimpleNamespace, name: str) -> None:
    received = case.answer(name)
    answer = received.json
    assert (answer["status"], answer["error"]["code"], answer["attempt"]) == ("error", "invalid_message", 1), answer
    assert answer["error"]["retryable"] is False
    assert received.path == INVALID[name][1]
    body = INVALID[name][0]
    usable = isinstance(body, dict) and body.get("id") == "mine"
    assert answer["id"] == ("mine" if usable else answer["id"])
    assert isinstance(answer["id"], str)
    if isinstance(body, dict) and not usable:
        assert answer["id"] == case.sent[name]


def test_a_task_of_another_module_is_refused(case: SimpleNamespace) -> None:
    received = case.answer("other task")
    assert (received.path, received.json["error"]["code"]) == ("/own", "unsupported_task")


def test_a_request_without_id_and_callback_gets_the_message_id_and_the_default(case: SimpleNamespace) -> None:
    assert (case.answer("no id").path, case.answer("no id").json["id"]) == ("/default", case.sent["no id"])
    assert (case.answer("default").path, case.answer("default").json["id"]) == ("/default", "default")


def test_a_request_wrapped_by_sns_is_understood(case: SimpleNamespace) -> None:
    received = case.answer("sns")
    assert (received.path, received.json["id"], received.json["metadata"]) == ("/own", "wrapped", {"n": 1})
    assert case.answer("sns without id").json["id"] == case.sent["sns without id"], "of SQS, not of SNS"


@pytest.mark.parametrize(
    ("name", "key"), [("s3", "a b+c ü.png"), ("s3 through sns", "7.png"), ("event bridge", "a b+c ü.png")]
)
def test_an_s3_event_is_a_request_for_its_object(case: SimpleNamespace, name: str, key: str) -> None:
    received = case.answer(name)
    assert (received.path, received.json["status"], received.json["id"]) == ("/default", "ok", case.sent[name])
    assert received.json["image_url"] == f"s3://pictures/{key}"


def test_keys_of_event_bridge_are_not_decoded(case: SimpleNamespace) -> None:
    answer = case.answer("event bridge, encoded").json
    assert answer["image_url"] == "s3://pictures/a+b%2Bc+%C3%BC.png"
    assert answer["error"]["code"] == "image_not_found"


def test_each_record_of_an_event_is_answered_under_a_number_of_its_own(case: SimpleNamespace) -> None:
    answers = [case.answer("many", f"-{number}").json for number in range(1, 5)]
    assert [answer["id"] for answer in answers] == [f"{case.sent['many']}-{number}" for number in range(1, 5)]
    assert [answer["image_url"] for answer in answers] == [
        "s3://pictures/7.png",
        "s3://pictures/gone.png",
        "s3://secrets/7.png",
        "s3://pictures/a b+c ü.png",
    ]
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes == [None, "image_not_found", "url_not_allowed", None]


def test_all_messages_are_deleted_and_test_events_without_an_answer(case: SimpleNamespace) -> None:
    poll(lambda: case.here.counts() == (0, 0), 40, "an empty queue")
    dead = case.here.client.get_queue_url(QueueName="all-dead")["QueueUrl"]
    assert case.here.counts(dead) == (0, 0)
    spoken = {received.webhook_id for received in case.here.receiver.received}
    assert not spoken & {case.sent["test event"], case.sent["test event through sns"]}
    assert not case.here.receiver.duplicates


def test_every_answer_is_strict_json_in_utf_8(case: SimpleNamespace) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for received in case.here.receiver.received:
        json.loads(received.body.decode("utf-8"), parse_constant=refuse)


# Without a redrive policy and without a default callback


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, ministack: Any) -> Iterator[SimpleNamespace]:
    with ExitStack() as stack:
        proxy, odd = stack.enter_context(SqsProxy(ministack)), stack.enter_context(OddHost())
        folder = tmp_path_factory.mktemp("endless")
        here = stack.enter_context(world(folder, sqs=proxy, name="endless", visibility=2, max_receives=None))
        odd.on("/500", lambda exchange: exchange.reply(500))
        callback = here.receiver.url + "/own"
        bodies = {
            "rubbish": "not json",
            "no callback": json.dumps({"id": "a", "image_url": odd.url + "/500"}),
            "unusable callback": json.dumps({"id": "b", "image_url": odd.url, "callback_url": "ftp://host/own"}),
            "event": json.dumps(s3_event(("pictures", "7.png"))),
            "failing": json.dumps({"id": "failing", "image_url": odd.url + "/500", "callback_url": callback}),
        }
        sent = {
            name: here.client.send_message(QueueUrl=here.queue_url, MessageBody=body)["MessageId"]
            for name, body in bodies.items()
        }
        worker = here.worker(
            "--max-attempts", "2", "--download-timeout", "1", "--allowed-buckets", "pictures", module=PICKY
        )
        yield SimpleNamespace(here=here, proxy=proxy, sent=sent, worker=worker)


def test_without_a_redrive_policy_the_worker_warns_and_max_attempts_is_the_last_receive(
    endless: SimpleNamespace,
) -> None:
    answer = poll(lambda: endless.here.receiver.answers.get("failing"), 60, "the last attempt is answered")
    assert (answer["error"]["code"], answer["attempt"]) == ("download_failed", 2)
    rows = [json.loads(line) for line in endless.worker.text().splitlines() if line.startswith("{")]
    assert any("redrive" in json.dumps(row) for row in rows if row["level"] == "warning")


def test_without_a_redrive_policy_a_message_that_cannot_be_answered_comes_back_once_an_hour(
    endless: SimpleNamespace,
) -> None:
    def long_hidden() -> set[str]:
        changes = [
            entry
            for request, _ in endless.proxy.operations("ChangeMessageVisibilityBatch")
            for entry in request["Entries"]
        ]
        changes += [request for request, _ in endless.proxy.operations("ChangeMessageVisibility")]
        hidden = [change["ReceiptHandle"] for change in changes if change["VisibilityTimeout"] >= 3600]
        return {endless.proxy.messages[handle]["MessageId"] for handle in hidden}

    unanswerable = {endless.sent[name] for name in ("rubbish", "no callback", "unusable callback", "event")}
    poll(lambda: long_hidden() == unanswerable, 30, "all of them are hidden for an hour, and no other")
    assert all(len(endless.proxy.receives(each)) == 2 for each in unanswerable)
    poll(lambda: endless.here.counts() == (0, 4), 20, "none of them is deleted")
    assert set(endless.here.receiver.answers) == {"failing"}
