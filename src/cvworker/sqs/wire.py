"""Calls to SQS by its JSON protocol, at a third of the CPU time that boto3's client takes for each.

https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-making-api-requests-json.html
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any, Protocol

import boto3
import botocore.session
import urllib3
from botocore import xform_name
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies
from urllib3.connection import HTTPConnection
from urllib3.util import Timeout

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient

_OLD_NAMES = "x-amzn-query-error"
"""The header with an error's name in the protocol before this one, which boto3 tells, too."""


class Caller(Protocol):
    """Makes calls: ``call("ReceiveMessage", {"QueueUrl": …})`` gives and raises what boto3's client does."""

    def __call__(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


def caller(session: boto3.Session, client: SQSClient) -> Caller:
    """The cheapest way to make calls just as ``client`` does, which was made from ``session``.

    What is set up in an unusual way stays with the client: proxies, and signatures or certificates of another kind.
    """
    return Wire(session, client) if _is_plain(client) else ByClient(client)


class ByClient:
    """Calls that boto3's client makes itself."""

    def __init__(self, client: SQSClient) -> None:
        self._client = client

    def __call__(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(self._client, xform_name(operation))(**arguments)
        return answer

    def close(self) -> None:
        self._client.close()


class Wire:
    """A client of its own for the endpoint, region, credentials and timeouts of one of boto3's."""

    def __init__(self, session: boto3.Session, client: SQSClient) -> None:
        config: Any = client.meta.config
        self._credentials = session.get_credentials()
        self._region = client.meta.region_name
        self._url = client.meta.endpoint_url.rstrip("/") + "/"
        self._fields = {"Content-Type": "application/x-amz-json-1.0", "User-Agent": config.user_agent}
        self._pool = urllib3.PoolManager(
            maxsize=config.max_pool_connections,
            timeout=Timeout(connect=config.connect_timeout, read=config.read_timeout),
            retries=False,
            cert_reqs="CERT_REQUIRED",
            ca_certs=_certificates(session),
            socket_options=[*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
        )

    def __call__(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make a call, once. Raises ClientError where SQS refuses it, and BotoCoreError where it cannot be reached."""
        if self._credentials is None:
            raise NoCredentialsError
        fields = self._fields | {"X-Amz-Target": f"AmazonSQS.{operation}"}
        request = AWSRequest("POST", self._url, headers=fields, data=json.dumps(arguments).encode())
        SigV4Auth(self._credentials.get_frozen_credentials(), "sqs", self._region).add_auth(request)
        try:
            answer = self._pool.request(
                "POST", self._url, body=request.data, headers=dict(request.headers.items()), redirect=False
            )
        except Exception as error:
            raise self._meaning(error, request) from error
        return self._read(operation, answer)

    def _read(self, operation: str, answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
        try:
            body = json.loads(answer.data or b"{}")
            if not isinstance(body, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            if answer.status < 300:
                raise HTTPClientError(error=error) from error
            body = {}
        if answer.status < 300:
            return body
        name = answer.headers.get(_OLD_NAMES, "").split(";")[0] or str(body.get("__type", answer.status))
        text = str(body.get("message") or body.get("Message") or answer.reason or "")
        told = {"HTTPStatusCode": answer.status, "HTTPHeaders": dict(answer.headers)}
        refused: Any = {"Error": {"Code": name.rpartition("#")[2], "Message": text}, "ResponseMetadata": told}
        raise ClientError(refused, operation)

    def _meaning(self, error: Exception, request: AWSRequest) -> BotoCoreError:
        """What boto3's client raises in its place."""
        if isinstance(error, urllib3.exceptions.SSLError):
            return SSLError(endpoint_url=self._url, error=error)
        if isinstance(error, urllib3.exceptions.NewConnectionError):
            return EndpointConnectionError(endpoint_url=self._url, error=error)
        if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
            return ConnectTimeoutError(endpoint_url=self._url, error=error)
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            return ReadTimeoutError(endpoint_url=self._url, error=error)
        if isinstance(error, urllib3.exceptions.ProtocolError):
            return ConnectionClosedError(error=error, request=request, endpoint_url=self._url)
        return HTTPClientError(error=error)

    def close(self) -> None:
        self._pool.clear()


def _is_plain(client: SQSClient) -> bool:
    config: Any = client.meta.config
    proxies = config.proxies or get_environ_proxies(client.meta.endpoint_url)
    return config.signature_version == "v4" and config.client_cert is None and not proxies


def _certificates(session: boto3.Session) -> str:
    """The file with those that the client trusts."""
    profile = session.profile_name
    core = botocore.session.Session(profile=None if profile == "default" else profile)
    bundle = core.get_config_variable("ca_bundle")
    return str(get_cert_path(True) if bundle is None else bundle)
