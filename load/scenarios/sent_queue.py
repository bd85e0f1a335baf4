"""A queue with the protocol of SQS that costs its core little, and hands out as SQS does.

``cvworker.bench``'s, with messages that somebody sent. A message goes at once to one of the calls that wait, by chance;
emulators let each waiting call look for itself now and then, and that wait would be measured as the worker's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass
from random import Random
from typing import Any

from cvworker.bench.http import Connection, response
from cvworker.bench.sqs import Queue

LOOK_S = 0.5
"""How often a call that waits looks for messages whose visibility timeout is over."""
TIDY = 1024
"""Messages between two times of forgetting the bodies of those that are gone."""
_KIND = b"application/x-amz-json-1.0"


@dataclass(slots=True, eq=False)
class _Call:
    """A receive that waits."""

    connection: Connection
    body: dict[str, Any]
    until: float


class SentQueue(Queue):
    """One standard queue. Messages are numbered in the order in which they were sent."""

    def __init__(self, seed: int) -> None:
        super().__init__(lambda number: self._sent[number][0], backlog=0)
        self._random = Random(seed)  # noqa: S311 - not for secrets
        self._sent: dict[int, tuple[str, int]] = {}
        self._calls: list[_Call] = []

    @property
    def sent(self) -> int:
        return self.backlog or 0

    def handle(self, connection: Connection, head: bytes, data: bytes) -> None:
        if b"AmazonSQS.SendMessage" not in head:
            super().handle(connection, head, data)
            return
        body = json.loads(data)
        if "Entries" in body:
            done = [{"Id": entry["Id"], **self._take_in(entry["MessageBody"])} for entry in body["Entries"]]
            answer: dict[str, Any] = {"Successful": done, "Failed": []}
        else:
            answer = self._take_in(body["MessageBody"])
        connection.respond(response(json.dumps(answer).encode(), _KIND))
        while self._calls and self._some:
            self._answer(self._calls.pop(self._random.randrange(len(self._calls))))

    @property
    def _some(self) -> bool:
        return bool(self._again) or self._next < self.sent

    def _receive(self, connection: Connection, body: dict[str, Any], until: float) -> None:
        call = _Call(connection, body, until)
        self._calls.append(call)
        self._look(call)

    def _look(self, call: _Call) -> None:
        """Look again and again, until the call has its answer."""
        if call not in self._calls:
            return
        now = time.monotonic()
        self._sweep(now)
        if self._some or now >= call.until:
            self._calls.remove(call)
            self._answer(call)
        else:
            asyncio.get_running_loop().call_later(min(LOOK_S, call.until - now), self._look, call)

    def _answer(self, call: _Call) -> None:
        super()._receive(call.connection, call.body, 0.0)

    def _take_in(self, text: str) -> dict[str, Any]:
        number, self.backlog = self.sent, self.sent + 1
        self._sent[number] = text, time.time_ns() // 1_000_000
        if number % TIDY == 0:
            here = {*self._held, *(each for each, _ in self._again), *range(self._next, self.sent)}
            self._sent = {each: kept for each, kept in self._sent.items() if each in here}
        checksum = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        return {"MessageId": f"message-{number}", "MD5OfMessageBody": checksum}

    def _sent_ms(self, number: int) -> int:
        return self._sent[number][1]
