"""HTTP to the queue's endpoint: connections are kept, renewed, and never hand out somebody else's answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from botocore.exceptions import ConnectionClosedError, HTTPClientError, ReadTimeoutError

from cvworker.sqs.connections import Connections

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
Script = Callable[[socket.socket, int], object]
HANG_UP = object()


@contextmanager
def endpoint(script: Script) -> Iterator[tuple[Connections, list[int]]]:
    """An endpoint that does as ``script`` says with each connection, and the number of requests that each brought."""
    requests: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    accepted, _ = listening.accept()
                except OSError:
                    return
                requests.append(0)
                threading.Thread(target=script_of, args=(accepted, len(requests) - 1), daemon=True).start()

        def script_of(accepted: socket.socket, number: int) -> None:
            with accepted:
                while read_request(accepted):
                    requests[number] += 1
                    if script(accepted, number) is HANG_UP:
                        return

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        connections = Connections(url, connect_timeout=5, read_timeout=1, certificates="")
        yield connections, requests
        connections.close()
        listening.shutdown(socket.SHUT_RDWR)


def read_request(accepted: socket.socket) -> bytes:
    """A whole request; nothing where the client is gone or the script has hung up."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            more = accepted.recv(65536)
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")).split(b":")[1])
        while len(body) < length:
            body += accepted.recv(65536)
    except OSError:
        return b""
    return data


def test_one_connection_carries_many_calls() -> None:
    with endpoint(lambda to, _: to.sendall(OK)) as (connections, requests):
        assert [connections.post({}, b"{}").body for _ in range(5)] == [b"{}"] * 5
    assert requests == [5]


def test_calls_at_once_have_a_connection_each() -> None:
    together = threading.Barrier(3, timeout=5)

    def answer(to: socket.socket, _: int) -> None:
        together.wait()
        to.sendall(OK)

    with endpoint(answer) as (connections, requests), ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: connections.post({}, b"{}").status, range(3))) == [200] * 3
        assert list(pool.map(lambda _: connections.post({}, b"{}").status, range(3))) == [200] * 3
    assert requests == [2, 2, 2]


def test_a_connection_that_was_closed_while_it_was_idle_is_renewed_without_a_word() -> None:
    def once(to: socket.socket, _: int) -> object:
        to.sendall(OK)
        return HANG_UP

    with endpoint(once) as (connections, requests):
        assert [connections.post({}, b"{}").status for _ in range(3)] == [200] * 3
    assert requests == [1, 1, 1]


def test_a_new_connection_that_ends_without_an_answer_is_an_error() -> None:
    with endpoint(lambda _to, _: HANG_UP) as (connections, requests), pytest.raises(ConnectionClosedError):
        connections.post({}, b"{}")
    assert requests == [1]


def test_a_call_whose_answer_was_cut_is_not_made_again() -> None:
    def cut(to: socket.socket, _: int) -> object:
        if requests[0] == 1:
            to.sendall(OK)
            return None
        to.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{")
        return HANG_UP

    with endpoint(cut) as (connections, requests):
        connections.post({}, b"{}")
        with pytest.raises(ConnectionClosedError):
            connections.post({}, b"{}")
    assert requests == [2]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"{}"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"{}"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
    ids=["in chunks", "after an interim one", "without a body"],
)
def test_bodies_framed_in_every_way_are_read(answer: bytes, body: bytes) -> None:
    def byte_by_byte(to: socket.socket, _: int) -> None:
        for at in range(len(answer)):
            to.sendall(answer[at : at + 1])

    for script in (lambda to, _: to.sendall(answer), byte_by_byte):
        with endpoint(script) as (connections, requests):
            assert [connections.post({}, b"{}").body for _ in range(2)] == [body] * 2
        assert requests == [2]


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    def answer(to: socket.socket, _: int) -> object:
        to.sendall(b'HTTP/1.0 200 OK\r\n\r\n{"a":')
        to.sendall(b"1}")
        return HANG_UP

    with endpoint(answer) as (connections, requests):
        assert [connections.post({}, b"{}").body for _ in range(2)] == [b'{"a":1}'] * 2
    assert requests == [1, 1]


def test_what_comes_behind_an_answer_is_nobodys() -> None:
    with endpoint(lambda to, _: to.sendall(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n!")) as (to, requests):
        assert [to.post({}, b"{}").body for _ in range(2)] == [b"{}"] * 2
    assert requests == [1, 1]


def test_a_timeout_and_what_is_not_http_are_told() -> None:
    with endpoint(lambda _to, _: None) as (connections, _requests), pytest.raises(ReadTimeoutError):
        connections.post({}, b"{}")
    with endpoint(lambda to, _: to.sendall(b"SSH-2.0-OpenSSH\r\n")) as (to, _requests), pytest.raises(HTTPClientError):
        to.post({}, b"{}")
