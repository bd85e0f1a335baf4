"""Calls to SQS by its JSON protocol, at a third of the CPU time that boto3's client takes for each.

https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-making-api-requests-json.html
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import boto3
import botocore.session
from botocore import xform_name
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from cvworker.sqs.connections import Answer, Connections

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
        self._connections = Connections(
            self._url,
            connect_timeout=config.connect_timeout,
            read_timeout=config.read_timeout,
            certificates=_certificates(session),
        )

    def __call__(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make a call, once. Raises ClientError where SQS refuses it, and BotoCoreError where it cannot be reached."""
        if self._credentials is None:
            raise NoCredentialsError
        fields = self._fields | {"X-Amz-Target": f"AmazonSQS.{operation}"}
        body = json.dumps(arguments).encode()
        request = AWSRequest("POST", self._url, headers=fields, data=body)
        SigV4Auth(self._credentials.get_frozen_credentials(), "sqs", self._region).add_auth(request)
        return self._read(operation, self._connections.post(dict(request.headers.items()), body))

    def _read(self, operation: str, answer: Answer) -> dict[str, Any]:
        try:
            body = json.loads(answer.body or b"{}")
            if not isinstance(body, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            if answer.status < 300:
                raise HTTPClientError(error=error) from error
            body = {}
        if answer.status < 300:
            return body
        name = answer.fields.get(_OLD_NAMES, "").split(";")[0] or str(body.get("__type", answer.status))
        text = str(body.get("message") or body.get("Message") or answer.reason)
        told = {"HTTPStatusCode": answer.status, "HTTPHeaders": answer.fields}
        refused: Any = {"Error": {"Code": name.rpartition("#")[2], "Message": text}, "ResponseMetadata": told}
        raise ClientError(refused, operation)

    def close(self) -> None:
        self._connections.close()


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
