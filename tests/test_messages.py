"""Requests and the envelopes around them: what is read, what is refused, and who is told."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote_plus, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvworker.answer import WorkerInfo, answer_body
from cvworker.errors import InvalidMessage, UnsupportedTask, UrlNotAllowed
from cvworker.messages import MAX_METADATA_DEPTH, MAX_RECORDS, Request, is_s3_url, parse, split_s3_url

DEFAULT = "https://api.example/default"
OWN = "https://client.example/answers"
IMAGE = "https://images.example/1.jpg"


def check_url(url: str) -> None:
    parts = urlsplit(url)
    _ = parts.port
    if parts.username or parts.hostname == "localhost":
        raise UrlNotAllowed("the host may not be spoken to")


def read(body: object, default: str | None = DEFAULT) -> list[Request]:
    text = body if isinstance(body, str) else json.dumps(body)
    return parse(
        text,
        message_id="m",
        task="threat",
        default_callback=default,
        check_url=check_url,
        allowed_buckets={"photos"},
    )


def one(body: object, default: str | None = DEFAULT) -> Request:
    (request,) = read(body, default)
    return request


def with_raw(name: str, raw: str) -> str:
    """A valid request with one more field, spelled as it is."""
    return f'{{"image_url": "{IMAGE}", "{name}": {raw}}}'


# --------------------------------------------------------------------------------------------- request


def test_a_full_request_is_read_as_it_stands():
    request = one(
        {"id": "a", "image_url": IMAGE, "callback_url": OWN, "task": "threat", "metadata": {"n": [1, 2.5, None, "ü"]}}
    )
    assert request == Request("m", "a", IMAGE, OWN, "threat", {"n": [1, 2.5, None, "ü"]}, None)


def test_everything_but_the_image_url_has_a_default():
    assert one({"image_url": IMAGE}) == Request("m", "m", IMAGE, DEFAULT, None, {}, None)


def test_unknown_fields_are_ignored_even_those_of_envelopes():
    envelopes = {"Type": "Notification", "Message": "x", "Records": [], "source": "aws.s3", "Event": "s3:TestEvent"}
    assert one({"image_url": IMAGE, **envelopes}).error is None
    assert one({"callback_url": OWN, **envelopes}).callback_url == OWN


@pytest.mark.parametrize(
    "body", ["", "{", "hello", "[]", '"x"', "1", "null", "\ufeff{}", '{"a": 1} x', "\x00", "\ud800"]
)
def test_a_body_that_is_no_json_object_is_told_at_the_default_callback(body):
    request = one(body)
    assert isinstance(request.error, InvalidMessage)
    assert (request.key, request.id, request.callback_url) == ("m", "m", DEFAULT)


def test_a_body_that_is_no_json_and_no_default_callback_cannot_be_answered():
    assert one("{", default=None).callback_url is None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400 + ".0"])
@pytest.mark.parametrize("name", ["metadata", "unknown"])
def test_numbers_that_json_cannot_echo_are_refused_wherever_they_stand(number, name):
    request = one(with_raw(name, f'{{"x": [{number}]}}'))
    assert isinstance(request.error, InvalidMessage)


def test_huge_integers_are_echoed_up_to_a_limit_and_refused_beyond_it():
    assert one(with_raw("metadata", '{"x": ' + "9" * 4300 + "}")).error is None
    error = one(with_raw("metadata", '{"x": ' + "9" * 4301 + "}")).error
    assert isinstance(error, InvalidMessage)
    assert "digits" in str(error)


def test_of_a_field_given_twice_the_last_one_counts():
    assert one(with_raw("image_url", '"https://images.example/2.jpg"')).image_url == "https://images.example/2.jpg"


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_without_end_is_an_invalid_message_wherever_it_stands(opening):
    for body in (opening * 100_000, with_raw("metadata", opening * 100_000), with_raw("other", opening * 100_000)):
        assert isinstance(one(body).error, InvalidMessage)


@pytest.mark.parametrize("kind", ["list", "object"])
def test_metadata_may_nest_to_a_fixed_depth_and_no_deeper(kind):
    def nested(levels: int) -> Any:
        value: Any = {"x": [1]} if kind == "object" else [{"x": 1}]
        for _ in range(levels - 3):
            value = {"a": value} if kind == "object" else [value]
        return {"top": value}

    assert one({"image_url": IMAGE, "metadata": nested(MAX_METADATA_DEPTH)}).error is None
    request = one({"image_url": IMAGE, "metadata": nested(MAX_METADATA_DEPTH + 1)})
    assert "metadata" in str(request.error)
    assert request.metadata == {}


@pytest.mark.parametrize("name", ["callback_url", "id", "task", "metadata", "image_url"])
@pytest.mark.parametrize("value", [None, 1, True, [], ["x"]])
def test_a_field_of_the_wrong_type_is_named_in_the_error(name, value):
    request = one({"image_url": IMAGE, name: value})
    assert isinstance(request.error, InvalidMessage)
    assert str(request.error).startswith(name)


@pytest.mark.parametrize("name", ["callback_url", "id", "task", "image_url"])
def test_an_empty_string_is_named_in_the_error(name):
    request = one({"image_url": IMAGE, name: ""})
    assert isinstance(request.error, InvalidMessage)
    assert str(request.error) == f"{name} is empty"


def test_metadata_must_be_an_object_and_may_be_an_empty_one():
    assert isinstance(one({"image_url": IMAGE, "metadata": "x"}).error, InvalidMessage)
    assert one({"image_url": IMAGE, "metadata": {}}).error is None


def test_an_id_has_1_to_256_characters_and_else_the_key_is_echoed():
    assert one({"image_url": IMAGE, "id": "ü" * 256}).id == "ü" * 256
    request = one({"image_url": IMAGE, "id": "x" * 257})
    assert isinstance(request.error, InvalidMessage)
    assert request.id == "m"


def test_what_is_usable_is_echoed_beside_an_invalid_field():
    request = one({"id": "a", "image_url": "ftp://x/y", "task": "other", "metadata": {"k": 1}, "callback_url": None})
    assert isinstance(request.error, InvalidMessage)
    assert (request.id, request.image_url, request.task, request.metadata) == ("a", "ftp://x/y", "other", {"k": 1})


def test_a_missing_image_url_is_told_at_the_requests_own_callback():
    request = one({"id": "a", "callback_url": OWN})
    assert isinstance(request.error, InvalidMessage)
    assert (request.id, request.callback_url, request.image_url) == ("a", OWN, None)


def test_another_modules_task_is_unsupported_and_echoed():
    request = one({"image_url": IMAGE, "task": "scene"})
    assert isinstance(request.error, UnsupportedTask)
    assert request.task == "scene"


def test_types_are_checked_before_the_task_and_the_task_before_urls():
    body = {"image_url": "ftp://x", "task": "scene", "metadata": []}
    assert isinstance(one(body).error, InvalidMessage)
    body["metadata"] = {}
    assert isinstance(one(body).error, UnsupportedTask)
    body["task"] = "threat"
    assert isinstance(one(body).error, UrlNotAllowed)


# ------------------------------------------------------------------------------------------------ URLs


@pytest.mark.parametrize(
    "url",
    [
        "ftp://images.example/1.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "javascript://x",
        "//images.example/1.jpg",
        "images.example/1.jpg",
        "1.jpg",
        " https://images.example/1.jpg",
        "http",
        "http:",
        "http:images.example",
        "http://",
        "https:///1.jpg",
        "http://[::1",
        "http://images.example:port/",
        "http://images.example/\ud800",
        "http://localhost/1.jpg",
        "s3:",
        "s3://",
        "s3:///key",
        "s3://photos",
        "s3://photos/",
        "s3://photos?x/key",
        "s3://me@photos/key",
        "s3://photos/\ud800",
        "s3://secrets/key",
    ],
)
def test_an_image_url_that_cannot_or_may_not_be_used_is_not_allowed(url):
    request = one({"image_url": url})
    assert isinstance(request.error, UrlNotAllowed)
    assert str(request.error).startswith("image_url")
    assert request.image_url == url


@pytest.mark.parametrize(
    "url", [IMAGE, "HTTPS://images.example/1.jpg", "http://192.0.2.1:8080", "s3://photos/a b#c?d%"]
)
def test_an_image_url_of_an_accepted_kind_is_kept_as_written(url):
    assert one({"image_url": url}) == Request("m", "m", url, DEFAULT, None, {}, None)


@pytest.mark.parametrize("url", ["s3://photos/key", "ftp://x/", "http://", "https://localhost/", "http://u:p@x/"])
def test_a_refused_callback_url_is_told_at_the_default_or_nowhere(url):
    request = one({"image_url": IMAGE, "callback_url": url})
    assert isinstance(request.error, UrlNotAllowed)
    assert str(request.error).startswith("callback_url")
    assert request.callback_url == DEFAULT
    assert one({"image_url": IMAGE, "callback_url": url}, default=None).callback_url is None


@pytest.mark.parametrize("extra", [{"metadata": []}, {"task": "scene"}, {"image_url": "ftp://x"}, {"image_url": 1}])
def test_a_refused_callback_url_is_never_told_of_another_error_either(extra):
    request = one({"image_url": IMAGE, "callback_url": "https://localhost/", **extra})
    assert request.error is not None
    assert not str(request.error).startswith("callback_url")
    assert request.callback_url == DEFAULT


@pytest.mark.parametrize("value", [None, 7, "", {}])
def test_a_callback_url_of_the_wrong_type_is_told_at_the_default_or_nowhere(value):
    request = one({"image_url": IMAGE, "callback_url": value})
    assert isinstance(request.error, InvalidMessage)
    assert request.callback_url == DEFAULT
    assert one({"image_url": IMAGE, "callback_url": value}, default=None).callback_url is None


@pytest.mark.parametrize("default", [None, ""])
def test_without_any_callback_url_the_request_is_invalid_and_cannot_be_answered(default):
    request = one({"image_url": IMAGE}, default=default)
    assert isinstance(request.error, InvalidMessage)
    assert request.callback_url is None


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@localhost/a?token=secret",
        "ftp://user:secret@host/a?token=secret",
        "http://[secret?token=secret",
        "s3://user:secret@photos/key",
        "s3://photos?token=secret",
    ],
)
def test_error_texts_show_neither_userinfo_nor_query_string(url):
    for name in ("image_url", "callback_url"):
        assert "secret" not in str(one({"image_url": IMAGE, name: url}).error)


@pytest.mark.parametrize("body", ["{", "[]", "[" * 100_000, {"image_url": "s3://photos"}, {"image_url": "http://[/"}])
def test_an_error_keeps_neither_frames_nor_the_body_alive(body):
    error = one(body).error
    assert error is not None
    assert error.__traceback__ is None
    assert error.__context__ is None


def test_an_s3_url_is_split_on_its_first_slash_only():
    assert split_s3_url("s3://b/a/b//c?d#e%20+ ü") == ("b", "a/b//c?d#e%20+ ü")
    assert split_s3_url("S3://b//lead") == ("b", "/lead")


def test_s3_urls_are_told_from_others_by_their_scheme():
    assert is_s3_url("S3://b/k")
    assert not is_s3_url("https://s3.example/b/k")


def test_only_s3_urls_can_be_split():
    with pytest.raises(UrlNotAllowed):
        split_s3_url("http://b/k")


# ------------------------------------------------------------------------------------------- envelopes


def record(key: str = "a.jpg", bucket: str = "photos", event: str = "ObjectCreated:Put") -> dict[str, Any]:
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventName": event,
        "s3": {"bucket": {"name": bucket}, "object": {"key": quote_plus(key), "size": 1}},
    }


def eventbridge(key: str = "a.jpg", kind: str = "Object Created") -> dict[str, Any]:
    return {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": kind,
        "source": "aws.s3",
        "detail": {"bucket": {"name": "photos"}, "object": {"key": key, "size": 1}, "reason": "PutObject"},
    }


def sns(message: object) -> dict[str, Any]:
    text = message if isinstance(message, str) else json.dumps(message)
    return {"Type": "Notification", "MessageId": "sns", "TopicArn": "arn:aws:sns:x:1:t", "Message": text}


def test_a_request_inside_an_sns_notification_is_read_like_any_other():
    body = {"id": "a", "image_url": IMAGE, "callback_url": OWN}
    assert read(sns(body)) == read(body)


@pytest.mark.parametrize("message", ["hello", "[]", "", "NaN", "[" * 100_000])
def test_an_sns_notification_of_something_else_is_one_invalid_message(message):
    request = one(sns(message))
    assert isinstance(request.error, InvalidMessage)
    assert (request.key, request.callback_url) == ("m", DEFAULT)


def test_an_sns_notification_is_opened_once():
    assert isinstance(one(sns(sns({"image_url": IMAGE}))).error, InvalidMessage)


@pytest.mark.parametrize("message", [None, 1, {"image_url": IMAGE}])
def test_an_sns_notification_whose_message_is_no_string_is_invalid(message):
    assert isinstance(one({"Type": "Notification", "Message": message}).error, InvalidMessage)


@pytest.mark.parametrize("wrap", [lambda event: event, sns], ids=["direct", "sns"])
@pytest.mark.parametrize("event", [{"Records": [record("d/a b.jpg")]}, eventbridge("d/a b.jpg")], ids=["s3", "bridge"])
def test_one_s3_record_is_one_request_named_by_the_message(event, wrap):
    assert read(wrap(event)) == [Request("m", "m", "s3://photos/d/a b.jpg", DEFAULT, None, {}, None)]


def test_several_s3_records_are_numbered_from_one():
    requests = read({"Records": [record("a"), record("b"), record("c")]})
    assert [(r.key, r.id, r.image_url) for r in requests] == [
        ("m-1", "m-1", "s3://photos/a"),
        ("m-2", "m-2", "s3://photos/b"),
        ("m-3", "m-3", "s3://photos/c"),
    ]


def test_notification_keys_are_form_decoded_and_eventbridge_keys_are_not():
    event = record()
    event["s3"]["object"]["key"] = "my+photo%2B%231.jpg"
    assert one({"Records": [event]}).image_url == "s3://photos/my photo+#1.jpg"
    assert one(eventbridge("my+photo%2B%231.jpg")).image_url == "s3://photos/my+photo%2B%231.jpg"


def test_a_key_that_is_not_utf8_when_decoded_is_invalid():
    event = record()
    event["s3"]["object"]["key"] = "%ff.jpg"
    assert isinstance(one({"Records": [event]}).error, InvalidMessage)


@pytest.mark.parametrize("wrap", [lambda event: event, sns], ids=["direct", "sns"])
def test_the_test_event_of_s3_leaves_nothing_to_do(wrap):
    assert read(wrap({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "photos", "HostId": "x"})) == []


@pytest.mark.parametrize("records", [[], "x", None, {}, [1] * (MAX_RECORDS + 1)])
def test_no_other_message_without_usable_records_may_be_taken_for_done(records):
    request = one({"Records": records})
    assert isinstance(request.error, InvalidMessage)
    assert request.key == "m"


def test_a_malformed_record_spoils_no_other():
    bad: list[object] = [
        None,
        "x",
        {},
        {"eventSource": "aws:s3"},
        {**record(), "eventSource": "aws:sns"},
        {**record(), "s3": []},
        {**record(), "s3": {"bucket": {"name": "photos"}, "object": {}}},
        {**record(), "s3": {"bucket": {"name": 1}, "object": {"key": "a"}}},
        {**record(), "eventName": None},
        record(key=""),
        record(bucket=""),
        record(bucket="photos/x"),
    ]
    first, *middle, last = read({"Records": [record("a"), *bad, record("b")]})
    assert first.error is None
    assert last.error is None
    assert last.key == f"m-{len(bad) + 2}"
    for request in middle:
        assert isinstance(request.error, InvalidMessage)
        assert request.callback_url == DEFAULT


@pytest.mark.parametrize("name", ["ObjectRemoved:Delete", "ObjectRestore:Completed", "ObjectCreated", ""])
def test_a_notification_of_anything_but_a_creation_is_invalid_and_names_the_object(name):
    request = one({"Records": [record(event=name)]})
    assert isinstance(request.error, InvalidMessage)
    assert request.image_url == "s3://photos/a.jpg"


@pytest.mark.parametrize("kind", ["Object Deleted", "Object Tags Added", None, 1])
def test_an_eventbridge_event_of_anything_but_a_creation_is_invalid(kind):
    assert isinstance(one({**eventbridge(), "detail-type": kind}).error, InvalidMessage)


@pytest.mark.parametrize("detail", [None, [], {}, {"bucket": "photos", "object": {"key": "a"}}])
def test_an_eventbridge_event_without_its_object_is_invalid(detail):
    assert isinstance(one({**eventbridge(), "detail": detail}).error, InvalidMessage)


def test_a_record_in_a_bucket_that_is_not_allowed_is_refused_alone():
    refused, allowed = read({"Records": [record(bucket="secrets"), record()]})
    assert isinstance(refused.error, UrlNotAllowed)
    assert allowed.error is None


def test_s3_events_without_a_default_callback_cannot_be_answered():
    for request in read({"Records": [record(), None]}, default=None):
        assert isinstance(request.error, InvalidMessage)
        assert request.callback_url is None


# ------------------------------------------------------------------------------------------ properties

texts = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
urls = st.sampled_from(["http://", "https://", "s3://", "s3://photos/", "http://[", "https://a@", ""]).flatmap(
    lambda prefix: texts.map(lambda rest: prefix + rest)
)
names = (
    texts
    | st.sampled_from(
        ["id", "image_url", "callback_url", "task", "metadata", "Type", "Message", "Records", "Event", "source"]
    )
    | st.sampled_from(["detail", "detail-type", "eventSource", "eventName", "s3", "bucket", "object", "name", "key"])
)
anything = st.recursive(
    scalars | urls | st.sampled_from(["Notification", "aws:s3", "aws.s3", "Object Created", "ObjectCreated:Put"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6),
    max_leaves=20,
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "id": texts | scalars,
        "image_url": urls | scalars,
        "callback_url": urls | scalars,
        "task": st.just("threat") | scalars,
        "metadata": st.dictionaries(texts, anything, max_size=3) | scalars,
        "Type": st.just("Notification"),
        "Message": anything.map(json.dumps),
    },
)
events = st.builds(
    lambda records: {"Records": records}, st.lists(st.builds(record, texts.filter(str.isascii)) | anything)
)


def must_be_answerable(body: str) -> None:
    worker = WorkerInfo("0.1.0", "threat", None)
    for default in (DEFAULT, None):
        for request in read(body, default):
            answer = json.loads(
                answer_body(
                    request,
                    result={} if request.error is None else None,
                    error=request.error,
                    attempt=1,
                    timings_ms={"queue": 1.0, "total": 2.0},
                    worker=worker,
                )
            )
            assert answer["id"] == request.id
            assert answer["metadata"] == request.metadata
            assert answer["image_url"] == request.image_url
            assert 1 <= len(request.id) <= 256
            assert request.error is not None or (request.callback_url and request.image_url)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_no_text_makes_it_raise_and_every_request_can_be_answered(body):
    must_be_answerable(body)


@settings(max_examples=500, deadline=None)
@given(anything | requests | events | requests.map(sns))
def test_no_json_makes_it_raise_and_every_request_can_be_answered(body):
    must_be_answerable(json.dumps(body))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_key_survives_the_notification_the_url_and_the_split(key):
    for event in ({"Records": [record(key)]}, eventbridge(key)):
        request = one(event)
        assert request.error is None
        assert request.image_url is not None
        assert split_s3_url(request.image_url) == ("photos", key)
