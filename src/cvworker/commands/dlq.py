"""``cvworker dlq``."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from cvworker import aws
from cvworker.errors import StartupError, UnsupportedTask
from cvworker.settings import CommandLine, TextList, how_to_set

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient

    from cvworker.dlq import Choice, DeadLetters, Letter, Report
    from cvworker.messages import Request

SHOWN = 20  # messages in a look, without --limit
PIPE_WIDTH = 200  # characters: of a table that goes to no terminal
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def seconds_in(text: str) -> float:
    """``90``, ``90s``, ``15m``, ``1h``, ``2d`` or ``1w`` in seconds."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?([smhdw]?)", text.strip())):
        raise StartupError(f"older_than ({how_to_set('older_than')}): must be a time such as 90s, 15m, 1h, 2d or 1w")
    return float(match[1]) * UNITS_S[match[2] or "s"]


class Dlq(CommandLine):
    """Look at what failed, or send it back to be tried again.

    look: the messages in the dead-letter queue, without taking them out. They are received, as SQS knows no other
    way, and shown again at the end: this raises their receive count, and hides them from other readers meanwhile (for
    two minutes, should the command be killed).

    redrive: each message is sent to the source queue and, once SQS has it there, deleted from the dead-letter queue;
    one at the wrong moment of an interruption may be in both, none is lost. To SQS it is a new message then: a request
    without an id of its own is answered with another id than before.

    examples: cvworker dlq look --queue-url https://sqs.eu-west-1.amazonaws.com/1234/images

              cvworker dlq redrive --queue-url https://sqs.eu-west-1.amazonaws.com/1234/images --older-than 1h --dry-run
    """

    model_config = SettingsConfigDict(cli_shortcuts={"as-json": "json"})

    action: CliPositionalArg[Literal["look", "redrive"]] = Field(description="What to do")
    queue_url: str | None = Field(None, description="The source queue; its redrive policy names the dead-letter queue")
    dead_letter_url: str | None = Field(None, description="The dead-letter queue; alone, it is asked for its source")
    id: TextList = Field([], description="Only these: a request's id, or a MessageId")
    older_than: str | None = Field(None, description="Only messages sent longer ago, such as 90s, 15m, 1h or 2d")
    limit: int | None = Field(None, ge=1, description=f"So many at most; look: {SHOWN} by default")
    dry_run: bool = Field(False, description="redrive: count what would be moved, and move nothing")
    as_json: bool = Field(False, description="look: one JSON object a line for each message")

    def main(self) -> int:
        from cvworker.dlq import Choice

        choice = Choice(frozenset(self.id), time.time() - seconds_in(self.older_than) if self.older_than else None)
        queue = find(self.queue_url, self.dead_letter_url, to_redrive=self.action == "redrive")
        with interrupts() as stop:
            report = self._look(queue, choice, stop) if self.action == "look" else self._redrive(queue, choice, stop)
        for line in remarks(queue, report, self.id):
            print(line, file=sys.stderr)
        return 1 if report.interrupted or report.refused or report.in_both or set(self.id) - report.found else 0

    def _look(self, queue: DeadLetters, choice: Choice, stop: Callable[[], bool]) -> Report:
        visible, hidden = sizes(queue)
        letters, report = queue.look(choice, self.limit or SHOWN, stop)
        if self.as_json:
            for letter in letters:
                print(json.dumps(row(letter)))
        elif letters:
            print_table(letters)
        elsewhere = f", {hidden:,} hidden (somebody else has them just now)" if hidden else ""
        print(f"{len(letters):,} shown of about {visible:,} in {shown(queue.url)}{elsewhere}", file=sys.stderr)
        return report

    def _redrive(self, queue: DeadLetters, choice: Choice, stop: Callable[[], bool]) -> Report:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        visible = sizes(queue)[0]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("looking at" if self.dry_run else "moving", total=visible)
            report = queue.redrive(
                choice,
                self.limit or sys.maxsize,
                dry_run=self.dry_run,
                progress=lambda report: progress.update(bar, completed=report.seen, total=max(visible, report.seen)),
                stop=stop,
            )
        count, verb = (report.chosen, "would be moved") if self.dry_run else (report.moved, "moved")
        print(f"{count:,} of {report.seen:,} seen {verb} from {shown(queue.url)} to {shown(queue.source_url or '')}")
        return report


def find(queue_url: str | None, dead_letter_url: str | None, *, to_redrive: bool) -> DeadLetters:
    """The dead-letter queue of a source queue, or the source of a dead-letter queue; both may be given.

    Raises StartupError where none can be found, the two do not belong together, or one cannot be used.
    """
    from botocore.config import Config

    from cvworker.dlq import DeadLetters
    from cvworker.sqs.queue import CONNECT_TIMEOUT_S, open_client

    if not (queue_url or dead_letter_url):
        raise StartupError(f"queue_url is not set: give {how_to_set('queue_url')}, or {how_to_set('dead_letter_url')}")
    for url in filter(None, (queue_url, dead_letter_url)):
        if url.rstrip("/").endswith(".fifo"):
            raise StartupError(f"{shown(url)} is a FIFO queue, which cvworker does not serve")
    region = open_client(queue_url or dead_letter_url or "").meta.region_name
    retries: Any = {"mode": "standard", "total_max_attempts": 4}  # a long move should outlive a bad moment
    client = aws.session().client(
        "sqs", region_name=region, config=Config(connect_timeout=CONNECT_TIMEOUT_S, retries=retries)
    )
    if dead_letter_url and to_redrive and not queue_url:
        queue_url = _only_source(client, dead_letter_url)
    source = _attributes(client, queue_url, "queue_url") if queue_url else {}
    dead_letter_arn = str(json.loads(source.get("RedrivePolicy") or "{}").get("deadLetterTargetArn", ""))
    if queue_url and not dead_letter_arn:
        raise StartupError(
            f"queue_url: {shown(queue_url)} has no redrive policy, and so no dead-letter queue; "
            f"if it is one itself, give it with {how_to_set('dead_letter_url')}"
        )
    if not dead_letter_url:  # SQS wants the two in one account and region, so that only the name differs
        dead_letter_url = f"{(queue_url or '').rstrip('/').rpartition('/')[0]}/{dead_letter_arn.rpartition(':')[2]}"
    dead = _attributes(client, dead_letter_url, "dead_letter_url")
    if queue_url and dead["QueueArn"] != dead_letter_arn:
        raise StartupError(
            f"dead_letter_url: {shown(dead_letter_url)} is not the dead-letter queue of {shown(queue_url)}, "
            f"which is {dead_letter_arn.rpartition(':')[2]}"
        )
    if dead.get("RedrivePolicy"):
        raise StartupError(
            f"dead_letter_url: {shown(dead_letter_url)} has itself a dead-letter queue, and each look would bring its "
            f"messages nearer to that; if it is the source queue, give it with {how_to_set('queue_url')}"
        )
    return DeadLetters(client, dead_letter_url, queue_url, source.get("QueueArn"))


def _attributes(client: SQSClient, url: str, name: str) -> dict[str, str]:
    from cvworker.sqs.queue import explain

    try:
        answer = explain(url, lambda: client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"]))
    except StartupError as error:
        raise StartupError(re.sub("^queue_url:", f"{name}:", str(error))) from None
    return {str(key): value for key, value in answer["Attributes"].items()}


def _only_source(client: SQSClient, url: str) -> str:
    from cvworker.sqs.queue import explain

    pages = client.get_paginator("list_dead_letter_source_queues").paginate(QueueUrl=url)
    found = explain(url, lambda: [source for page in pages for source in page.get("queueUrls", [])])
    if len(found) == 1:
        return found[0]
    which = f"several queues ({', '.join(map(shown, found))})" if found else "no queue"
    raise StartupError(f"dead_letter_url: {shown(url)} serves {which}; say where to with {how_to_set('queue_url')}")


def sizes(queue: DeadLetters) -> tuple[int, int]:
    """About how many messages can be received just now, and how many are hidden."""
    attributes = _attributes(queue.client, queue.url, "dead_letter_url")
    return int(attributes["ApproximateNumberOfMessages"]), int(attributes["ApproximateNumberOfMessagesNotVisible"])


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came. The first only says so: the call under way ends, and what it found is known."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def remarks(queue: DeadLetters, report: Report, ids: list[str]) -> Iterator[str]:
    """What there is to say beyond the numbers."""
    from cvworker.dlq import HOLD_S

    if report.of_other_queues:
        yield f"{report.of_other_queues:,} left alone: they came from other queues than {shown(queue.source_url or '')}"
    for failure in report.refused:
        yield f"not moved: {failure.where}: {_clean(failure.message)} [{failure.code}]"
    for message_id in report.in_both:
        yield f"in both queues: {message_id} was sent, but perhaps not deleted"
    for wanted in ids:
        if wanted not in report.found and not report.interrupted:
            yield f"not found: {_clean(wanted)}"
    if report.still_hidden:
        yield f"{report.still_hidden:,} could not be shown again, and stay hidden for up to {HOLD_S} s"
    if report.interrupted:
        yield f"interrupted: what was not moved is in {shown(queue.url)} and can be received again; nothing is lost"


def row(letter: Letter) -> dict[str, Any]:
    """A message for programs. URLs are without their query strings, which may be credentials."""
    return {
        "message_id": letter.message_id,
        "sent_at": datetime.fromtimestamp(letter.sent_at, UTC).isoformat(timespec="milliseconds"),
        "age_s": round(time.time() - letter.sent_at, 1),
        "receives": letter.receives,
        "source_arn": letter.source_arn,
        "requests": [
            {
                "id": request.id,
                "image_url": shown(request.image_url or "") or None,
                "callback_url": _callback(request) or None,
                "task": request.task,
                "problem": _problem(request) or None,
            }
            for request in letter.requests
        ],
    }


def print_table(letters: list[Letter]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("age", "receives", "id", "image", "callback", "problem"):
        table.add_column(name, overflow="fold", no_wrap=name in ("age", "receives"))
    for letter in letters:
        first = (ago(time.time() - letter.sent_at), str(letter.receives))
        for request in letter.requests:
            cells = (*first, request.id, shown(request.image_url or ""), _callback(request), _problem(request))
            table.add_row(*(Text(_clean(cell)) for cell in cells))  # Text: what clients write is no markup
            first = ("", "")
        if not letter.requests:
            table.add_row(*first, letter.message_id, "", "", "an S3 test event: holds no request")
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def ago(seconds: float) -> str:
    """``seconds`` in the two units that say most: 42 s, 3 min 5 s, 2 h 10 min, 6 d 4 h."""
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, seconds = divmod(seconds, size)
        if count >= 1:
            parts.append(f"{count:.0f} {unit}")
    return " ".join(parts[:2]) or "0 s"


def shown(url: str) -> str:
    """A URL without its query string; an s3:// URL has none, and keys may hold any character."""
    from cvworker.messages import is_s3_url
    from cvworker.net import display_url

    return _clean(url) if is_s3_url(url) else display_url(url)


def _callback(request: Request) -> str:
    from cvworker.dlq import WORKERS_DEFAULT

    return "" if request.callback_url == WORKERS_DEFAULT else shown(request.callback_url or "")


def _problem(request: Request) -> str:
    return "" if request.error is None or isinstance(request.error, UnsupportedTask) else str(request.error)


def _clean(text: str) -> str:
    """Text of a client's for a terminal: nothing in it moves the cursor."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
