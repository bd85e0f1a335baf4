"""Every row of the contract's error table, and the shape of answers, as a client sees them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import save_file

from cvworker import __version__
from cvworker.embedded.sqs import EmbeddedSqs
from modules.contract_images import MAX_BYTES, MAX_PIXELS, image_urls, png_of
from modules.contract_peers import OddHost
from world import MODULES, picture, poll, world

PICKY = f"{MODULES / 'contract.py'}:Picky"


ONCE = {
    "404": "image_not_found",
    "410": "image_not_found",
    "400": "download_failed",
    "401": "download_failed",
    "403": "download_failed",
    "too many bytes by content-length": "image_too_large",
    "too many bytes without a length": "image_too_large",
    "one byte too many": "image_too_large",
    "too many pixels": "image_too_large",
    "one row of pixels too many": "image_too_large",
    "html": "image_unsupported",
    "svg": "image_unsupported",
    "eps": "image_unsupported",
    "psd": "image_unsupported",
    "truncated jpeg": "image_invalid",
    "truncated png": "image_invalid",
    "jpeg header and garbage": "image_invalid",
    "s3 object missing": "image_not_found",
    "s3 bucket not allowed": "url_not_allowed",
    "s3 without a key": "url_not_allowed",
    "s3 object too large": "image_too_large",
    "file": "url_not_allowed",
    "ftp": "url_not_allowed",
    "data": "url_not_allowed",
    "userinfo": "url_not_allowed",
    "user alone": "url_not_allowed",
    "port out of range": "url_not_allowed",
    "port that is no number": "url_not_allowed",
    "no host": "url_not_allowed",
    "space in the host": "url_not_allowed",
    "escape in the host": "url_not_allowed",
    "open bracket": "url_not_allowed",
    "redirect to a file": "url_not_allowed",
    "redirect to 404": "image_not_found",
    "preprocess raises": "preprocess_failed",
    "process raises": "process_failed",
    "result is not finite": "process_failed",
    "result is not JSON": "process_failed",
}
AFTER_RETRIES = {
    "500 for ever": "download_failed",
    "429 for ever": "download_failed",
    "connection refused": "download_failed",
    "connection reset for ever": "download_failed",
    "name that does not resolve": "download_failed",
    "no answer in time": "download_failed",
    "a byte now and then": "download_failed",
    "body shorter than promised": "download_failed",
}
OK = [
    "png",
    "jpeg",
    "webp",
    "upper case scheme",
    "fragment",
    "query",
    "path beyond ascii",
    "500 once",
    "429 once",
    "connection reset once",
    "body shorter than promised once",
    "redirect",
    "exactly as many bytes as allowed",
    "exactly as many pixels as allowed",
    "s3 object",
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, guarded: Any) -> Iterator[SimpleNamespace]:
    """One worker with short limits, at which every case was sent before it began."""
    folder = tmp_path_factory.mktemp("errors")
    save_file({"weight": torch.ones(3)}, folder / "weights.safetensors")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    with ExitStack() as stack:
        sqs = stack.enter_context(EmbeddedSqs())
        odd = stack.enter_context(OddHost())
        here = stack.enter_context(world(folder, sqs=sqs, name="errors", max_receives=2))
        s3 = boto3.Session().client(
            "s3", endpoint_url=sqs.endpoint, aws_access_key_id="t", aws_secret_access_key="t", region_name="us-east-1"
        )
        for bucket in ("pictures", "secrets"):
            s3.create_bucket(Bucket=bucket)
            s3.put_object(Bucket=bucket, Key="7.png", Body=picture(7))
        s3.put_object(Bucket="pictures", Key="folder/7.png", Body=picture(7))
        s3.put_object(Bucket="pictures", Key="large.png", Body=png_of(MAX_BYTES + 1))
        urls = image_urls(here, odd)
        assert set(urls) == {*ONCE, *AFTER_RETRIES, *OK}
        callback = here.receiver.url + "/answers"
        here.send(*({"id": name, "image_url": url, "callback_url": callback} for name, url in urls.items()))
        worker = here.worker(
            *("--download-timeout", "2", "--max-image-bytes", str(MAX_BYTES), "--max-image-pixels", str(MAX_PIXELS)),
            *("--precision", "fp32", "--allowed-buckets", "pictures"),
            *("--weights", f"{folder / 'weights.safetensors'}#sha256={digest}"),
            module=PICKY,
        )

        def answer(name: str, timeout: float = 60) -> dict[str, Any]:
            return dict(poll(lambda: here.receiver.answers.get(name), timeout, f"an answer to {name!r}"))

        yield SimpleNamespace(here=here, odd=odd, urls=urls, answer=answer, worker=worker, digest=digest)


@pytest.mark.parametrize("name", ONCE)
def test_a_failure_that_will_stay_is_answered_at_the_first_receive(case: SimpleNamespace, name: str) -> None:
    answer = case.answer(name)
    assert answer["status"] == "error", answer
    assert (answer["error"]["code"], answer["error"]["retryable"], answer["attempt"]) == (ONCE[name], False, 1), answer


@pytest.mark.parametrize("name", OK)
def test_a_picture_that_can_be_had_is_answered_at_the_first_receive(case: SimpleNamespace, name: str) -> None:
    answer = case.answer(name)
    assert (answer["status"], answer["attempt"]) == ("ok", 1), answer


@pytest.mark.parametrize("name", AFTER_RETRIES)
def test_a_failure_that_may_pass_is_answered_at_the_last_receive(case: SimpleNamespace, name: str) -> None:
    answer = case.answer(name)
    assert answer["status"] == "error", answer
    assert (answer["error"]["code"], answer["attempt"]) == (AFTER_RETRIES[name], 2), answer
    assert answer["timings_ms"]["queue"] > 4000, "SQS redelivers after 5 s, give or take 20%"


def test_transient_failures_are_tried_again_in_place_but_time_outs_only_by_sqs(case: SimpleNamespace) -> None:
    for name in ("500 for ever", "no answer in time", "a byte now and then"):
        case.answer(name)
    assert case.odd.requests["/500"] > 2, "more often than received"
    assert case.odd.requests["/never"] == 2
    assert case.odd.requests["/drip"] == 2


def test_an_empty_body_is_answered_at_once(case: SimpleNamespace) -> None:
    url = case.odd.picture("/empty.png", b"")
    case.here.send({"id": "empty", "image_url": url, "callback_url": case.here.receiver.url + "/answers"})
    answer = case.answer("empty")
    assert answer["error"]["code"] in ("image_invalid", "image_unsupported")
    assert answer["attempt"] == 1


def test_a_body_that_unpacks_to_more_than_allowed_is_refused(case: SimpleNamespace) -> None:
    packed = gzip.compress(bytes(50 * MAX_BYTES))
    url = case.odd.on("/bomb", lambda exchange: exchange.reply(200, packed, Content_Encoding="gzip"))
    case.here.send({"id": "gzip", "image_url": url, "callback_url": case.here.receiver.url + "/answers"})
    assert case.answer("gzip")["status"] == "error"


def test_an_answer_has_the_fields_of_the_contract_and_no_other(case: SimpleNamespace) -> None:
    answer = case.answer("png")
    timings = answer.pop("timings_ms")
    assert answer == {
        "id": "png",
        "status": "ok",
        "task": "picky",
        "result": {"mean": [7, 0, 77]},
        "image_url": case.urls["png"],
        "metadata": {},
        "attempt": 1,
        "worker": {"version": __version__, "module": "picky", "weights": f"sha256:{case.digest}", "precision": "fp32"},
    }
    assert set(timings) == {"queue", "download", "preprocess", "process", "total"}
    assert all(isinstance(value, int | float) and value >= 0 for value in timings.values())
    assert timings["total"] >= sum(timings[step] for step in ("queue", "download", "preprocess", "process")) * 0.99


def test_an_error_answer_has_the_same_fields_with_an_error_in_place_of_the_result(case: SimpleNamespace) -> None:
    answer = case.answer("404")
    timings, error = answer.pop("timings_ms"), answer.pop("error")
    assert answer == {
        "id": "404",
        "status": "error",
        "task": "picky",
        "image_url": case.urls["404"],
        "metadata": {},
        "attempt": 1,
        "worker": {"version": __version__, "module": "picky", "weights": f"sha256:{case.digest}", "precision": "fp32"},
    }
    assert set(error) == {"code", "message", "retryable"}
    assert error["message"]
    assert set(timings) <= {"queue", "download", "preprocess", "process", "total"}
    assert timings["total"] >= timings["queue"] > 0


def test_what_the_module_raised_is_told(case: SimpleNamespace) -> None:
    assert "too green" in case.answer("preprocess raises")["error"]["message"]
    assert "too red" in case.answer("process raises")["error"]["message"]


def test_every_message_is_deleted_once_it_is_answered_and_none_is_answered_twice(case: SimpleNamespace) -> None:
    for name in case.urls:
        case.answer(name)
    poll(lambda: case.here.counts() == (0, 0), 20, "an empty queue")
    dead = case.here.client.get_queue_url(QueueName="errors-dead")["QueueUrl"]
    assert case.here.counts(dead) == (0, 0)
    assert not case.here.receiver.duplicates
    assert json.loads(case.here.receiver.received[0].body)["id"] in case.urls


# The address check, for a worker that is not told to leave it off


FORBIDDEN = {
    "loopback": "http://127.0.0.1:{port}/7.png",
    "loopback as one number": "http://2130706433:{port}/7.png",
    "loopback in octal": "http://0177.0.0.1:{port}/7.png",
    "loopback for short": "http://127.1:{port}/7.png",
    "loopback in circles": "http://①②⑦.⓪.⓪.①:{port}/7.png",
    "loopback of version 6": "http://[::1]:{port}/7.png",
    "loopback mapped into version 6": "http://[::ffff:127.0.0.1]:{port}/7.png",
    "any address": "http://0.0.0.0:{port}/7.png",
    "private": "http://10.0.0.1/7.png",
    "metadata service": "http://169.254.169.254/latest/meta-data/",
    "shared address space": "http://100.64.0.1/7.png",
    "below localhost": "http://pictures.localhost:{port}/7.png",
    "redirect": "{allowed}/to-forbidden",
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, ministack: Any) -> Iterator[SimpleNamespace]:
    """A worker with the address check; one host may be spoken to, and the receiver; another host may not."""
    with ExitStack() as stack:
        forbidden, allowed = stack.enter_context(OddHost()), stack.enter_context(OddHost())
        folder = tmp_path_factory.mktemp("guarded")
        here = stack.enter_context(world(folder, sqs=ministack, name="guarded", visibility=4, max_receives=2))
        forbidden.picture("/7.png", picture(7))
        allowed.picture("/7.png", picture(7))
        allowed.on("/to-forbidden", lambda exchange: exchange.reply(302, Location=forbidden.url + "/7.png"))
        allowed.on("/to-allowed", lambda exchange: exchange.reply(302, Location="/7.png"))
        callback = here.receiver.url + "/answers"
        urls = {name: url.format(port=forbidden.port, allowed=allowed.url) for name, url in FORBIDDEN.items()}
        urls["host and port"] = allowed.url + "/7.png"
        urls["host alone"] = f"http://localhost:{forbidden.port}/7.png"
        urls["redirect to the same host"] = allowed.url + "/to-allowed"
        here.send({"id": "unsaid", "image_url": allowed.url + "/7.png", "callback_url": forbidden.url + "/callback"})
        here.send(*({"id": name, "image_url": url, "callback_url": callback} for name, url in urls.items()))
        here.worker(
            module=PICKY,
            CVWORKER_ALLOW_PRIVATE_NETWORKS="false",
            CVWORKER_ALLOWED_HOSTS=f"localhost, 127.0.0.1:{allowed.port},{callback.split('/')[2]}",
        )

        def answer(name: str) -> dict[str, Any]:
            return dict(poll(lambda: here.receiver.answers.get(name), 60, f"an answer to {name!r}"))

        yield SimpleNamespace(here=here, forbidden=forbidden, answer=answer)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_an_address_that_is_not_public_is_refused(guarded: SimpleNamespace, name: str) -> None:
    answer = guarded.answer(name)
    assert answer["status"] == "error", answer
    assert (answer["error"]["code"], answer["attempt"]) == ("url_not_allowed", 1), answer


@pytest.mark.parametrize("name", ["host and port", "host alone", "redirect to the same host"])
def test_an_allowed_host_is_exempt_from_the_address_check(guarded: SimpleNamespace, name: str) -> None:
    assert guarded.answer(name)["status"] == "ok"


def test_no_forbidden_host_is_spoken_to_not_even_to_call_back(guarded: SimpleNamespace) -> None:
    for name in FORBIDDEN:
        guarded.answer(name)
    guarded.answer("host alone")
    here = guarded.here
    dead = here.client.get_queue_url(QueueName="guarded-dead")["QueueUrl"]
    poll(lambda: here.counts(dead)[0] == 1, 40, "the message that cannot be answered is in the dead-letter queue")
    assert here.counts() == (0, 0)
    assert guarded.forbidden.requests == {"/7.png": 1}, "by the host that is allowed at every port"
