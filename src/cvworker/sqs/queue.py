"""The SQS calls the worker makes, and what their failures mean at start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    ReadTimeoutError,
)

from cvworker import __version__, aws
from cvworker.errors import StartupError
from cvworker.sqs.wire import Caller, caller

if TYPE_CHECKING:
    import boto3
    from types_boto3_sqs import SQSClient
    from types_boto3_sqs.literals import QueueAttributeNameType
    from types_boto3_sqs.type_defs import MessageTypeDef

MAX_BATCH = 10
CONNECT_TIMEOUT_S = 5
READ_MARGIN_S = 15
SETTLE_TIMEOUT_S = 6
"""These calls take milliseconds; one that hangs must leave time to try again before a lease ends."""
LOST_CODES = frozenset({"ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue"})
MAX_VISIBILITY_S = 43200
BACKLOG: dict[str, QueueAttributeNameType] = {
    "visible": "ApproximateNumberOfMessages",
    "hidden": "ApproximateNumberOfMessagesNotVisible",
    "delayed": "ApproximateNumberOfMessagesDelayed",
}
SQS_ERRORS = (BotoCoreError, ClientError)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failed:
    """One entry of a batch call that SQS refused."""

    index: int
    code: str
    permanent: bool

    @property
    def lost(self) -> bool:
        """Whether SQS no longer knows the receipt handle."""
        return self.code.rpartition(".")[2] in LOST_CODES


class Queue:
    """One SQS queue, opened: its attributes, and clients of their own for receiving and settling.

    Two clients, because long polls would otherwise occupy the connections that acks and extensions need.
    """

    def __init__(self, url: str, *, receive_threads: int = 3, wait_s: int = 10) -> None:
        self.url = url
        self.wait_s = wait_s
        self._polling = _caller(url, receive_threads, wait_s + READ_MARGIN_S)
        self._settling = _caller(url, 4, SETTLE_TIMEOUT_S)
        self.visibility_timeout = 30
        self.max_receives: int | None = None
        self.dead_letter_arn: str | None = None
        self.called: Callable[[str, str], object] = lambda _operation, _outcome: None
        """Told of each call but receives, and whether it was ``ok`` or an ``error``."""
        self.message_attributes: list[str] = []
        """Names of the client's own attributes that messages are to be received with."""
        self.received: Callable[[list[MessageTypeDef], float], object] | None = None
        """Told of the messages that a call brought, and when it began, in seconds since the epoch."""

    @classmethod
    def open(cls, url: str, *, receive_threads: int = 3, wait_s: int = 10) -> Queue:
        """Connect and read the queue's attributes.

        Raises:
            StartupError: one line that says what is wrong with the queue, the credentials or the endpoint.
        """
        if url.rstrip("/").endswith(".fifo"):
            raise StartupError(f"queue_url: {url} is a FIFO queue, which is not supported; use a standard queue")
        queue = explain(url, lambda: cls(url, receive_threads=receive_threads, wait_s=wait_s))
        queue.read_attributes()
        return queue

    def read_attributes(self) -> dict[str, str]:
        answer = explain(self.url, lambda: self._settle("GetQueueAttributes", AttributeNames=["All"]))
        attributes = {str(name): value for name, value in (answer.get("Attributes") or {}).items()}
        self.visibility_timeout = int(attributes.get("VisibilityTimeout", 30))
        policy = json.loads(attributes.get("RedrivePolicy") or "{}")
        self.max_receives = int(policy["maxReceiveCount"]) if "maxReceiveCount" in policy else None
        self.dead_letter_arn = policy.get("deadLetterTargetArn")
        return attributes

    def receive(self, at_most: int, visibility: int, wait_s: int | None = None) -> list[MessageTypeDef]:
        """One long poll for up to ten messages."""
        began = time.time()
        wanted = {
            "QueueUrl": self.url,
            "MaxNumberOfMessages": min(at_most, MAX_BATCH),
            "WaitTimeSeconds": self.wait_s if wait_s is None else wait_s,
            "VisibilityTimeout": visibility,
            "MessageSystemAttributeNames": ["ApproximateReceiveCount", "SentTimestamp"],
            "MessageAttributeNames": self.message_attributes,
        }
        messages: list[MessageTypeDef] = self._polling("ReceiveMessage", wanted).get("Messages") or []
        if messages and self.received is not None:
            self.received(messages, began)
        return messages

    def backlog(self) -> dict[str, int]:
        """About how many messages SQS has, by :data:`BACKLOG`'s names."""
        with self._told("get_attributes"):
            answer = self._settle("GetQueueAttributes", AttributeNames=list(BACKLOG.values()))
        found = answer.get("Attributes") or {}
        return {state: int(value) for state, name in BACKLOG.items() if (value := found.get(name)) is not None}

    def delete(self, receipts: Sequence[str]) -> list[Failed]:
        """Delete up to ten messages; what SQS refused comes back (HTTP 200 can carry failures)."""
        with self._told("delete"):
            answer = self._settle(
                "DeleteMessageBatch",
                # The index is the Id: the same MessageId twice in a call would fail the whole of it.
                Entries=[{"Id": str(i), "ReceiptHandle": receipt} for i, receipt in enumerate(receipts)],
            )
        return _failed(answer)

    def change_visibility(self, receipts: Sequence[tuple[str, int]]) -> list[Failed]:
        """Show up to ten messages again after so many seconds from now each."""
        with self._told("change_visibility"):
            answer = self._settle(
                "ChangeMessageVisibilityBatch",
                Entries=[
                    {"Id": str(i), "ReceiptHandle": receipt, "VisibilityTimeout": min(seconds, MAX_VISIBILITY_S)}
                    for i, (receipt, seconds) in enumerate(receipts)
                ],
            )
        return _failed(answer)

    def close(self) -> None:
        self._polling.close()
        self._settling.close()

    def _settle(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return self._settling(operation, {"QueueUrl": self.url, **arguments})

    @contextmanager
    def _told(self, operation: str) -> Iterator[None]:
        try:
            yield
        except SQS_ERRORS:
            self.called(operation, "error")
            raise
        self.called(operation, "ok")


def open_client(url: str) -> SQSClient:
    """A client for the queue at ``url``, whose attributes it could read.

    Raises:
        StartupError: as :meth:`Queue.open` does.
    """

    def connect() -> SQSClient:
        client, _ = _client(url, 1, READ_MARGIN_S)
        client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        return client

    return explain(url, connect)


def explain(url: str, call: Callable[[], T]) -> T:
    """Make a call and turn what can go wrong at start into one line that says how to mend it."""
    try:
        return call()
    except NoRegionError:
        raise StartupError("no AWS region: set AWS_REGION, AWS_DEFAULT_REGION or one in ~/.aws/config") from None
    except NoCredentialsError:
        raise StartupError(
            "no AWS credentials found: give the task or instance a role, or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        ) from None
    except (EndpointConnectionError, ConnectTimeoutError, ReadTimeoutError) as error:
        raise StartupError(
            f"queue_url: SQS cannot be reached ({error}); check the network, the region and AWS_ENDPOINT_URL_SQS"
        ) from None
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        raise StartupError(f"queue_url: {_meaning(code, url)} [{code}]") from None
    except (BotoCoreError, ValueError) as error:
        raise StartupError(f"queue_url: {url}: {str(error).splitlines()[0]}") from None


def _meaning(code: str, url: str) -> str:
    short = code.rpartition(".")[2]
    if short in {"NonExistentQueue", "QueueDoesNotExist"}:
        return f"{url} does not exist; check the URL, the account and the region"
    if short in {"AccessDenied", "AccessDeniedException"}:
        return f"access to {url} is denied; the role needs sqs:GetQueueAttributes, ReceiveMessage, DeleteMessage and \
ChangeMessageVisibility"
    if short in {
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "ExpiredToken",
        "SignatureDoesNotMatch",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "AuthFailure",
        "ExpiredTokenException",
    }:
        return "the AWS credentials are not valid (wrong, revoked or expired)"
    return f"SQS refused the call for {url}"


def _caller(url: str, connections: int, read_timeout: int) -> Caller:
    client, session = _client(url, connections, read_timeout)
    return caller(session, client)


def _client(url: str, connections: int, read_timeout: int) -> tuple[SQSClient, boto3.Session]:
    session = aws.session()
    region = session.region_name or _region_of(url)
    return session.client("sqs", region_name=region, config=_config(connections, read_timeout)), session


def _config(connections: int, read_timeout: int) -> Config:
    # One attempt: the worker's own loops retry with back-off, and know what a lost receive may have hidden.
    return Config(
        user_agent=f"cvworker/{__version__} {botocore.session.Session().user_agent()}",
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout,
        max_pool_connections=max(connections, 10),
        retries={"total_max_attempts": 1},
        tcp_keepalive=True,
    )


def _region_of(url: str) -> str | None:
    """The region in an SQS URL (``sqs.REGION.amazonaws.com``), for those who set no other."""
    host = url.split("://")[-1].split("/")[0].split(".")
    return host[1] if len(host) > 3 and host[0] == "sqs" and host[2] == "amazonaws" else None


def _failed(answer: Any) -> list[Failed]:
    return [
        Failed(int(entry["Id"]), entry.get("Code", ""), bool(entry.get("SenderFault")))
        for entry in answer.get("Failed") or []
    ]
