"""What a receiver's reply means for a message, what a receiver can check, and what the queue sees of it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from cvworker.embedded.receiver import CallbackReceiver, Received
from modules.contract_peers import OddHost, SqsProxy, closed_port
from world import MODULES, picture, poll, world

PICKY = f"{MODULES / 'contract.py'}:Picky"
SECRETS = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="]
VISIBILITY = 5
MAX_RECEIVES = 2

REPLIES: dict[str, list[Any]] = {  # by path; 204 when they are used up
    **{f"/{status}": [status] for status in (200, 201, 202, 203, 204, 206, 299)},
    "/410": [410],
    **{f"/{status}-once": [status] for status in (400, 401, 404, 409, 413)},
    **{f"/{status}-once": [(status, {"Location": "{receiver}/target"})] for status in (301, 302, 303, 307, 308)},
    "/304-once": [304],
    "/500-twice": [500, 502],
    "/503-wait": [(503, {"Retry-After": "3"})],
    "/429-wait": [(429, {"Retry-After": "3"})],
    "/503-date": [(503, {"Retry-After": "date"})],
    "/400-then-410": [400, 410],
    "/404-always": [404] * 99,
    "/error-410": [410],
}
SETTLED_AT_ONCE = [path for path in REPLIES if path[1] in "2" or path == "/410"]
BY_SQS = [path for path in REPLIES if path.endswith("-once")]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, ministack: Any) -> Iterator[SimpleNamespace]:
    """One worker behind a proxy, two secrets, and one message for each way to reply."""
    with ExitStack() as stack:
        proxy, odd = stack.enter_context(SqsProxy(ministack)), stack.enter_context(OddHost())
        slow = stack.enter_context(CallbackReceiver(delay=VISIBILITY + 3))
        black_hole = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))  # never accepts
        here = stack.enter_context(
            world(
                tmp_path_factory.mktemp("callbacks"),
                sqs=proxy,
                name="callbacks",
                visibility=VISIBILITY,
                max_receives=MAX_RECEIVES,
            )
        )
        url = here.images.add("/7.png", picture(7), "image/png")
        left = {path: list(replies) for path, replies in REPLIES.items()}

        def respond(received: Received) -> Any:
            reply = left[received.path].pop(0) if left.get(received.path) else 204
            if isinstance(reply, tuple):
                status, headers = reply
                date = formatdate(time.time() + 4, usegmt=True)
                filled = {name: value.replace("{receiver}", here.receiver.url) for name, value in headers.items()}
                return status, {name: date if value == "date" else value for name, value in filled.items()}
            return reply

        here.receiver.respond = respond
        sent: dict[str, str] = {}

        def send(name: str, callback: str, image_url: str = url) -> str:
            body = json.dumps({"id": name, "image_url": image_url, "callback_url": callback, "metadata": {"é": "🐢"}})
            sent[name] = here.client.send_message(QueueUrl=here.queue_url, MessageBody=body)["MessageId"]
            return sent[name]

        for path in REPLIES:
            send(path, here.receiver.url + path, url if path != "/error-410" else here.images.url + "/missing.png")
        send("slow", slow.url + "/slow")
        send("reset", odd.on("/reset", lambda each: each.reset(), lambda each: each.reply(200)))
        send("refused", f"http://127.0.0.1:{closed_port()}/answers")
        send("unresolved", "http://no-such-host.invalid/answers")
        here.client.send_message(QueueUrl=here.queue_url, MessageBody="no callback, no JSON")
        proxy.lose_delete_of.add(send("delete lost", here.receiver.url + "/delete-lost"))
        worker = here.worker(
            "--callback-timeout", "12", module=PICKY, CVWORKER_CALLBACK_SECRET=json.dumps(SECRETS)
        ).ready()

        def posts(path: str, count: int = 1, timeout: float = 40) -> list[Received]:
            def found() -> list[Received]:
                return [each for each in here.receiver.received if each.path == path]

            poll(lambda: len(found()) >= count, timeout, f"{count} posts to {path}")
            return found()

        def deleted(name: str) -> bool:
            handles = set(proxy.receives(sent[name]))
            return any(
                entry["ReceiptHandle"] in handles
                for request, _ in proxy.operations("DeleteMessageBatch")
                for entry in request["Entries"]
            )

        yield SimpleNamespace(
            here=here, proxy=proxy, odd=odd, slow=slow, black_hole=black_hole, sent=sent, send=send, posts=posts,
            deleted=deleted, worker=worker,
        )  # fmt: skip


def test_a_dead_callback_host_does_not_slow_answers_to_others(case: SimpleNamespace) -> None:
    hole = f"http://127.0.0.1:{case.black_hole.getsockname()[1]}/answers"
    for number in range(100):
        case.send(f"hole {number}", hole)
    poll(lambda: all(case.proxy.receives(case.sent[f"hole {n}"]) for n in range(100)), 30, "all are under way")
    for number in range(10):
        case.send(f"alive {number}", case.here.receiver.url + "/alive")
    case.posts("/alive", 10, timeout=8)


@pytest.mark.parametrize("path", SETTLED_AT_ONCE)
def test_2xx_and_410_settle_a_message_at_the_first_post(case: SimpleNamespace, path: str) -> None:
    case.posts(path)
    poll(lambda: case.deleted(path), 10, "the message is deleted")
    assert len(case.posts(path)) == 1


def test_410_settles_an_error_answer_too(case: SimpleNamespace) -> None:
    [post] = case.posts("/error-410")
    assert post.json["error"]["code"] == "image_not_found"
    poll(lambda: case.deleted("/error-410"), 10, "the message is deleted")


@pytest.mark.parametrize("path", BY_SQS)
def test_redirects_and_refusals_are_tried_again_by_sqs_alone(case: SimpleNamespace, path: str) -> None:
    first, second = case.posts(path, 2)
    assert (first.json["attempt"], second.json["attempt"]) == (1, 2)
    assert second.at - first.at > 0.8 * 5
    assert not [each for each in case.here.receiver.received if each.path == "/target"], "redirects are not followed"
    poll(lambda: case.deleted(path), 10, "the message is deleted")


def test_the_first_delay_is_about_five_seconds(case: SimpleNamespace) -> None:
    for path in BY_SQS:
        case.posts(path, 2)
    changes = {
        entry["ReceiptHandle"]: entry["VisibilityTimeout"]
        for request, _ in case.proxy.operations("ChangeMessageVisibilityBatch")
        for entry in request["Entries"]
    }
    delays = [changes[case.proxy.receives(case.sent[path])[0]] for path in BY_SQS]
    assert all(4 <= delay <= 6 for delay in delays), delays


def test_server_errors_are_tried_again_in_place(case: SimpleNamespace) -> None:
    posts = case.posts("/500-twice", 3)
    assert [each.json["attempt"] for each in posts] == [1, 1, 1]
    assert len(case.proxy.receives(case.sent["/500-twice"])) == 1
    poll(lambda: case.odd.requests["/reset"] == 2, 20, "a connection that was reset is tried again")
    poll(lambda: case.deleted("reset"), 10, "the message is deleted")
    assert len(case.proxy.receives(case.sent["reset"])) == 1


@pytest.mark.parametrize("path", ["/503-wait", "/429-wait", "/503-date"])
def test_a_wait_that_the_receiver_asks_for_is_honoured(case: SimpleNamespace, path: str) -> None:
    first, second = case.posts(path, 2)
    assert 2.9 < second.at - first.at < 15


def test_a_message_that_is_gone_at_the_second_attempt_is_deleted(case: SimpleNamespace) -> None:
    assert len(case.posts("/400-then-410", 2)) == 2
    poll(lambda: case.deleted("/400-then-410"), 10, "the message is deleted")


def test_both_secrets_sign_each_post_and_no_other_does(case: SimpleNamespace) -> None:
    for path in ("/200", "/404-once", "/500-twice", "/error-410"):
        for post in case.posts(path, {"/404-once": 2, "/500-twice": 3}.get(path, 1)):
            text = post.body.decode()
            for secret in SECRETS:
                assert Webhook(secret).verify(text, dict(post.headers))["id"] == path
            with pytest.raises(WebhookVerificationError):
                Webhook("whsec_" + "A" * 32).verify(text, dict(post.headers))
            signatures = {name.lower(): value for name, value in post.headers.items()}["webhook-signature"].split(" ")
            assert [each[:3] for each in signatures] == ["v1,", "v1,"]
            assert abs(int({k.lower(): v for k, v in post.headers.items()}["webhook-timestamp"]) - post.at) < 5


def test_webhook_id_is_the_message_id_at_every_attempt(case: SimpleNamespace) -> None:
    for path, count in {"/200": 1, "/400-once": 2, "/500-twice": 3, "/503-wait": 2}.items():
        assert {each.webhook_id for each in case.posts(path, count)} == {case.sent[path]}


def test_the_body_is_json_in_utf_8_and_says_so(case: SimpleNamespace) -> None:
    [post] = case.posts("/200")
    headers = {name.lower(): value for name, value in post.headers.items()}
    assert headers["content-type"].split(";")[0] == "application/json"
    assert json.loads(post.body.decode("utf-8"))["metadata"] == {"é": "🐢"}


def test_a_slow_callback_keeps_its_message_from_being_delivered_again(case: SimpleNamespace) -> None:
    poll(lambda: case.deleted("slow"), 40, "the message is deleted")
    assert len(case.slow.received) == 1
    assert len(case.proxy.receives(case.sent["slow"])) == 1


def test_a_message_delivered_again_after_its_answer_is_deleted_without_a_second_callback(
    case: SimpleNamespace,
) -> None:
    message = case.sent["delete lost"]
    poll(lambda: len(case.proxy.receives(message)) == 2, 40, "the message whose delete was lost comes back")
    poll(lambda: case.deleted("delete lost"), 20, "it is deleted")
    assert case.proxy.lost == [message]
    assert len(case.posts("/delete-lost")) == 1


def test_a_message_delivered_again_while_it_is_held_is_answered_once(case: SimpleNamespace) -> None:
    # given a message whose answer is under way
    case.slow.delay = 2
    message = case.send("again", case.slow.url + "/again")
    poll(lambda: any(each.path == "/again" for each in case.slow.received), 20, "the callback has begun")
    # when the queue delivers it again, and the answer is accepted after that
    [handle] = case.proxy.receives(message)
    case.here.client.change_message_visibility(QueueUrl=case.here.queue_url, ReceiptHandle=handle, VisibilityTimeout=0)
    poll(lambda: len(case.proxy.receives(message)) == 2, 20, "it is received again")
    # then one callback was enough
    poll(lambda: case.deleted("again"), 20, "it is deleted")
    assert len([each for each in case.slow.received if each.path == "/again"]) == 1


def test_what_no_callback_accepted_ends_in_the_dead_letter_queue_and_nothing_else_does(case: SimpleNamespace) -> None:
    dead = case.here.client.get_queue_url(QueueName="callbacks-dead")["QueueUrl"]
    found: set[str] = set()

    def arrived() -> bool:
        answer = case.here.client.receive_message(QueueUrl=dead, MaxNumberOfMessages=10, VisibilityTimeout=600)
        found.update(each["Body"] for each in answer.get("Messages", []))
        return sum("/404-always" in body or body == "no callback, no JSON" for body in found) == 2

    poll(arrived, 60, "the message that nobody accepted, and the one that nobody can be told of")
    assert len(case.posts("/404-always")) == MAX_RECEIVES
    # and hosts that are dead are waited for, or have made their messages end there, too
    ids = {json.loads(body)["id"] for body in found if body.startswith("{")}
    assert {name for name in ids if not name.startswith("hole")} <= {"/404-always", "refused", "unresolved"}
    assert not any(case.deleted(name) for name in ("/404-always", "refused", "unresolved", "hole 0", "hole 99"))
