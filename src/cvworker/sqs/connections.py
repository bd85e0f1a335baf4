"""HTTP/1.1 to one endpoint, from threads that wait, in a fraction of the CPU time that a general client takes."""

from __future__ import annotations

import os
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from urllib.parse import urlsplit

import httptools
from botocore.exceptions import (
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
    SSLError,
)

_READ_BYTES = 64 * 1024


class Answer:
    """Status, header fields by their names in lower case, and body; what llhttp calls while it parses them."""

    def __init__(self) -> None:
        self.status = 0
        self.reason = ""
        self.fields: dict[str, str] = {}
        self.body = b""
        self.complete = self.keep = False
        self._parts: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if not self.complete:
                raise
            self.keep = False  # more than was asked for: whatever it is, the answer came before it

    def end(self) -> None:
        """The connection has ended: so has a body that came without a length."""
        if self.status >= 200 and not {"content-length", "transfer-encoding"} & self.fields.keys():
            self.on_message_complete()
            self.keep = False

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("another answer")
        self.fields, self._parts = {}, []

    def on_status(self, status: bytes) -> None:
        self.reason = status.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        if self.status < 200:  # an interim one
            return
        self.complete, self.keep = True, self._parser.should_keep_alive()
        self.body = b"".join(self._parts)


class Connections:
    """Connections to ``url``, kept for the next call; any number of threads may call at once.

    Timeouts are in seconds, that for reading counted from the last byte. ``certificates`` is a file or a folder with
    those to be trusted.
    """

    def __init__(self, url: str, *, connect_timeout: float, read_timeout: float, certificates: str) -> None:
        parts = urlsplit(url)
        self._url = url
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._request = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._tls = _context(certificates) if parts.scheme == "https" else None
        self._idle: deque[socket.socket] = deque()

    def post(self, fields: Mapping[str, str], body: bytes) -> Answer:
        """One request and its answer. Raises what botocore raises where the endpoint cannot be reached."""
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        request = f"{self._request}{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body
        while True:
            connection, used = self._take()
            answer = Answer()
            try:
                self._exchange(connection, request, answer)
            except BaseException as error:
                connection.close()
                if used and not answer.status and isinstance(error, ConnectionError | ssl.SSLEOFError):
                    continue  # the endpoint closed it while it was idle, and has not seen this request
                raise self._meaning(error) from error
            if answer.keep:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def close(self) -> None:
        """Close those that are kept."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> tuple[socket.socket, bool]:
        """A connection, and whether it has been used before."""
        try:
            return self._idle.pop(), True
        except IndexError:
            return self._connect(), False

    def _connect(self) -> socket.socket:
        try:
            connection = socket.create_connection((self._host, self._port), self._connect_timeout)
        except TimeoutError as error:
            raise ConnectTimeoutError(endpoint_url=self._url, error=error) from error
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=self._url, error=error) from error
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_hostname=self._host)
            connection.settimeout(self._read_timeout)
        except BaseException as error:
            connection.close()
            if isinstance(error, TimeoutError):
                raise ConnectTimeoutError(endpoint_url=self._url, error=error) from error
            raise self._meaning(error) from error
        return connection

    @staticmethod
    def _exchange(connection: socket.socket, request: bytes, answer: Answer) -> None:
        connection.sendall(request)
        while not answer.complete:
            data = connection.recv(_READ_BYTES)
            if data:
                answer.feed(data)
                continue
            answer.end()
            if not answer.complete:
                raise ConnectionResetError("the endpoint hung up before its answer was complete")

    def _meaning(self, error: BaseException) -> BaseException:
        """What boto3's client raises in its place."""
        if isinstance(error, ssl.SSLError):
            return SSLError(endpoint_url=self._url, error=error)
        if isinstance(error, TimeoutError):
            return ReadTimeoutError(endpoint_url=self._url, error=error)
        if isinstance(error, OSError):
            return ConnectionClosedError(error=error, endpoint_url=self._url)
        return HTTPClientError(error=error) if isinstance(error, httptools.HttpParserError) else error


def _context(certificates: str) -> ssl.SSLContext:
    folder = os.path.isdir(certificates)
    context = ssl.create_default_context(
        cafile=None if folder else certificates, capath=certificates if folder else None
    )
    context.set_alpn_protocols(["http/1.1"])
    return context
