"""Requests onto the queue: read from a file, stdin or an S3 prefix, checked as the worker would, sent ten a call."""

from __future__ import annotations

import csv
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

from botocore.exceptions import BotoCoreError, ClientError

from cvworker import aws
from cvworker.errors import StartupError, WorkerFailed
from cvworker.messages import parse
from cvworker.sqs.queue import explain

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_sqs import SQSClient

MAX_ENTRIES = 10
"""Messages in one call."""
MAX_BYTES = 1024 * 1024
"""Of one message, and of all messages of one call together."""
ATTEMPTS = 8
"""Calls for one message before it is given up, with up to 40 s of waiting between them."""
FIRST_WAIT, LONGEST_WAIT = 0.3, 20.0  # seconds
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
CSV_COLUMNS = ("image_url", "callback_url", "id", "task", "metadata")
METADATA_PREFIX = "metadata."
"""Begins the CSV columns that are one member of ``metadata`` each."""


class Request(dict[str, Any]):
    """One message body; ``where`` is the place it came from ("orders.csv, line 7"), for what is said about it."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def read_requests(
    source: str | None,
    *,
    template: Mapping[str, Any] | None = None,
    stdin: IO[str] | None = None,
    s3: S3Client | None = None,
    every_key: bool = False,
) -> Iterator[Request]:
    """Read the requests in ``source``.

    ``source`` is a file (a CSV with a header row if it ends in ``.csv``; else each line is a request as JSON or the
    URL of an image), ``-`` or None for such lines on ``stdin``, ``s3://bucket/prefix`` for the images below it
    (``every_key``: whatever their suffix), or the ``http(s)://`` URL of one image. ``template`` fills in what a
    request lacks, in ``metadata`` member by member.

    Raises :class:`StartupError`, naming the line, at the first request that the worker would call invalid. A file is
    checked from end to end before this returns, so that it is sent whole or not at all; what can be read only once
    raises while it is iterated.
    """
    given = dict(template or {})
    if source is None or source == "-":
        return _complete(read_lines(stdin or sys.stdin, "stdin"), given)
    if source.startswith("s3://"):
        return _complete(list_images(source, s3, every_key), given)
    if source.startswith(("http://", "https://")):
        return _complete(iter([Request({"image_url": source}, source)]), given)
    path = Path(source)
    if path.is_file() or path.is_dir() or not path.exists():  # but not a pipe, such as a shell's <(...)
        deque(_complete(_file(path), given), maxlen=0)
    return _complete(_file(path), given)


def _file(path: Path) -> Iterator[Request]:
    read, newline = (read_csv, "") if path.suffix.lower() == ".csv" else (read_lines, None)
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:  # sig: spreadsheets write a byte order mark
            yield from read(file, str(path))
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror or error}") from None


def read_lines(lines: Iterable[str], name: str) -> Iterator[Request]:
    """A request for each line that is not empty: a JSON object, or the URL of an image. Raises StartupError."""
    try:
        for number, line in enumerate(lines, 1):
            if text := line.strip():
                where = f"{name}, line {number}"
                yield Request(_object(text, where) if text[0] in '{["' else {"image_url": text}, where)
    except UnicodeDecodeError:
        _refuse(name, "not UTF-8 text")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        _refuse(where, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        _refuse(where, f"not JSON: {error}")
    if not isinstance(values, dict):
        _refuse(where, "must be a JSON object or the URL of an image")
    return values


def read_csv(lines: Iterable[str], name: str) -> Iterator[Request]:
    """A request for each row of a CSV with a header; an empty cell is absent. Raises StartupError."""
    rows = csv.DictReader(lines, restkey="", restval="", strict=True)
    try:
        for column in rows.fieldnames or ():
            if column not in CSV_COLUMNS and not column.startswith(METADATA_PREFIX):
                known = f"{', '.join(CSV_COLUMNS)} or {METADATA_PREFIX}<name>"
                _refuse(f"{name}, line 1", f"the column {column!r} is none of {known}")
        for row in rows:
            where = f"{name}, line {rows.line_num}"
            if "" in row:
                _refuse(where, "has more cells than the header row")
            filled = {column: cell.strip() for column, cell in row.items() if cell.strip()}  # an empty cell is absent
            if filled:
                metadata = _object(filled.get("metadata", "{}"), f"{where}, metadata")
                for column in filled.keys() - set(CSV_COLUMNS):
                    metadata[column.removeprefix(METADATA_PREFIX)] = filled.pop(column)
                yield Request({**filled, "metadata": metadata}, where)
    except (csv.Error, UnicodeDecodeError) as error:
        _refuse(f"{name}, line {rows.line_num + 1}", f"not CSV in UTF-8: {error}")


def list_images(source: str, s3: S3Client | None = None, every_key: bool = False) -> Iterator[Request]:
    """A request for each image below ``s3://bucket/prefix``, in the order of the keys. Raises StartupError."""
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    try:
        pages = (
            (s3 or aws.session().client("s3")).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        for entry in (entry for page in pages for entry in page.get("Contents", [])):
            url = f"s3://{bucket}/{entry['Key']}"
            if not url.endswith("/") and (every_key or url.lower().endswith(IMAGE_SUFFIXES)):  # "/": a console's folder
                yield Request({"image_url": url}, url)
    except (BotoCoreError, ClientError) as error:
        raise StartupError(f"cannot list {source}: {' '.join(str(error).split())}") from None


def _complete(requests: Iterator[Request], template: Mapping[str, Any]) -> Iterator[Request]:
    """Fill in the template, and refuse what the worker would answer as invalid, by the worker's own rules."""
    for request in requests:
        for name, value in template.items():
            own = request.setdefault(name, value)
            if isinstance(own, dict) and isinstance(value, Mapping):
                request[name] = {**value, **own}
        if "image_url" not in request:
            _refuse(request.where, "image_url is missing")
        [parsed] = parse(
            _body(request, request.where, MAX_BYTES),
            message_id="-",
            # What is the worker's own to know is taken as it comes: its module, its default callback, its buckets.
            task=str(request.get("task")),
            default_callback="http://default.invalid/",
            check_url=lambda url: None,
            allowed_buckets={str(request["image_url"])[len("s3://") :].partition("/")[0]},
        )
        if parsed.error is not None:
            _refuse(request.where, str(parsed.error))
        yield request


def _body(request: Mapping[str, Any], where: str, limit: int) -> str:
    """The message: JSON in ASCII, as SQS refuses some of Unicode; so its length is its size in bytes."""
    try:
        body = json.dumps(request, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        _refuse(where, f"cannot be sent as JSON: {error}")
    if len(body) > limit:
        _refuse(where, f"the message is {len(body):,} bytes long, and a message may be {limit:,} at most")
    return body


def _refuse(where: str, what: str) -> NoReturn:
    raise StartupError(f"{where}: {what}") from None


class Failure(NamedTuple):
    """A request that SQS did not take: where it came from, and SQS's own code and words."""

    where: str
    code: str
    message: str


@dataclass(slots=True)
class Sent:
    """What became of the requests; ``retries`` counts the times that one message was sent again."""

    sent: int = 0
    retries: int = 0
    failures: list[Failure] = field(default_factory=list)


_Message = tuple[str, str]  # where it came from, and the body
_Progress = Callable[[int], object]
_Wait = Callable[[float], None]


def send(
    client: SQSClient,
    queue_url: str,
    requests: Iterable[Mapping[str, Any]],
    *,
    progress: Callable[[int], object] = lambda taken: None,
    sleep: Callable[[float], None] = time.sleep,
    jitter: Callable[[], float] = random.random,
) -> Sent:
    """Send each request as one message; after each call ``progress`` is told how many more SQS has taken.

    What fails for SQS's own reasons is sent again after a while, what is the message's own fault is reported. SQS
    delivers at least once: when an answer of SQS is lost on the way, the messages of that call are there twice.

    Raises :class:`StartupError` when nothing can be sent or a request is bad (all before it are then sent), and
    :class:`WorkerFailed` when SQS cannot be used any more. The text says how many were sent.
    """
    sent = Sent()
    try:
        for batch in _batches(requests, _size_limit(client, queue_url)):
            _send_batch(client, queue_url, batch, sent, progress, lambda wait: sleep(wait * (0.5 + jitter() / 2)))
    except (StartupError, WorkerFailed) as error:
        if sent.sent:
            raise type(error)(f"{error} ({sent.sent:,} requests were sent before that)") from None
        raise StartupError(str(error)) from None
    return sent


def _size_limit(client: SQSClient, queue_url: str) -> int:
    """The longest message this queue takes; asking also shows whether there is a queue to send to."""
    if queue_url.endswith(".fifo"):
        raise StartupError(f"queue_url: {queue_url} is a FIFO queue, which cvworker does not serve")
    names: Any = ["MaximumMessageSize"]
    try:
        answer = explain(queue_url, lambda: client.get_queue_attributes(QueueUrl=queue_url, AttributeNames=names))
    except StartupError as error:
        if "[AccessDenied" in str(error):  # a sender may have leave to send and nothing else
            return MAX_BYTES
        raise
    return int(answer["Attributes"].get("MaximumMessageSize", MAX_BYTES))


def _batches(requests: Iterable[Mapping[str, Any]], limit: int) -> Iterator[list[_Message]]:
    """As many messages at a time as one call takes; all that came before a bad request, then its error."""
    batch: list[_Message] = []
    try:
        for number, request in enumerate(requests, 1):
            where = getattr(request, "where", f"request {number}")
            body = _body(request, where, limit)
            if len(batch) == MAX_ENTRIES or sum(len(body) for _, body in batch) + len(body) > MAX_BYTES:
                yield batch
                batch = []
            batch.append((where, body))
    except StartupError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _send_batch(
    client: SQSClient, queue_url: str, batch: list[_Message], sent: Sent, progress: _Progress, wait: _Wait
) -> None:
    """Send until SQS has taken each message or called it bad; adds to ``sent``."""
    for attempt in range(ATTEMPTS):
        if attempt:
            wait(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))
            sent.retries += len(batch)
        failed = _call(client, queue_url, [body for _, body in batch])
        if taken := len(batch) - len(failed):
            sent.sent += taken
            progress(taken)
        refused = [(batch[int(entry["Id"])], entry) for entry in failed]
        sent.failures += [
            Failure(where, entry["Code"], entry.get("Message", ""))
            for (where, _), entry in refused
            if entry["SenderFault"]
        ]
        batch = [message for message, entry in refused if not entry["SenderFault"]]
        if not batch:
            return
    raise WorkerFailed(f"SQS did not take {batch[0][0]} in {ATTEMPTS} tries: {failed[-1]['Code']}")


def _call(client: SQSClient, queue_url: str, bodies: list[str]) -> list[Any]:
    """One call: the entries that SQS did not take, which are all of them where it cannot be asked just now."""
    entries: Any = [{"Id": str(index), "MessageBody": body} for index, body in enumerate(bodies)]
    try:
        return list(client.send_message_batch(QueueUrl=queue_url, Entries=entries).get("Failed", []))
    except (ClientError, BotoCoreError) as error:
        response: Any = getattr(error, "response", {})
        code = response.get("Error", {}).get("Code", type(error).__name__)
        if response and response["ResponseMetadata"]["HTTPStatusCode"] < 500 and "hrottl" not in code:
            raise StartupError(f"queue_url: SQS refuses to take messages for {queue_url}: {error}") from None
        return [{**entry, "SenderFault": False, "Code": code} for entry in entries]
