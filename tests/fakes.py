"""What unit tests put in the place of time, of SQS, and of jobs that came a long way."""

from __future__ import annotations

import datetime
import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from aiohttp import web
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cvworker.clock import Clock
from cvworker.errors import JobError
from cvworker.job import Job
from cvworker.messages import Request
from cvworker.sqs.acks import Acks
from cvworker.sqs.custody import Custody
from cvworker.sqs.heartbeat import Heartbeat
from cvworker.sqs.leases import Lease, LeaseTable
from cvworker.sqs.outcome import Outcome
from cvworker.sqs.queue import Queue

EPOCH = 1_700_000_000.0
CALLBACK = "http://client.test/answers"


class StepClock(Clock):
    """Time that passes when a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return EPOCH + self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def eventually(condition: Callable[[], Any], what: str = "", timeout: float = 20.0) -> Any:
    """What ``condition`` gives once it is true: for real threads and sockets only."""
    until = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {timeout:g} s: {what or condition}"
        time.sleep(0.005)
    return found


@asynccontextmanager
async def serving(handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """The URL of an HTTP server on 127.0.0.1, on the running loop."""
    runner = web.ServerRunner(web.Server(handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def throttled(operation: str = "Any") -> ClientError:
    return ClientError({"Error": {"Code": "ThrottlingException", "Message": "Rate exceeded"}}, operation)


@dataclass
class Stored:
    """A message as SQS has it."""

    id: str
    body: str
    sent_at: float
    visible_at: float
    receives: int = 0
    receipt: str = ""


Fault = Exception | dict[int, str]
"""What goes wrong with a call: all of it, or the entries at some places, each with a code."""


class FakeSqs:
    """One standard queue behind the client's own methods, its visibility timeouts ticking with ``clock``.

    As in SQS, only the newest receipt handle holds a message; a delete with an older one succeeds and deletes
    nothing; a handle no longer good for an extension is refused with ``ReceiptHandleIsInvalid`` (gone, or received
    again) or ``MessageNotInflight`` (visible).
    """

    def __init__(self, clock: StepClock, *, visibility: int = 30, max_receives: int | None = None) -> None:
        self.clock = clock
        # A client with a proxy is one whose calls nobody else makes.
        config = SimpleNamespace(signature_version="v4", client_cert=None, proxies={"https": "http://proxy"})
        self.meta = SimpleNamespace(config=config, endpoint_url="https://sqs.eu-west-1.amazonaws.com")
        self.visibility = visibility
        self.max_receives = max_receives
        self.messages: dict[str, Stored] = {}
        self.dead: list[str] = []
        self.calls: list[tuple[str, list[dict[str, Any]]]] = []
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.during: Callable[[str], None] = lambda _operation: None
        """Called in the middle of each settling call, with its name."""
        self.poll_scale = 0.05
        """How long a second of a long poll takes."""
        self.polling = 0
        self.most_polling = 0
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)

    def send(self, body: str = f'{{"image_url": "http://host/a.jpg", "callback_url": "{CALLBACK}"}}') -> str:
        with self._changed:
            message_id = f"m{next(self._numbers)}"
            self.messages[message_id] = Stored(message_id, body, self.clock.wall(), self.clock.now)
            self._changed.notify_all()
            return message_id

    def hidden_for(self, message_id: str) -> float:
        """Seconds until the message is delivered again."""
        return self.messages[message_id].visible_at - self.clock.now

    def entries(self, operation: str) -> list[list[dict[str, Any]]]:
        """What each call of one operation was given."""
        return [entries for name, entries in self.calls if name == operation]

    # the client's methods

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        attributes = {"VisibilityTimeout": str(self.visibility), "QueueArn": "arn:aws:sqs:x:1:images"}
        if self.max_receives is not None:
            attributes["RedrivePolicy"] = f'{{"maxReceiveCount": "{self.max_receives}", "deadLetterTargetArn": "arn"}}'
        return {"Attributes": attributes}

    def receive_message(
        self, *, MaxNumberOfMessages: int, WaitTimeSeconds: int, VisibilityTimeout: int, **_: Any
    ) -> Any:
        assert 1 <= MaxNumberOfMessages <= 10
        with self._changed:
            self.calls.append(("receive", [{"max": MaxNumberOfMessages, "visibility": VisibilityTimeout}]))
            if self.faults["receive"]:
                fault = self.faults["receive"].popleft()
                assert isinstance(fault, Exception)
                raise fault
            self.polling += 1
            self.most_polling = max(self.most_polling, self.polling)
            try:
                self._changed.wait_for(self._visible, WaitTimeSeconds * self.poll_scale)
            finally:
                self.polling -= 1
            taken = [self._deliver(m, VisibilityTimeout) for m in self._visible()[:MaxNumberOfMessages]]
            return {"Messages": taken} if taken else {}

    def delete_message_batch(self, *, Entries: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        return self._batch("delete", Entries, self._delete)

    def change_message_visibility_batch(self, *, Entries: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        return self._batch("change", Entries, self._change)

    def close(self) -> None:
        pass

    def _visible(self) -> list[Stored]:
        for message in list(self.messages.values()):
            if message.visible_at <= self.clock.now and message.receives >= (self.max_receives or 1_000_000):
                self.dead.append(self.messages.pop(message.id).id)
        return [message for message in self.messages.values() if message.visible_at <= self.clock.now]

    def _deliver(self, message: Stored, visibility: int) -> dict[str, Any]:
        message.receives += 1
        message.receipt = f"{message.id}/{message.receives}"
        message.visible_at = self.clock.now + visibility
        attributes = {
            "ApproximateReceiveCount": str(message.receives),
            "SentTimestamp": str(int(message.sent_at * 1000)),
        }
        return {
            "MessageId": message.id, "ReceiptHandle": message.receipt, "Body": message.body, "Attributes": attributes
        }  # fmt: skip

    def _batch(
        self, name: str, entries: list[dict[str, Any]], settle: Callable[[dict[str, Any]], str | None]
    ) -> dict[str, Any]:
        assert 1 <= len(entries) <= 10
        assert len({entry["Id"] for entry in entries}) == len(entries)
        self.during(name)
        with self._changed:
            self.calls.append((name, entries))
            fault: Fault = self.faults[name].popleft() if self.faults[name] else {}
            if isinstance(fault, Exception):
                raise fault
            answer: dict[str, Any] = {"Successful": [], "Failed": []}
            for index, entry in enumerate(entries):
                if code := fault.get(index) or settle(entry):
                    ours = code in ("ReceiptHandleIsInvalid", "MessageNotInflight")
                    answer["Failed"].append({"Id": entry["Id"], "Code": code, "SenderFault": ours})
                else:
                    answer["Successful"].append({"Id": entry["Id"]})
            return answer

    def _delete(self, entry: dict[str, Any]) -> None:
        message = self.messages.get(entry["ReceiptHandle"].split("/")[0])
        if message is not None and message.receipt == entry["ReceiptHandle"]:
            del self.messages[message.id]

    def _change(self, entry: dict[str, Any]) -> str | None:
        message = self.messages.get(entry["ReceiptHandle"].split("/")[0])
        if message is None or message.receipt != entry["ReceiptHandle"]:
            return "ReceiptHandleIsInvalid"
        if message.visible_at <= self.clock.now:
            return "MessageNotInflight"
        message.visible_at = self.clock.now + entry["VisibilityTimeout"]
        return None


def open_queue(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch, *, wait_s: int = 1) -> Queue:
    """The worker's own Queue, its client a fake one."""
    session = SimpleNamespace(region_name="eu-west-1", client=lambda *_, **__: sqs)
    monkeypatch.setattr(boto3, "Session", lambda **_: session)
    return Queue.open("https://sqs.eu-west-1.amazonaws.com/1/images", wait_s=wait_s)


class Keeper:
    """Leases, custody, acks and heartbeat on one queue: what the worker knows of SQS, without its steps."""

    def __init__(
        self,
        queue: Queue,
        clock: StepClock,
        *,
        max_lease: float = 900,
        max_attempts: int = 5,
        default_callback: str | None = None,
    ) -> None:
        self.queue = queue
        self.clock = clock
        self.ended: list[tuple[str, Outcome]] = []
        self.events: list[str] = []
        self.leases = LeaseTable(queue.visibility_timeout, max_lease, clock.monotonic)
        self.acks = Acks(queue, clock, self._ended, self.leases.visibility_calls)
        self.heartbeat = Heartbeat(queue, self.leases, clock, lambda what, n: self.events.extend([what] * n))
        self.custody = Custody(
            self.leases,
            clock,
            task=lambda: "mean",
            default_callback=default_callback,
            check_url=lambda _url: None,
            allowed_buckets={"pictures"},
            max_receives=queue.max_receives,
            max_attempts=max_attempts,
            to_sqs=self.acks.put,
        )
        self.acks.start()

    def receive(self, at_most: int = 10) -> list[Job]:
        """The jobs of what can be received now."""
        messages = self.queue.receive(at_most, self.queue.visibility_timeout, wait_s=0)
        return [job for message in messages for job in self.custody.admit(message)]

    def receive_one(self) -> Job:
        (job,) = self.receive()
        return job

    def wait_ended(self, count: int = 1) -> list[tuple[str, Outcome]]:
        """Every message that has ended, once there are so many."""
        eventually(lambda: len(self.ended) >= count, f"{count} messages have ended")
        return self.ended

    def _ended(self, lease: Lease, outcome: Outcome) -> None:
        if self.leases.remove(lease):
            self.ended.append((lease.message_id, outcome))


def a_request(key: str = "m1", *, callback_url: str | None = CALLBACK, error: JobError | None = None) -> Request:
    return Request(key, key, "http://host/a.jpg", callback_url, None, {}, error)


def a_lease(message_id: str = "m1", *, attempt: int = 1) -> Lease:
    return Lease(message_id, f"{message_id}/1", attempt, EPOCH, EPOCH + 1, deadline=1e12, ends=1e12)


def a_job(key: str = "m1", *, attempt: int = 1, kills: int = 0, **request: Any) -> Job:
    return Job(a_request(key, **request), a_lease(key, attempt=attempt), kills=kills)


def self_signed(subject: x509.GeneralName) -> tuple[bytes, bytes]:
    """A certificate for ``subject`` and its key, in PEM: whoever trusts the certificate trusts its server."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, str(subject.value))])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), secret
