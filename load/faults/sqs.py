"""A small SQS in memory that keeps a ledger and fails by seed.

Its own, and not a proxy before an emulator, because only the queue itself knows when a message expired, who held it,
and whether a call that failed has had its effect.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import re
import time
import uuid
from collections import deque
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from load.faults.chance import Chance
from load.faults.ledger import DUPLICATE, STALE, UNDELIVERED, Kind, Ledger

ACCOUNT = "000000000000"
LOOK_S = 0.02
"""A long poll looks again this often."""
SLOW_S = 2.0
GHOSTS = 200
"""Messages deleted last, of which one may come back."""
ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "ServiceUnavailable"),
    "throttle": (400, "RequestThrottled"),
}


@dataclass(slots=True)
class Message:
    """One message; ``visible_at`` is on the monotonic clock and counts while it is in flight."""

    id: str
    body: str
    sent_ms: int
    receives: int = 0
    handle: str = ""
    visible_at: float = 0.0
    in_flight: bool = False
    gone: bool = False


class Sqs:
    """One standard queue with a redrive policy, spoken to in SQS's JSON protocol.

    The worker that calls is known by its access key. An old handle deletes nothing and says that it did, as SQS may.
    """

    def __init__(self, ledger: Ledger, chance: Chance, *, visibility: int, max_receives: int) -> None:
        self._ledger = ledger
        self._chance = chance
        self.visibility = visibility
        self.max_receives = max_receives
        self.down_until = 0.0
        """Until then, on the monotonic clock, every call fails."""
        self.open = 0
        """Messages neither deleted nor dead."""
        self._ready: deque[Message] = deque()
        self._hidden: list[tuple[float, str, Message]] = []
        self._handles: dict[str, Message] = {}
        self._deleted: deque[Message] = deque(maxlen=GHOSTS)
        self._operations = {
            "ReceiveMessage": self._receive,
            "DeleteMessageBatch": self._delete_batch,
            "ChangeMessageVisibilityBatch": self._hide_batch,
            "GetQueueAttributes": self._attributes,
        }

    def send(self, body: str, note: str = "") -> str:
        """Put a message into the queue; its MessageId."""
        message = Message(str(uuid.uuid4()), body, int(time.time() * 1000))
        self._ready.append(message)
        self.open += 1
        self._ledger.note(Kind.SENT, message.id, note=note)
        return message.id

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One HTTP request, with or without the fault that is its lot."""
        operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2]
        found = re.search(r"Credential=([^/]+)/", request.headers.get("Authorization", ""))
        worker = found[1] if found else "?"
        try:
            body = json.loads(await request.read())
        except ConnectionError:  # its worker was killed in the middle of the call, which nobody hears any more
            return _answer({}, 400)
        self._ledger.note(Kind.CALL, worker=worker, note=operation)
        fault = ""
        if operation != "GetQueueAttributes":  # at start, where failing is right, and for the metrics
            fault = self._chance.fault("receive" if operation == "ReceiveMessage" else "batch", operation)
        if self._ledger.clock() < self.down_until:
            fault = "503"
        if fault in ERRORS:
            status, code = ERRORS[fault]
            return _answer({"__type": f"com.amazonaws.sqs#{code}", "message": "by seed"}, status)
        if fault == "slow":
            await asyncio.sleep(SLOW_S * self._chance.of("slow", len(self._ledger.events)).random())
        result: dict[str, Any] = {}
        if fault != "reset":
            result = await self._operations[operation](worker, body, fault)
        if fault in ("reset", "reset after") and request.transport is not None:
            request.transport.abort()
        return _answer(result)

    def sweep(self) -> None:
        """Make visible what is due."""
        now = self._ledger.clock()
        while self._hidden and self._hidden[0][0] <= now:
            due, _, message = heapq.heappop(self._hidden)
            if message.in_flight and message.visible_at == due:
                message.in_flight = False
                self._ready.append(message)
                self._ledger.note(Kind.EXPIRED, message.id)

    async def _receive(self, worker: str, body: dict[str, Any], fault: str) -> dict[str, Any]:
        until = self._ledger.clock() + body.get("WaitTimeSeconds", 0)
        seconds = body.get("VisibilityTimeout", self.visibility)
        while True:
            self.sweep()
            taken = self._take(body.get("MaxNumberOfMessages", 1))
            again = self._again(fault)
            if taken or again or self._ledger.clock() >= until:
                break
            await asyncio.sleep(LOOK_S)
        cut = UNDELIVERED if fault == "reset after" else ""
        for message in taken:
            self._give(message, worker, seconds, cut)
        if again is not None and again not in taken and len(taken) < body.get("MaxNumberOfMessages", 1):
            self._give(again, worker, seconds, DUPLICATE)
            taken.append(again)
        return {"Messages": [_shown(message) for message in taken]} if taken else {}

    def _take(self, at_most: int) -> list[Message]:
        taken: list[Message] = []
        while self._ready and len(taken) < at_most:
            message = self._ready.popleft()
            if message.gone or message.in_flight:  # deleted, or delivered again, while it was visible
                continue
            if message.receives >= self.max_receives:
                message.gone = True
                self.open -= 1
                self._ledger.note(Kind.DEAD, message.id)
                continue
            taken.append(message)
        return taken

    def _again(self, fault: str) -> Message | None:
        """A message to deliver once more than it should be."""
        if fault not in ("duplicate", "ghost"):
            return None
        source = [*self._deleted] if fault == "ghost" else [m for _, _, m in self._hidden if m.in_flight]
        source = [m for m in source if 0 < m.receives < self.max_receives]
        return self._chance.of(fault, len(self._ledger.events)).choice(source) if source else None

    def _give(self, message: Message, worker: str, seconds: int, note: str) -> None:
        if message.gone:
            message.gone = False
            self.open += 1
            self._deleted.remove(message)
        message.receives += 1
        message.handle = str(uuid.uuid4())
        self._handles[message.handle] = message
        self._until(message, seconds)
        self._ledger.note(Kind.RECEIVED, message.id, worker, count=message.receives, seconds=seconds, note=note)

    def _until(self, message: Message, seconds: int) -> None:
        message.in_flight, message.visible_at = True, self._ledger.clock() + seconds
        heapq.heappush(self._hidden, (message.visible_at, message.handle, message))

    async def _delete_batch(self, worker: str, body: dict[str, Any], fault: str) -> dict[str, Any]:
        return self._each(body, fault, lambda entry: self._delete(worker, entry))

    async def _hide_batch(self, worker: str, body: dict[str, Any], fault: str) -> dict[str, Any]:
        return self._each(body, fault, lambda entry: self._hide(worker, entry))

    def _each(self, body: dict[str, Any], fault: str, act: Any) -> dict[str, Any]:
        self.sweep()
        done: list[dict[str, Any]] = []
        failed: list[dict[str, Any]] = []
        chance = self._chance.of("partial", len(self._ledger.events))
        for entry in body["Entries"]:
            if fault == "partial" and chance.random() < 0.5:
                code, sender = "InternalError", False
            else:
                code, sender = act(entry), True
            if code:
                failed.append({"Id": entry["Id"], "Code": code, "SenderFault": sender, "Message": "by seed"})
            else:
                done.append({"Id": entry["Id"]})
        return {"Successful": done, "Failed": failed}

    def _delete(self, worker: str, entry: dict[str, Any]) -> str:
        message = self._handles.get(entry["ReceiptHandle"])
        if message is None:
            return "ReceiptHandleIsInvalid"
        if message.gone:
            return ""
        if message.handle != entry["ReceiptHandle"]:
            self._ledger.note(Kind.DELETED, message.id, worker, note=STALE)
            return ""
        message.gone, message.in_flight = True, False
        self.open -= 1
        if len(self._deleted) == GHOSTS:
            self._handles.pop(self._deleted[0].handle, None)
        self._deleted.append(message)
        self._ledger.note(Kind.DELETED, message.id, worker)
        return ""

    def _hide(self, worker: str, entry: dict[str, Any]) -> str:
        message = self._handles.get(entry["ReceiptHandle"])
        if message is None or message.handle != entry["ReceiptHandle"]:
            return "ReceiptHandleIsInvalid"
        if message.gone or not message.in_flight:
            return "MessageNotInflight"
        seconds = int(entry["VisibilityTimeout"])
        self._ledger.note(Kind.HIDDEN, message.id, worker, seconds=seconds)
        self._until(message, seconds)
        if not seconds:
            self.sweep()
        return ""

    async def _attributes(self, worker: str, body: dict[str, Any], fault: str) -> dict[str, Any]:
        arn = f"arn:aws:sqs:us-east-1:{ACCOUNT}:"
        policy = json.dumps({"deadLetterTargetArn": f"{arn}dead", "maxReceiveCount": self.max_receives})
        values = {"QueueArn": f"{arn}images", "VisibilityTimeout": str(self.visibility), "RedrivePolicy": policy}
        return {"Attributes": values}


def _shown(message: Message) -> dict[str, Any]:
    return {
        "MessageId": message.id,
        "ReceiptHandle": message.handle,
        "Body": message.body,
        "MD5OfBody": hashlib.md5(message.body.encode(), usedforsecurity=False).hexdigest(),
        "Attributes": {"ApproximateReceiveCount": str(message.receives), "SentTimestamp": str(message.sent_ms)},
    }


def _answer(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body), status=status, content_type="application/x-amz-json-1.0")
