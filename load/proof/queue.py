"""SQS over a socket, as far as the proof needs it, with SQS's own manner of handing out.

A message goes at once to one of the calls that wait, by chance. Emulators let each waiting call look for itself every
tenth of a second; calls that look in the same rhythm keep their order for many messages, so that one worker of several
gets most of them, and its latencies say nothing of SQS.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

from aiohttp import web

from cvworker.embedded.server import ThreadServer

ACCOUNT = "000000000000"
ARN = f"arn:aws:sqs:us-east-1:{ACCOUNT}:proof"


@dataclass(slots=True)
class Message:
    """One message; ``due`` brings it back when its visibility timeout is over."""

    body: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    sent_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    receives: int = 0
    handle: str = ""
    due: asyncio.TimerHandle | None = None


class FairQueue(ThreadServer):
    """One standard queue in memory, spoken to in SQS's JSON protocol."""

    def __init__(self, *, visibility: int, seed: int) -> None:
        super().__init__()
        self._visibility = visibility
        self._random = Random(seed)  # noqa: S311 - not for secrets
        self._visible: deque[Message] = deque()
        self._held: dict[str, Message] = {}
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def queue_url(self) -> str:
        return f"{self.url}/{ACCOUNT}/proof"

    async def handle(self, request: web.BaseRequest) -> web.Response:
        operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2]
        body = json.loads(await request.read())
        if operation == "ReceiveMessage":
            result = await self._receive(body)
        elif operation in _OPERATIONS:
            result = _OPERATIONS[operation](self, body)
        else:
            return _answer({"__type": "com.amazonaws.sqs#InvalidAction", "message": operation}, 400)
        return _answer(result)

    async def _receive(self, body: dict[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        until = loop.time() + body.get("WaitTimeSeconds", 0)
        while not self._visible and (left := until - loop.time()) > 0:
            call: asyncio.Future[None] = loop.create_future()
            self._waiting.append(call)
            try:
                await asyncio.wait_for(call, left)
            except TimeoutError:
                pass
            finally:
                if call in self._waiting:
                    self._waiting.remove(call)
        count = min(len(self._visible), body.get("MaxNumberOfMessages", 1))
        given = [self._give(body.get("VisibilityTimeout", self._visibility)) for _ in range(count)]
        return {"Messages": given} if given else {}

    def _give(self, seconds: int) -> dict[str, Any]:
        message = self._visible.popleft()
        message.receives += 1
        message.handle = str(uuid.uuid4())
        self._held[message.handle] = message
        self._hide(message, seconds)
        return {
            "MessageId": message.id,
            "ReceiptHandle": message.handle,
            "Body": message.body,
            "MD5OfBody": _md5(message.body),
            "Attributes": {
                "ApproximateReceiveCount": str(message.receives),
                "SentTimestamp": str(message.sent_ms),
            },
        }

    def _hide(self, message: Message, seconds: int) -> None:
        if message.due is not None:
            message.due.cancel()
        message.due = asyncio.get_running_loop().call_later(seconds, self._show, message)

    def _show(self, message: Message) -> None:
        self._held.pop(message.handle, None)
        self._visible.append(message)
        if self._waiting:
            self._waiting.pop(self._random.randrange(len(self._waiting))).set_result(None)

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        message = Message(body["MessageBody"])
        self._show(message)
        return {"MessageId": message.id, "MD5OfMessageBody": _md5(message.body)}

    def _delete_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        for entry in body["Entries"]:
            message = self._held.pop(entry["ReceiptHandle"], None)
            if message is not None and message.due is not None:
                message.due.cancel()
        return {"Successful": [{"Id": entry["Id"]} for entry in body["Entries"]], "Failed": []}

    def _hide_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        for entry in body["Entries"]:
            if (message := self._held.get(entry["ReceiptHandle"])) is not None:
                self._hide(message, int(entry["VisibilityTimeout"]))
        return {"Successful": [{"Id": entry["Id"]} for entry in body["Entries"]], "Failed": []}

    def _attributes(self, _body: dict[str, Any]) -> dict[str, Any]:
        policy = json.dumps({"deadLetterTargetArn": f"{ARN}-dead", "maxReceiveCount": 5})
        counts = {
            "ApproximateNumberOfMessages": str(len(self._visible)),
            "ApproximateNumberOfMessagesNotVisible": str(len(self._held)),
        }
        known = {"QueueArn": ARN, "VisibilityTimeout": str(self._visibility), "RedrivePolicy": policy}
        return {"Attributes": known | counts}


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _answer(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body), status=status, content_type="application/x-amz-json-1.0")


_OPERATIONS = {
    "SendMessage": FairQueue._send,
    "DeleteMessageBatch": FairQueue._delete_batch,
    "ChangeMessageVisibilityBatch": FairQueue._hide_batch,
    "GetQueueAttributes": FairQueue._attributes,
}
