"""``cvworker top``: what the status page tells, in a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from test_status_page import worker_status
from world import BIN, World


@contextmanager
def saying(body: Any, code: int = 200) -> Iterator[str]:
    """The address of something that answers like a worker, or not quite."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/status.json" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def top(*arguments: str) -> tuple[int, str, str]:
    environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
    done = subprocess.run(
        [BIN / "cvworker", "top", *arguments], capture_output=True, text=True, env=environment, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_it_tells_what_holds_a_worker_back_and_what_to_change() -> None:
    with saying(worker_status()) as address:
        code, said, _ = top(address, "--once")
    assert code == 0
    assert "process holds it back: 97% busy." in said
    assert "Raise batch_size (8)" in said
    assert "27.6 answered a second" in said
    assert "8,286 in SQS" in said
    assert "leases lost 2" in said
    (line,) = [line for line in said.splitlines() if line.startswith("preprocess")]
    assert line.split()[-2:] == ["71%", "3/28"]
    assert "latest  image_not_found req-1: HTTP 404" in said


def test_of_several_there_is_a_line_each_and_the_flow_of_the_one_that_is_worst_off() -> None:
    idle = {"tone": "good", "text": "Idle: no messages to work on.", "hint": "", "step": None, "tag": ""}
    with saying(worker_status(verdict=idle, rate_per_s=0.0, held=0)) as one, saying(worker_status()) as other:
        code, said, _ = top(one, f"http://{other}/", "--once")
    assert code == 0
    assert "Idle: no messages to work on." in said
    assert [line.split() for line in said.splitlines() if line.startswith("together")] == [
        ["together", "2", "of", "2", "27.6", "118"]
    ]
    assert "Raise batch_size (8)" in said


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({}, 500, "it answers HTTP 500"),
        ({"not": "a status"}, 200, "not as a cvworker of this version does"),
        ([], 200, "not as a cvworker of this version does"),
    ],
)
def test_one_that_does_not_answer_rightly_is_told_with_1(body: Any, status: int, why: str) -> None:
    with saying(body, status) as address:
        code, said, _ = top(address, "--once")
    assert code == 1
    assert why in said


def test_one_that_is_not_there_is_told_beside_those_that_are() -> None:
    with saying(worker_status()) as address:
        code, said, _ = top(address, "127.0.0.1:1", "--once")
    assert code == 1
    assert "no answer: Connection refused" in said
    assert "process holds it back" in said


def test_an_address_that_is_none_is_a_mistake_of_its_caller() -> None:
    code, said, told = top("http:///status", "--once")
    assert (code, said) == (2, "")
    assert told == "cvworker top: 'http:///status' is no address: give host:port, or http://host:port/\n"


def test_what_a_worker_says_does_not_steer_the_terminal() -> None:
    evil = "\x1b[2J[bold red]\x07gone[/]"
    status = worker_status(errors={evil: 1.0}, examples=[{"at": 1.0, "code": evil, "id": evil, "message": evil}])
    status["model"] = {**status["model"], "module": evil}
    with saying(status) as address:
        code, said, _ = top(address, "--once")
    assert code == 0
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "[bold red]" in said, "nor is it read as markup"


def test_it_watches_a_real_worker_in_a_terminal_until_ctrl_c(fast_world: World, tmp_path: Path) -> None:
    # given a worker
    worker = fast_world.worker().ready()
    address = worker.url().removeprefix("http://").rstrip("/")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [BIN / "cvworker", "top", address, "--every", "0.2"], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    # when it answers messages while it is watched
    seen = b""
    while b"Idle" not in seen:
        seen += os.read(ours, 4096)
    fast_world.send(*(fast_world.request(n) for n in range(20)))
    assert fast_world.receiver.wait_for(20, 60)
    # then its latency appears, and Ctrl-C ends it
    while b"p95" not in seen:
        seen += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    threading.Thread(target=_drain, args=(ours,), daemon=True).start()
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except OSError:  # the terminal is gone
        os.close(descriptor)
