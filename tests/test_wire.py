"""Calls to SQS without boto3's client: it asks for the same, gives the same, and fails in the same words."""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from cryptography import x509

from cvworker.sqs.queue import SQS_ERRORS
from cvworker.sqs.wire import ByClient, Caller, Wire, caller
from fakes import self_signed
from world import World

RECEIVE = {
    "QueueUrl": "https://sqs.us-east-1.amazonaws.com/1/images",
    "MaxNumberOfMessages": 10,
    "WaitTimeSeconds": 0,
    "VisibilityTimeout": 30,
    "MessageSystemAttributeNames": ["ApproximateReceiveCount", "SentTimestamp"],
    "MessageAttributeNames": [],
}


@dataclass
class Endpoint:
    """An endpoint of SQS that notes what it is asked, and answers all alike."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""
    tls: ssl.SSLContext | None = None

    @contextmanager
    def serving(self) -> Iterator[Endpoint]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fields = {name.lower(): value for name, value in self.headers.items()}
                endpoint.asked.append((self.path, fields, json.loads(body)))
                if endpoint.hang_up:
                    self.close_connection = True
                    return
                self.send_response(endpoint.status)
                for name, value in {"Content-Length": str(len(endpoint.body)), **endpoint.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(endpoint.body)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            if self.tls is not None:
                server.socket = self.tls.wrap_socket(server.socket, server_side=True)
            self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield self
            server.shutdown()


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "AWS_CA_BUNDLE", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")


def session_and_client(url: str, **config: Any) -> tuple[boto3.Session, Any]:
    session = boto3.Session(region_name="us-east-1")
    settings = Config(connect_timeout=2, read_timeout=2, retries={"total_max_attempts": 1}, **config)
    return session, session.client("sqs", endpoint_url=url, config=settings)


def both(url: str) -> tuple[Caller, Caller]:
    """The wire, and boto3's client itself."""
    session, client = session_and_client(url)
    wire = caller(session, client)
    assert isinstance(wire, Wire)
    return wire, ByClient(client)


def test_it_asks_for_what_the_client_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a token")
    entries = [{"Id": "0", "ReceiptHandle": "r" * 180, "VisibilityTimeout": 7}]
    with Endpoint().serving() as endpoint:
        for call in both(endpoint.url):
            call("ReceiveMessage", RECEIVE)
            call("ChangeMessageVisibilityBatch", {"QueueUrl": RECEIVE["QueueUrl"], "Entries": entries})
    ours, theirs = endpoint.asked[:2], endpoint.asked[2:]
    same = ("host", "x-amz-target", "content-type", "x-amz-security-token", "content-length")
    for (path, fields, body), (their_path, their_fields, their_body) in zip(ours, theirs, strict=True):
        assert (path, body) == (their_path, their_body)
        assert [fields[name] for name in same] == [their_fields[name] for name in same]
        scope = fields["authorization"].partition("SignedHeaders")[0]
        assert scope == their_fields["authorization"].partition("SignedHeaders")[0]
        assert {"host", "x-amz-date", "x-amz-security-token", "x-amz-target"} <= set(
            fields["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
        )


def test_it_gives_what_the_client_gives(fast_world: World) -> None:
    here = fast_world
    here.send(*(here.request(n) for n in range(3)))
    url = here.client.meta.endpoint_url
    wire, client = both(url)
    wanted = RECEIVE | {"QueueUrl": here.queue_url, "VisibilityTimeout": 0}

    def received(call: Caller) -> list[dict[str, Any]]:
        messages = call("ReceiveMessage", wanted)["Messages"]
        return sorted(messages, key=lambda message: str(message["MessageId"]))

    mine, theirs = received(wire), received(client)
    changing = {"ReceiptHandle", "Attributes"}
    assert [{k: v for k, v in each.items() if k not in changing} for each in mine] == [
        {k: v for k, v in each.items() if k not in changing} for each in theirs
    ]
    assert [set(each["Attributes"]) for each in mine] == [set(each["Attributes"]) for each in theirs]
    entries = [{"Id": str(n), "ReceiptHandle": each["ReceiptHandle"]} for n, each in enumerate(theirs)]
    deleted = wire("DeleteMessageBatch", {"QueueUrl": here.queue_url, "Entries": entries})
    assert sorted(each["Id"] for each in deleted["Successful"]) == ["0", "1", "2"]
    assert here.counts() == (0, 0)


REFUSAL = b'{"__type": "com.amazonaws.sqs#QueueDoesNotExist", "message": "The specified queue does not exist."}'


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (400, REFUSAL, {"x-amzn-query-error": "AWS.SimpleQueueService.NonExistentQueue;Sender"}),
        (400, REFUSAL, {}),
        (403, b'{"__type": "AccessDeniedException", "Message": "no"}', {}),
        (503, b"<html>Service Unavailable</html>", {}),
        (500, b"", {}),
    ],
    ids=["with the old name", "with the new name", "access denied", "no JSON", "nothing"],
)
def test_a_refusal_is_told_by_the_same_name(status: int, body: bytes, headers: dict[str, str]) -> None:
    told = []
    with Endpoint(status, body, headers).serving() as endpoint:
        for call in both(endpoint.url):
            with pytest.raises(ClientError) as refused:
                call("ReceiveMessage", RECEIVE)
            told.append(refused.value.response)
    ours, theirs = (each["Error"]["Code"].rpartition(".")[2] for each in told)
    assert ours == theirs or {ours, theirs} == {"NonExistentQueue", "QueueDoesNotExist"}
    assert told[0]["ResponseMetadata"]["HTTPStatusCode"] == status


def silent() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_what_keeps_it_from_sqs_is_told_as_the_client_tells_it() -> None:
    with silent() as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for call in both(url):
            with pytest.raises(ReadTimeoutError):
                call("ReceiveMessage", RECEIVE)
    for call in both(url):
        with pytest.raises(EndpointConnectionError):
            call("ReceiveMessage", RECEIVE)
    with Endpoint(hang_up=True).serving() as endpoint:
        for call in both(endpoint.url):
            with pytest.raises(ConnectionClosedError):
                call("ReceiveMessage", RECEIVE)
    with Endpoint(body=b"<html>a captive portal</html>").serving() as endpoint, pytest.raises(HTTPClientError):
        both(endpoint.url)[0]("ReceiveMessage", RECEIVE)
    for error in (ReadTimeoutError, EndpointConnectionError, ConnectionClosedError, HTTPClientError, ClientError):
        assert issubclass(error, SQS_ERRORS)


def test_without_credentials_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}.items():
        monkeypatch.setenv(name, value)
    with Endpoint().serving() as endpoint:
        for call in both(endpoint.url):
            with pytest.raises(NoCredentialsError):
                call("ReceiveMessage", RECEIVE)
    assert endpoint.asked == []


@pytest.mark.parametrize(
    "unusual",
    [
        lambda patch: patch.setenv("HTTP_PROXY", "http://proxy:3128") or {},
        lambda _patch: {"proxies": {"http": "http://proxy:3128"}},
        lambda _patch: {"client_cert": "/etc/client.pem"},
        lambda _patch: {"signature_version": "v4a"},
    ],
    ids=["a proxy in the environment", "a proxy", "a certificate", "another signature"],
)
def test_what_is_set_up_in_an_unusual_way_stays_with_the_client(
    unusual: Callable[[pytest.MonkeyPatch], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(caller(*session_and_client("http://sqs.example", **unusual(monkeypatch))), ByClient)


def test_an_endpoint_that_is_not_behind_the_proxy_is_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "sqs.example")
    assert isinstance(caller(*session_and_client("http://sqs.example")), Wire)


def test_only_certificates_that_the_client_trusts_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "server.pem"
    certificate.write_bytes(b"".join(self_signed(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    with Endpoint(tls=server).serving() as endpoint:
        for call in both(endpoint.url):
            with pytest.raises(SSLError):
                call("ReceiveMessage", RECEIVE)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        for call in both(endpoint.url):
            assert "Messages" not in call("ReceiveMessage", RECEIVE)
    assert len(endpoint.asked) == 2
