"""The dead-letter queue: what is in it, without taking it out, and its messages back to the queue where they failed.

SQS has no way to read a message but to receive it. So whatever is looked at is hidden for a moment and shown again at
the end, and each look raises its receive count by one, which does nothing in a queue that has no redrive policy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from cvworker.errors import StartupError, WorkerFailed
from cvworker.messages import Request, parse
from cvworker.send import MAX_BYTES, Failure
from cvworker.sqs.queue import MAX_BATCH, SQS_ERRORS, explain

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient
    from types_boto3_sqs.type_defs import MessageTypeDef

HOLD_S = 120
"""A message seen is hidden so long, unless it is shown again before: also when this process is killed."""
LONG_POLL_S = 1
"""Only a long poll asks all of SQS's servers; a short one may find nothing where there is something."""
NOTHING_NEW = 5
"""Receives in a row of nothing but messages seen before, whose hold has lapsed: that is the end of the queue."""
RETRY_WAITS_S = (0.3, 1.0, 3.0)
"""Before the entries of a batch that SQS failed to do are tried again; whole calls are the client's own to repeat."""
WORKERS_DEFAULT = "http://default.invalid/"
"""Stands for the callback of a request that names none."""

_Sleep = Callable[[float], None]
_ATTRIBUTE_FIELDS = ("DataType", "StringValue", "BinaryValue")


class _AnyBucket:
    def __contains__(self, _name: object) -> bool:
        return True


class Letter:
    """A message in the dead-letter queue."""

    def __init__(self, message: MessageTypeDef) -> None:
        attributes: Any = message.get("Attributes", {})
        self.message = message
        self.message_id = message["MessageId"]
        self.receives = int(attributes.get("ApproximateReceiveCount", 0))
        """In all the queues it has been in, this look included."""
        self.sent_at = int(attributes.get("SentTimestamp", 0)) / 1000
        self.source_arn: str | None = attributes.get("DeadLetterQueueSourceArn")

    @cached_property
    def requests(self) -> list[Request]:
        """What a worker would read in it, whatever its own module (so their task is not checked) and buckets."""
        return parse(
            self.message["Body"],
            message_id=self.message_id,
            task="",
            default_callback=WORKERS_DEFAULT,
            check_url=lambda _url: None,
            allowed_buckets=_AnyBucket(),
        )

    @property
    def ids(self) -> set[str]:
        """What it may be called: its MessageId, or the id of a request in it."""
        return {self.message_id, *(request.id for request in self.requests)}

    @property
    def attributes(self) -> dict[str, dict[str, Any]]:
        given: Any = self.message.get("MessageAttributes", {})
        return {name: {key: value[key] for key in _ATTRIBUTE_FIELDS if key in value} for name, value in given.items()}

    @property
    def size(self) -> int:
        """In bytes, as SQS counts."""
        parts = [part for name, value in self.attributes.items() for part in (name, *value.values())]
        texts = [self.message["Body"], *parts]
        return sum(len(text if isinstance(text, bytes) else text.encode()) for text in texts)

    def entry(self, number: int) -> dict[str, Any]:
        """The same message once more, in a batch: body, attributes and trace unchanged."""
        entry = {"Id": str(number), "MessageBody": self.message["Body"], "MessageAttributes": self.attributes}
        if trace := self.message.get("Attributes", {}).get("AWSTraceHeader"):
            entry["MessageSystemAttributes"] = {"AWSTraceHeader": {"DataType": "String", "StringValue": trace}}
        return entry


_Batch = list[Letter]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which messages are meant: those with one of the ids (if any), sent before then (if given)."""

    ids: frozenset[str] = frozenset()
    sent_before: float | None = None

    def takes(self, letter: Letter) -> bool:
        old_enough = self.sent_before is None or letter.sent_at <= self.sent_before
        return old_enough and (not self.ids or not self.ids.isdisjoint(letter.ids))


@dataclass(slots=True)
class Report:
    """What a look or a redrive came to."""

    seen: int = 0
    chosen: int = 0
    moved: int = 0
    of_other_queues: int = 0
    refused: list[Failure] = field(default_factory=list)
    """Those that SQS did not take for the source queue; they stay where they are."""
    in_both: list[str] = field(default_factory=list)
    """MessageIds of those that were sent, but perhaps not deleted."""
    still_hidden: int = 0
    interrupted: bool = False
    found: set[str] = field(default_factory=set)
    """Those of the ids asked for that a message had."""


class DeadLetters:
    """A dead-letter queue and the queue that its messages came from: None where that is not known, only to look.

    Messages that came from another queue are left alone, where SQS says so and ``source_arn`` is known.
    """

    def __init__(
        self, client: SQSClient, url: str, source_url: str | None = None, source_arn: str | None = None
    ) -> None:
        self.client = client
        self.url = url
        self.source_url = source_url
        self.source_arn = source_arn

    def look(self, choice: Choice, limit: int, stop: Callable[[], bool] = lambda: False) -> tuple[list[Letter], Report]:
        """Up to ``limit`` messages, the oldest of them first; all that were seen can be received again afterwards.

        Raises StartupError if nothing can be received.
        """
        report, letters = Report(), list[Letter]()
        with _Held(self, report, time.sleep) as held:
            for chosen in held.walk(choice, limit, stop):
                letters += chosen
        return sorted(letters, key=lambda letter: letter.sent_at), report

    def redrive(
        self,
        choice: Choice,
        limit: int = sys.maxsize,
        *,
        dry_run: bool = False,
        progress: Callable[[Report], object] = lambda _report: None,
        stop: Callable[[], bool] = lambda: False,
        sleep: _Sleep = time.sleep,
    ) -> Report:
        """Move messages back to the source queue, ten at a time: sent there first, and deleted here once SQS has them.

        Nothing is lost wherever this ends: at worst a message is in both queues, when it ends between the two calls
        or an answer of SQS is lost on the way. To SQS a message moved is a new one: its MessageId and its age begin
        anew. One that fails again while this runs is not moved twice. ``stop`` is asked between batches.

        Raises StartupError if nothing can be moved, WorkerFailed if SQS gives out after some were.
        """
        report = Report()
        try:
            with _Held(self, report, sleep) as held:
                for chosen in held.walk(choice, limit, stop):
                    if not dry_run:
                        held.move(chosen)
                    progress(report)
        except (StartupError, WorkerFailed) as error:
            if not (report.moved or report.in_both):
                raise StartupError(str(error)) from None
            both = f", {len(report.in_both)} may be in both queues" if report.in_both else ""
            raise WorkerFailed(f"{error} ({report.moved:,} were moved before that{both}; none is lost)") from None
        return report


class _Held:
    """The messages seen, hidden until the end of this context: what was not deleted is then shown again."""

    def __init__(self, queue: DeadLetters, report: Report, sleep: _Sleep) -> None:
        self._queue = queue
        self._report = report
        self._sleep = sleep
        self._receipts: dict[str, str] = {}
        self._moved: set[str] = set()  # MessageIds, those they had here and those they have now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        receipts = list(self._receipts.values())
        for part in (receipts[start : start + MAX_BATCH] for start in range(0, len(receipts), MAX_BATCH)):
            entries: Any = [{"Id": str(n), "ReceiptHandle": r, "VisibilityTimeout": 0} for n, r in enumerate(part)]
            try:  # an entry that is refused is not hidden by this process any more
                self._queue.client.change_message_visibility_batch(QueueUrl=self._queue.url, Entries=entries)
            except SQS_ERRORS:
                self._report.still_hidden += len(part)

    def walk(self, choice: Choice, limit: int, stop: Callable[[], bool]) -> Iterator[list[Letter]]:
        """Those of the messages that are meant, as they are received, each once and never more than ``limit``."""
        report, nothing_new, ours_arn = self._report, 0, self._queue.source_arn
        while nothing_new < NOTHING_NEW:
            if (room := min(MAX_BATCH, limit - report.chosen)) < 1:
                return
            if stop():
                report.interrupted = True
                return
            messages = self._receive(room)
            if not messages:
                return
            new = [Letter(m) for m in messages if self._is_new(m["MessageId"])]
            nothing_new = 0 if new else nothing_new + 1
            self._receipts.update({message["MessageId"]: message["ReceiptHandle"] for message in messages})
            ours = [letter for letter in new if None in (ours_arn, letter.source_arn) or ours_arn == letter.source_arn]
            chosen = [letter for letter in ours if choice.takes(letter)]
            report.seen += len(new)
            report.of_other_queues += len(new) - len(ours)
            report.chosen += len(chosen)
            report.found.update(*(choice.ids & letter.ids for letter in chosen))
            yield chosen

    def _is_new(self, message_id: str) -> bool:
        return message_id not in self._receipts and message_id not in self._moved

    def move(self, letters: list[Letter]) -> None:
        """Send, and delete what was taken, in as few calls as SQS's limit on their size allows."""
        batch: list[Letter] = []
        for letter in letters:
            if sum(each.size for each in batch) + letter.size > MAX_BYTES:
                self._settle("take", self._send, batch, self._delete)
                batch = []
            batch.append(letter)
        self._settle("take", self._send, batch, self._delete)

    def _receive(self, at_most: int) -> list[MessageTypeDef]:
        answer = explain(
            self._queue.url,
            lambda: self._queue.client.receive_message(
                QueueUrl=self._queue.url,
                MaxNumberOfMessages=at_most,
                WaitTimeSeconds=LONG_POLL_S,
                VisibilityTimeout=HOLD_S,
                MessageSystemAttributeNames=["All"],
                MessageAttributeNames=["All"],
            ),
        )
        return answer.get("Messages", [])

    def _send(self, letters: list[Letter]) -> Any:
        entries: Any = [letter.entry(n) for n, letter in enumerate(letters)]
        answer = self._queue.client.send_message_batch(QueueUrl=self._queue.source_url or "", Entries=entries)
        self._moved.update(taken["MessageId"] for taken in answer.get("Successful", []))
        return answer

    def _delete(self, letters: list[Letter]) -> None:
        def call(left: list[Letter]) -> Any:
            receipts = [self._receipts[letter.message_id] for letter in left]
            entries: Any = [{"Id": str(n), "ReceiptHandle": receipt} for n, receipt in enumerate(receipts)]
            return self._queue.client.delete_message_batch(QueueUrl=self._queue.url, Entries=entries)

        def deleted(done: list[Letter]) -> None:
            for letter in done:
                del self._receipts[letter.message_id]
                self._report.in_both.remove(letter.message_id)
            self._report.moved += len(done)

        self._moved.update(letter.message_id for letter in letters)
        self._report.in_both += [letter.message_id for letter in letters]
        self._settle("delete", call, letters, deleted)

    def _settle(
        self, what: str, call: Callable[[_Batch], Any], letters: _Batch, done: Callable[[_Batch], None]
    ) -> None:
        """Make a batch call, again with the entries that failed, until each is done or SQS calls it our own fault."""
        code = ""
        for wait in (0.0, *RETRY_WAITS_S):
            if not letters:
                return
            self._sleep(wait)
            try:
                failed = {int(entry["Id"]): entry for entry in call(letters).get("Failed", [])}
            except SQS_ERRORS as error:
                raise WorkerFailed(f"SQS cannot {what} messages: {' '.join(str(error).split())}") from None
            for n, entry in failed.items():
                code = entry.get("Code", "")
                if entry["SenderFault"] and what == "take":
                    self._report.refused.append(Failure(letters[n].message_id, code, entry.get("Message", "")))
            done([letter for n, letter in enumerate(letters) if n not in failed])
            letters = [letters[n] for n, entry in failed.items() if not entry["SenderFault"]]
        if letters:
            raise WorkerFailed(f"SQS did not {what} {len(letters)} messages in {1 + len(RETRY_WAITS_S)} tries: {code}")
