"""A queue with the protocol of SQS that never runs out, and counts what is done to it.

Messages are made when they are received: what is measured is the worker, and a backlog would only cost memory. It does
what workers rely on: receipt handles, visibility timeouts, redelivery of what expired, checksums. It is as fast as it
can be made in Python, because a queue that waits measures nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cvworker.bench.http import Connection, response

VISIBILITY_S = 30
MAX_RECEIVES = 5
EMPTY_LOOK_S, ARRIVAL_LOOK_S = 0.05, 0.002
"""An empty queue looks again after so long, for as long as the poll waits; oftener where arrivals are timed."""
_KIND = b"application/x-amz-json-1.0"


@dataclass(slots=True)
class Counts:
    """What happened to messages so far."""

    receive_calls: int = 0
    receives: int = 0
    delete_calls: int = 0
    deletes: int = 0
    visibility_changes: int = 0
    expired: int = 0
    """Deliveries whose visibility timeout passed before they were deleted."""


@dataclass(slots=True)
class Held:
    """A message in flight."""

    until: float
    receives: int


@dataclass(slots=True)
class Queue:
    """The queue. ``body`` makes the body of a message from its number; ``backlog`` is how many there are, or None.

    ``every`` is the pace of arrivals, in seconds from one to the next; with 0 all are there from the beginning.
    """

    body: Callable[[int], str]
    backlog: int | None = None
    every: float = 0.0
    closed: bool = False
    """Nothing new is given out any more; what expires still comes again."""
    most_held: int = 0
    _began: float = 0.0
    counts: Counts = field(default_factory=Counts)
    _next: int = 0
    _held: dict[int, Held] = field(default_factory=dict)
    _due: list[tuple[float, int]] = field(default_factory=list)
    _again: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def given(self) -> int:
        """Messages given out so far, each counted once."""
        return self._next

    def handle(self, connection: Connection, head: bytes, data: bytes) -> None:
        """One request of the protocol."""
        at = head.find(b"AmazonSQS.") + 10
        operation = head[at:].split(b"\r", 1)[0].strip()
        body = json.loads(data)
        if operation == b"ReceiveMessage":
            self._receive(connection, body, time.monotonic() + body.get("WaitTimeSeconds", 0))
        elif act := _OPERATIONS.get(operation):
            connection.respond(response(json.dumps(act(self, body)).encode(), _KIND))
        else:
            error = {"__type": "com.amazonaws.sqs#InvalidAction", "message": operation.decode()}
            connection.respond(response(json.dumps(error).encode(), _KIND, 400))

    def _receive(self, connection: Connection, body: dict[str, Any], until: float) -> None:
        now = time.monotonic()
        self._sweep(now)
        seconds = body.get("VisibilityTimeout", VISIBILITY_S)
        messages = [self._give(taken, now + seconds) for taken in self._take(body.get("MaxNumberOfMessages", 1))]
        if not messages and now < until:
            look = ARRIVAL_LOOK_S if self.every else EMPTY_LOOK_S
            asyncio.get_running_loop().call_later(look, self._receive, connection, body, until)
            return
        self.counts.receive_calls += 1
        self.counts.receives += len(messages)
        self.most_held = max(self.most_held, self.held)
        answer = '{"Messages":[' + ",".join(messages) + "]}" if messages else "{}"
        connection.respond(response(answer.encode(), _KIND))

    def _take(self, at_most: int) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        while self._again and len(taken) < at_most:
            taken.append(self._again.popleft())
        fresh = 0 if self.closed else at_most - len(taken)
        if self.backlog is not None:
            fresh = min(fresh, self.backlog - self._next)
        if self.every:
            self._began = self._began or time.monotonic()
            fresh = max(0, min(fresh, int((time.monotonic() - self._began) / self.every) - self._next))
        taken += [(number, 0) for number in range(self._next, self._next + fresh)]
        self._next += fresh
        return taken

    def _give(self, taken: tuple[int, int], until: float) -> str:
        """Count a message as in flight; as the protocol shows it."""
        number, receives = taken[0], taken[1] + 1
        self._held[number] = Held(until, receives)
        heapq.heappush(self._due, (until, number))
        body = self.body(number)
        checksum = hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()
        return (
            f'{{"MessageId":"message-{number}","ReceiptHandle":"{number}.{receives}","MD5OfBody":"{checksum}",'
            f'"Body":{json.dumps(body)},"Attributes":{{"ApproximateReceiveCount":"{receives}",'
            f'"SentTimestamp":"{self._sent_ms(number)}"}}}}'
        )

    def _sent_ms(self, number: int) -> int:
        """When a message was sent, in milliseconds since the epoch: just now, as it is made when it is received."""
        return time.time_ns() // 1_000_000

    def _sweep(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            until, number = heapq.heappop(self._due)
            held = self._held.get(number)
            if held is None or held.until != until:  # deleted, or given another time
                continue
            del self._held[number]
            self._again.append((number, held.receives))
            if until:  # 0 is a message that was given back
                self.counts.expired += 1

    def _find(self, receipt: str) -> tuple[int, Held | None]:
        """The message that is in flight by this very receipt."""
        number, _, receives = receipt.partition(".")
        held = self._held.get(int(number))
        return int(number), held if held is not None and str(held.receives) == receives else None

    def _delete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.counts.delete_calls += 1
        number, held = self._find(body["ReceiptHandle"])
        if held is not None:
            del self._held[number]
            self.counts.deletes += 1
        return {}

    def _delete_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        self.counts.delete_calls += 1
        for entry in body["Entries"]:
            number, held = self._find(entry["ReceiptHandle"])
            if held is not None:
                del self._held[number]
                self.counts.deletes += 1
        return {"Successful": [{"Id": entry["Id"]} for entry in body["Entries"]], "Failed": []}

    def _hide(self, body: dict[str, Any]) -> dict[str, Any]:
        number, held = self._find(body["ReceiptHandle"])
        if held is not None:
            seconds = int(body["VisibilityTimeout"])
            held.until = time.monotonic() + seconds if seconds else 0.0
            heapq.heappush(self._due, (held.until, number))
            self.counts.visibility_changes += 1
        return {}

    def _hide_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        for entry in body["Entries"]:
            self._hide(entry)
        return {"Successful": [{"Id": entry["Id"]} for entry in body["Entries"]], "Failed": []}

    def _attributes(self, body: dict[str, Any]) -> dict[str, Any]:
        policy = json.dumps({"deadLetterTargetArn": f"{_ARN}dead", "maxReceiveCount": MAX_RECEIVES})
        waiting = 100_000 if self.backlog is None else self.backlog - self._next
        values = {
            "QueueArn": f"{_ARN}images",
            "VisibilityTimeout": str(VISIBILITY_S),
            "RedrivePolicy": policy,
            "ApproximateNumberOfMessages": str(waiting + len(self._again)),
            "ApproximateNumberOfMessagesNotVisible": str(self.held),
        }
        return {"Attributes": values}

    def _url(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"QueueUrl": f"/{ACCOUNT}/{body['QueueName']}"}


ACCOUNT = "000000000000"
_ARN = f"arn:aws:sqs:us-east-1:{ACCOUNT}:"
_OPERATIONS: dict[bytes, Callable[[Queue, dict[str, Any]], dict[str, Any]]] = {
    b"DeleteMessage": Queue._delete,
    b"DeleteMessageBatch": Queue._delete_batch,
    b"ChangeMessageVisibility": Queue._hide,
    b"ChangeMessageVisibilityBatch": Queue._hide_batch,
    b"GetQueueAttributes": Queue._attributes,
    b"GetQueueUrl": Queue._url,
}
