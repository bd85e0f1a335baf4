"""The dead-letter queue: what is in it, without taking it out, and its messages back to the queue where they failed.

SQS has no way to read a message but to receive it. So whatever is looked at is hidden for a moment and shown again at
the end, and each look raises its receive count by one, which does nothing in a queue that has no redrive policy.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NotConnected

from cvworker.errors import StartupError, UnsupportedTask, WorkerFailed
from cvworker.messages import Request, parse
from cvworker.net import display_url
from cvworker.send import MAX_BYTES
from cvworker.settings import how_to_set
from cvworker.sqs.queue import MAX_BATCH, SQS_ERRORS, explain, open_client

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient
    from types_boto3_sqs.type_defs import MessageTypeDef

HOLD_S = 120
"""A message seen is hidden so long, unless it is shown again before: also when this process is killed."""
LONG_POLL_S = 1
"""Only a long poll asks all of SQS's servers; a short one may find nothing where there is something."""
NOTHING_NEW = 5
"""Receives in a row of messages seen before, whose hold has lapsed: so the end has been reached."""
RETRY_WAITS_S = (0.3, 1.0, 3.0)

T = TypeVar("T")
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_ENTRY_FIELDS = ("DataType", "StringValue", "BinaryValue")
_NO_CALLBACK = "http://default.invalid/"


class _Any:
    def __contains__(self, _bucket: object) -> bool:
        return True


class Letter:
    """A message in the dead-letter queue. ``requests`` are what the worker would read in it."""

    def __init__(self, message: MessageTypeDef) -> None:
        attributes: Any = message.get("Attributes", {})
        self.message = message
        self.message_id = message["MessageId"]
        self.receives = int(attributes.get("ApproximateReceiveCount", 0))
        """In all queues it has been in, this look included."""
        self.sent_at = int(attributes.get("SentTimestamp", 0)) / 1000
        self.source_arn: str | None = attributes.get("DeadLetterQueueSourceArn")
        self.requests = [_as_sent(request) for request in self._parsed()]

    def _parsed(self) -> list[Request]:
        # What is the worker's own to know is taken as it comes: its module, its default callback, its buckets.
        return parse(
            self.message["Body"],
            message_id=self.message_id,
            task="",
            default_callback=_NO_CALLBACK,
            check_url=lambda _url: None,
            allowed_buckets=_Any(),
        )

    @property
    def ids(self) -> set[str]:
        """What it may be called: its MessageId, or the client's own id of a request in it."""
        return {self.message_id, *(request.id for request in self.requests)}


def _as_sent(request: Request) -> Request:
    return Request(
        request.key,
        request.id,
        request.image_url,
        None if request.callback_url == _NO_CALLBACK else request.callback_url,
        request.task,
        request.metadata,
        None if isinstance(request.error, UnsupportedTask) else request.error,
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """Which messages are meant: all of these ids (if any), sent before then (if given)."""

    ids: frozenset[str] = frozenset()
    sent_before: float | None = None

    def takes(self, letter: Letter) -> bool:
        by_id = not self.ids or not self.ids.isdisjoint(letter.ids)
        return by_id and (self.sent_before is None or letter.sent_at <= self.sent_before)


class Refused(NamedTuple):
    """A message that SQS did not take for the source queue, in SQS's own words; it stays where it is."""

    message_id: str
    code: str
    message: str


@dataclass(slots=True)
class Report:
    """What a look or a redrive came to. ``moved`` counts what would be moved, in a dry run."""

    looked_at: int = 0
    moved: int = 0
    of_other_queues: int = 0
    refused: list[Refused] = field(default_factory=list)
    in_both: list[str] = field(default_factory=list)
    still_hidden: int = 0
    interrupted: bool = False
    found: set[str] = field(default_factory=set)
    """All that the chosen messages are called, to say which id was not found."""


class DeadLetters:
    """A dead-letter queue and the queue that its messages came from, which is None where only looking is meant."""

    def __init__(self, client: SQSClient, url: str, source_url: str | None, source_arn: str | None) -> None:
        self.client = client
        self.url = url
        self.source_url = source_url
        self.source_arn = source_arn

    @classmethod
    def find(cls, queue_url: str | None, dead_letter_url: str | None, *, to_redrive: bool) -> Self:
        """Find the one queue by the other; both may be given.

        Raises:
            StartupError: neither is given, the two are not connected, or one cannot be used.
        """
        for url in (queue_url, dead_letter_url):
            if url and url.rstrip("/").endswith(".fifo"):
                raise StartupError(f"{display_url(url)} is a FIFO queue, which cvworker does not serve")
        if queue_url is None and dead_letter_url is None:
            raise StartupError(f"queue_url is not set: give {how_to_set('queue_url')}, or {_HOW_DEAD}")
        client = open_client(queue_url or dead_letter_url or "")
        if dead_letter_url is None:
            assert queue_url is not None  # noqa: S101 - for the type checker
            dead_letter_url = _dead_letter_url(client, queue_url)
        elif queue_url is None and to_redrive:
            queue_url = _only_source(client, dead_letter_url)
        source_arn = _attributes(client, queue_url, "queue_url")["QueueArn"] if queue_url else None
        if _policy(_attributes(client, dead_letter_url, "dead_letter_url")):
            raise StartupError(
                f"dead_letter_url: {display_url(dead_letter_url)} has a dead-letter queue of its own, so that each look "
                f"would bring its messages nearer to that one; if it is the source queue, give it as --queue-url"
            )
        return cls(client, dead_letter_url, queue_url, source_arn)

    def sizes(self) -> tuple[int, int]:
        """About how many messages can be received now, and how many are hidden."""
        attributes = _attributes(self.client, self.url, "dead_letter_url")
        names = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")
        visible, hidden = (int(attributes.get(name, 0)) for name in names)
        return visible, hidden

    def look(
        self, choice: Choice, limit: int, *, stop: Callable[[], bool] = lambda: False
    ) -> tuple[list[Letter], Report]:
        """Up to ``limit`` of the messages, oldest first; all that were seen can be received again afterwards."""
        report, letters = Report(), list[Letter]()
        with _Held(self, report, time.sleep) as held:
            while len(letters) < limit:
                if stop():
                    report.interrupted = True
                    break
                new = held.receive(min(MAX_BATCH, limit - len(letters)))
                if new is None:
                    break
                letters += self._chosen(new, choice, report)
        return sorted(letters, key=lambda letter: letter.sent_at), report

    def redrive(
        self,
        choice: Choice,
        limit: int | None = None,
        *,
        dry_run: bool = False,
        progress: Callable[[Report], object] = lambda _report: None,
        stop: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Report:
        """Move messages back to the source queue, ten at a time: sent there first, and deleted here once SQS has them.

        Nothing is lost wherever this ends: at worst a message is in both queues, when it ends between the two calls
        or an answer of SQS is lost on the way. To SQS a message moved is a new one: its MessageId and its age begin
        anew. One that fails again while this runs is not moved twice. ``stop`` is asked between calls.

        Raises:
            StartupError: nothing can be moved.
            WorkerFailed: SQS cannot be used any more; the text says how many were moved.
        """
        report = Report()
        try:
            with _Held(self, report, sleep) as held:
                mover = _Mover(self, held, report, sleep)
                while limit is None or report.moved < limit:
                    if stop():
                        report.interrupted = True
                        break
                    new = held.receive(MAX_BATCH if limit is None else min(MAX_BATCH, limit - report.moved))
                    if new is None:
                        break
                    chosen = self._chosen(new, choice, report)
                    if dry_run:
                        report.moved += len(chosen)
                    else:
                        mover.move(chosen)
                    progress(report)
        except (StartupError, WorkerFailed) as error:
            if not (report.moved or report.in_both):
                raise
            both = f", {len(report.in_both)} are in both queues" if report.in_both else ""
            raise WorkerFailed(f"{error} ({report.moved:,} were moved before that{both}; nothing is lost)") from None
        return report

    def _chosen(self, letters: list[Letter], choice: Choice, report: Report) -> list[Letter]:
        """Those that are meant; never one that came from another source queue, where that is known."""
        report.looked_at += len(letters)
        ours = [each for each in letters if not self.source_arn or each.source_arn in (None, self.source_arn)]
        report.of_other_queues += len(letters) - len(ours)
        chosen = [letter for letter in ours if choice.takes(letter)]
        report.found.update(*(letter.ids for letter in chosen))
        return chosen


class _Held:
    """The messages seen, hidden until the end of this context: all that were not deleted are then shown again."""

    def __init__(self, queue: DeadLetters, report: Report, sleep: Callable[[float], None]) -> None:
        self._queue = queue
        self._report = report
        self._sleep = sleep
        self._receipts: dict[str, str] = {}
        self._finished: set[str] = set()
        self._nothing_new = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        receipts = list(self._receipts.values())
        for start in range(0, len(receipts), MAX_BATCH):
            entries: Any = [
                {"Id": str(n), "ReceiptHandle": receipt, "VisibilityTimeout": 0}
                for n, receipt in enumerate(receipts[start : start + MAX_BATCH])
            ]
            try:
                # An entry refused is not hidden by this look any more: its hold has lapsed.
                self._queue.client.change_message_visibility_batch(QueueUrl=self._queue.url, Entries=entries)
            except SQS_ERRORS:
                self._report.still_hidden += len(entries)

    def receive(self, at_most: int) -> list[Letter] | None:
        """Some messages not seen before; None when there are no more."""
        answer = explain(self._queue.url, lambda: _patiently(lambda: self._receive(at_most), self._sleep))
        messages: list[MessageTypeDef] = answer.get("Messages", [])
        new = [each for each in messages if each["MessageId"] not in self._receipts.keys() | self._finished]
        self._receipts.update({each["MessageId"]: each["ReceiptHandle"] for each in messages})
        self._nothing_new = 0 if new else self._nothing_new + 1
        return None if not messages or self._nothing_new >= NOTHING_NEW else [Letter(each) for each in new]

    def receipt(self, letter: Letter) -> str:
        return self._receipts[letter.message_id]

    def deleted(self, letter: Letter) -> None:
        self._finished.add(letter.message_id)
        del self._receipts[letter.message_id]

    def moved_as(self, message_id: str) -> None:
        """The id that a moved message has now: it is left alone when it comes here again."""
        self._finished.add(message_id)

    def _receive(self, at_most: int) -> Any:
        return self._queue.client.receive_message(
            QueueUrl=self._queue.url,
            MaxNumberOfMessages=at_most,
            WaitTimeSeconds=LONG_POLL_S,
            VisibilityTimeout=HOLD_S,
            MessageSystemAttributeNames=["All"],
            MessageAttributeNames=["All"],
        )


class _Mover:
    """Sends messages to the source queue and deletes from the dead-letter queue those that it has taken."""

    def __init__(self, queue: DeadLetters, held: _Held, report: Report, sleep: Callable[[float], None]) -> None:
        self._queue = queue
        self._held = held
        self._report = report
        self._sleep = sleep

    def move(self, letters: list[Letter]) -> None:
        for part in _calls(letters):
            self._report.refused += self._until_settled("take", self._send, part, self._delete)

    def _delete(self, letters: list[Letter]) -> None:
        left = {letter.message_id for letter in letters}

        def deleted(done: list[Letter]) -> None:
            for letter in done:
                self._held.deleted(letter)
                left.discard(letter.message_id)
            self._report.moved += len(done)

        try:
            self._until_settled("delete", self._delete_call, letters, deleted)
        finally:
            self._report.in_both += sorted(left)

    def _until_settled(
        self,
        what: str,
        call: Callable[[list[Letter]], Any],
        letters: list[Letter],
        done: Callable[[list[Letter]], None],
    ) -> list[Refused]:
        """Repeat a batch call with the entries that failed, until SQS has done each or called it bad (returned)."""
        refused: list[Refused] = []
        code = ""
        for wait in (0.0, *RETRY_WAITS_S):
            if wait:
                self._sleep(wait)
            failed: dict[int, Any] = {}
            try:
                failed = {int(entry["Id"]): entry for entry in call(letters).get("Failed", [])}
            except SQS_ERRORS as error:
                if not _may_pass(error):
                    raise WorkerFailed(f"SQS refuses to {what} messages: {' '.join(str(error).split())}") from None
                code = type(error).__name__
                continue
            if succeeded := [letter for n, letter in enumerate(letters) if n not in failed]:
                done(succeeded)
            for n, entry in failed.items():
                code = entry.get("Code", "")
                if entry.get("SenderFault"):
                    refused.append(Refused(letters[n].message_id, code, entry.get("Message", "")))
            letters = [letters[n] for n, entry in failed.items() if not entry.get("SenderFault")]
            if not letters:
                return refused
        raise WorkerFailed(f"SQS did not {what} {len(letters)} messages in {len(RETRY_WAITS_S) + 1} tries: {code}")

    def _send(self, letters: list[Letter]) -> Any:
        entries: Any = [_entry(n, letter.message) for n, letter in enumerate(letters)]
        answer = self._queue.client.send_message_batch(QueueUrl=self._queue.source_url or "", Entries=entries)
        for sent in answer.get("Successful", []):
            self._held.moved_as(sent["MessageId"])
        return answer

    def _delete_call(self, letters: list[Letter]) -> Any:
        entries: Any = [{"Id": str(n), "ReceiptHandle": self._held.receipt(each)} for n, each in enumerate(letters)]
        return self._queue.client.delete_message_batch(QueueUrl=self._queue.url, Entries=entries)


_HOW_DEAD = how_to_set("dead_letter_url")


def _attributes(client: SQSClient, url: str, name: str) -> dict[str, str]:
    try:
        answer = explain(url, lambda: client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"]))
    except StartupError as error:
        raise StartupError(re.sub("^queue_url:", f"{name}:", str(error))) from None
    return {str(key): value for key, value in answer["Attributes"].items()}


def _policy(attributes: dict[str, str]) -> dict[str, Any]:
    return dict(json.loads(attributes.get("RedrivePolicy") or "{}"))


def _dead_letter_url(client: SQSClient, url: str) -> str:
    """The URL of a queue's dead-letter queue: SQS wants both in one account and region, so only the name differs."""
    arn = _policy(_attributes(client, url, "queue_url")).get("deadLetterTargetArn")
    if arn is None:
        raise StartupError(
            f"queue_url: {display_url(url)} has no dead-letter queue (no redrive policy); "
            f"if it is the dead-letter queue itself, give it with {_HOW_DEAD}"
        )
    return f"{url.rstrip('/').rpartition('/')[0]}/{arn.rpartition(':')[2]}"


def _only_source(client: SQSClient, url: str) -> str:
    pages = client.get_paginator("list_dead_letter_source_queues")
    found = explain(url, lambda: [each for page in pages.paginate(QueueUrl=url) for each in page["queueUrls"]])
    if len(found) != 1:
        which = f"several queues: {', '.join(map(display_url, found))}" if found else "no queue"
        raise StartupError(f"dead_letter_url: {display_url(url)} serves {which}; say where to with --queue-url")
    return found[0]


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, ClientError):
        answer: Any = error.response
        code, status = answer.get("Error", {}).get("Code", ""), answer["ResponseMetadata"]["HTTPStatusCode"]
        return bool(status >= 500 or "hrottl" in code)
    return isinstance(error, HTTPClientError | NotConnected)


def _patiently(call: Callable[[], T], sleep: Callable[[float], None]) -> T:
    for wait in RETRY_WAITS_S:
        try:
            return call()
        except SQS_ERRORS as error:
            if not _may_pass(error):
                raise
        sleep(wait)
    return call()


def _entry(number: int, message: MessageTypeDef) -> dict[str, Any]:
    """The same message once more: body, attributes and trace."""
    entry: dict[str, Any] = {"Id": str(number), "MessageBody": message["Body"]}
    if attributes := message.get("MessageAttributes"):
        entry["MessageAttributes"] = {
            name: {key: value for key, value in attribute.items() if key in _ENTRY_FIELDS}
            for name, attribute in attributes.items()
        }
    if trace := message.get("Attributes", {}).get("AWSTraceHeader"):
        entry["MessageSystemAttributes"] = {"AWSTraceHeader": {"DataType": "String", "StringValue": trace}}
    return entry
