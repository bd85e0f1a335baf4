"""What a message asks for: the request, and the envelopes that other services put around one.

Pure functions, no I/O. Whatever a body holds, :func:`parse` returns; what is wrong with a request is kept in its
``error``, because the client is told so at the callback like any other answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote_plus, urlsplit

from cvworker.errors import InvalidMessage, JobError, UnsupportedTask, UrlNotAllowed

MAX_ID_LENGTH = 256  # characters
MAX_METADATA_DEPTH = 100  # levels: encoding the answer recurses once a level, on a stack of a depth not known here
MAX_RECORDS = 1000  # S3 sends one; a body of 1 MiB could otherwise become half a million callbacks
MAX_DIGITS = 4300  # of an integer: what Python converts by default, and can therefore echo

_BUCKET = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to look at and where to tell the answer.

    ``key`` names the job and is the ``webhook-id`` of its callback: the SQS MessageId, with ``-1``, ``-2``, …
    appended where the message holds several records. ``id`` is the client's own, else the key. ``image_url`` and
    ``task`` are None where there is no usable one to echo. ``callback_url`` is the request's own, else the default;
    None means that nobody can be told. ``error`` is what was found wrong while parsing: the request is answered with
    it instead of being worked on.
    """

    key: str
    id: str
    image_url: str | None
    callback_url: str | None
    task: str | None
    metadata: dict[str, Any]
    error: JobError | None


def parse(
    body: str,
    *,
    message_id: str,
    task: str,
    default_callback: str | None,
    check_url: Callable[[str], object],
    allowed_buckets: Container[str],
) -> list[Request]:
    """The requests in one message body: one, or one for each record of an S3 event. Never raises.

    Only ``s3:TestEvent`` gives an empty list, and only then may a message be deleted without a callback. ``task`` is
    the module's name. ``check_url`` is called with each http(s) URL of a request, resolves no names, and raises
    UrlNotAllowed with a text that shows neither query string nor userinfo, since the client is sent it.
    ``default_callback`` is the operator's own and is not checked.
    """
    rules = _Rules(task, default_callback or None, check_url, allowed_buckets)
    try:
        content = _unwrap(_load(body, "the message body"))
        records = None if _is_request(content) else _s3_records(content)
    except InvalidMessage as error:
        # A new one, as the one raised holds the body by its traceback and context.
        return [rules.event(message_id, None, InvalidMessage(str(error)))]
    if records is None:
        return [rules.request(message_id, content)]
    several = len(records) > 1
    return [rules.event(f"{message_id}-{n}" if several else message_id, *record) for n, record in enumerate(records, 1)]


def sns_attributes(body: str) -> dict[str, str]:
    """The message attributes that an SNS notification carries inside its envelope; none where it is something else.

    Only with raw delivery does SNS make them the SQS message's own.
    """
    if '"MessageAttributes"' not in body:
        return {}
    try:
        content = _load(body, "the message body")
    except InvalidMessage:
        return {}
    given = content.get("MessageAttributes")
    if content.get("Type") != "Notification" or not isinstance(given, dict):
        return {}
    values = {name: each.get("Value") for name, each in given.items() if isinstance(each, dict)}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def is_s3_url(url: str) -> bool:
    """Whether ``url`` is to be read with :func:`split_s3_url` rather than fetched over HTTP."""
    return url[:5].lower() == "s3://"


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; raises UrlNotAllowed where either is missing or cannot exist.

    The key is everything after the first slash, as it is: S3 allows ``#``, ``?``, ``%`` and spaces in keys, so this
    is not a URL in the sense of RFC 3986.
    """
    bucket, _, key = url[5:].partition("/")
    if not is_s3_url(url) or not _BUCKET.fullmatch(bucket):
        raise UrlNotAllowed("names no valid bucket after s3://")
    if not key:
        raise UrlNotAllowed("names no key in the bucket")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UrlNotAllowed("holds characters that are not Unicode text") from None
    return bucket, key


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # echoed, it would become Infinity, which is not JSON
        raise ValueError("a number is out of range")
    return number


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number has too many digits")
    return int(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer)


def _load(text: str, what: str) -> dict[str, Any]:
    try:
        content = _DECODER.decode(text)
    except RecursionError:
        raise InvalidMessage(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise InvalidMessage(f"{what} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidMessage(f"{what} must be a JSON object")
    return content


def _is_request(content: dict[str, Any]) -> bool:
    """Whether this is a request, whatever else is in it: no envelope has these fields, and unknown ones are ignored."""
    return "image_url" in content or "callback_url" in content


def _unwrap(content: dict[str, Any]) -> dict[str, Any]:
    """What an SNS notification carries, if this is one. Topics do not nest, so once is enough."""
    message = content.get("Message")
    if content.get("Type") == "Notification" and isinstance(message, str) and not _is_request(content):
        return _load(message, "the SNS notification's Message")
    return content


_Record = tuple[str | None, InvalidMessage | None]  # the s3:// URL of the object, and why it is not one to look at


def _s3_records(content: dict[str, Any]) -> list[_Record] | None:
    """The records of an S3 event; None where the content is something else.

    Raises InvalidMessage for an event without records, or with more than S3 can have sent.
    """
    if content.get("Event") == "s3:TestEvent":  # sent when notifications are set up; names no object
        return []
    if content.get("source") == "aws.s3":
        created = content.get("detail-type") == "Object Created"
        return [_record(content.get("detail"), created=created, form_encoded=False)]
    records = content.get("Records")
    if not isinstance(records, list):
        return None
    if not 1 <= len(records) <= MAX_RECORDS:
        raise InvalidMessage(f"Records must hold 1 to {MAX_RECORDS} records")
    return [_notification_record(record) for record in records]


def _notification_record(record: object) -> _Record:
    if not isinstance(record, dict) or record.get("eventSource") != "aws:s3":
        return None, InvalidMessage("the record is not an S3 event: eventSource must be 'aws:s3'")
    created = str(record.get("eventName")).startswith("ObjectCreated:")
    return _record(record.get("s3"), created=created, form_encoded=True)


def _record(place: object, *, created: bool, form_encoded: bool) -> _Record:
    """The object at ``place``, where the bucket's name and the object's key stand alike in every kind of S3 event."""
    bucket, key = _member(place, "bucket", "name"), _member(place, "object", "key")
    if not _BUCKET.fullmatch(bucket):  # a slash in it would end it early, and the URL would name another object
        return None, InvalidMessage("the S3 record has no valid bucket.name")
    if not key:
        return None, InvalidMessage("the S3 record has no object.key")
    if form_encoded:
        try:
            key = unquote_plus(key, errors="strict")
        except UnicodeError:
            return None, InvalidMessage("the S3 record's object.key is not form-encoded UTF-8")
    url = f"s3://{bucket}/{key}"
    return url, None if created else InvalidMessage("the S3 event is not about an object that was created")


def _member(place: object, outer: str, inner: str) -> str:
    part = place.get(outer) if isinstance(place, dict) else None
    value = part.get(inner) if isinstance(part, dict) else None
    return value if isinstance(value, str) else ""


class _Fields:
    """Reads the fields of one request, and keeps what is wrong with the first invalid one."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.error: InvalidMessage | None = None

    def invalid(self, text: str) -> None:
        self.error = self.error or InvalidMessage(text)

    def text(self, name: str, *, missing: str | None = None, longest: int | None = None) -> str | None:
        """The string; None where it is absent or not usable. Absence is an error only with a text for it."""
        value = self._values.get(name)
        if name not in self._values:
            if missing is not None:
                self.invalid(missing)
        elif not isinstance(value, str):
            self.invalid(f"{name} must be a string")
        elif not value:
            self.invalid(f"{name} is empty")
        elif longest is not None and len(value) > longest:
            self.invalid(f"{name} is longer than {longest} characters")
        else:
            return value
        return None

    def object(self, name: str) -> dict[str, Any]:
        """The object, empty where it is absent or not usable."""
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            self.invalid(f"{name} must be an object")
        elif _nests_deeper(value, MAX_METADATA_DEPTH):
            self.invalid(f"{name} is nested more than {MAX_METADATA_DEPTH} levels deep")
        else:
            return value
        return {}


def _nests_deeper(value: dict[str, Any], levels: int) -> bool:
    level: list[Any] = [value]  # level by level, as recursion is what this guards
    for _ in range(levels):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Rules:
    """What this worker accepts."""

    task: str
    default_callback: str | None
    check_url: Callable[[str], object]
    allowed_buckets: Container[str]

    def event(self, key: str, image_url: str | None, error: InvalidMessage | None) -> Request:
        """The request for something that has no fields of its own; only the default callback can be told."""
        if error is not None:
            return Request(key, key, image_url, self.default_callback, None, {}, error)
        return self.request(key, {"image_url": image_url})

    def request(self, key: str, values: dict[str, Any]) -> Request:
        """One request with its first error, in the order types, task, image URL, callback URL.

        What is usable is echoed even then. A callback URL that is refused is never spoken to, whatever else is wrong:
        the default is told instead.
        """
        fields = _Fields(values)
        image_url = fields.text("image_url", missing="image_url is missing")
        no_callback = None if self.default_callback else "callback_url is missing, and this worker has no default"
        own_callback = fields.text("callback_url", missing=no_callback)
        own_id = fields.text("id", longest=MAX_ID_LENGTH)
        task = fields.text("task")
        metadata = fields.object("metadata")

        refused = self._refusal("callback_url", own_callback, s3=False) if own_callback else None
        callback_url = self.default_callback if refused else own_callback or self.default_callback
        error: JobError | None = fields.error
        if error is None and task is not None and task != self.task:
            error = UnsupportedTask(f"task must be {self.task!r}, the module that serves this queue")
        if error is None and image_url is not None:
            error = self._refusal("image_url", image_url, s3=True)
        return Request(key, own_id or key, image_url, callback_url, task, metadata, error or refused)

    def _refusal(self, name: str, url: str, *, s3: bool) -> UrlNotAllowed | None:
        """Why ``url`` may not be used. The texts here never show it, as it may hold credentials."""
        try:
            if s3 and is_s3_url(url):
                bucket, _ = split_s3_url(url)
                allowed = bucket in self.allowed_buckets
                return None if allowed else UrlNotAllowed(f"{name}: bucket {bucket!r} is not in allowed_buckets")
            if not url[:8].lower().startswith(("http://", "https://")):
                schemes = "http://, https:// or s3://" if s3 else "http:// or https://"
                return UrlNotAllowed(f"{name} must begin with {schemes}")
            url.encode()  # lone surrogates, which JSON can spell and HTTP cannot carry
            if not urlsplit(url).hostname:
                return UrlNotAllowed(f"{name} names no host")
            self.check_url(url)
        except UrlNotAllowed as error:
            return UrlNotAllowed(f"{name}: {error}")
        except ValueError:
            return UrlNotAllowed(f"{name} is malformed")
        return None
