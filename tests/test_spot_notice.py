"""A worker on a spot instance that is about to be taken away, in ECS: protected while it works, and gone in time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from world import MODULES, World, poll

SLOW = f"{MODULES / 'mean.py'}:Slow"
WITHIN_S = 100
"""Of the two minutes' notice that EC2 gives."""


class Machine:
    """The instance metadata service, version 2, and the agent of ECS, on one port."""

    def __init__(self) -> None:
        self.notice: dict[str, str] | None = None
        self.protection: list[bool] = []
        machine = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/latest/api/token":
                    self._answer(200, b"token")
                else:
                    machine.protection.append(json.loads(body)["ProtectionEnabled"])
                    self._answer(
                        200, json.dumps({"protection": {"ProtectionEnabled": machine.protection[-1]}}).encode()
                    )

            def do_GET(self) -> None:
                known = self.headers.get("X-aws-ec2-metadata-token") == "token"
                if self.path.endswith("/spot/instance-action") and known and machine.notice:
                    self._answer(200, json.dumps(machine.notice).encode())
                else:
                    self._answer(404 if known else 401, b"")

            def _answer(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    running = Machine()
    yield running
    running.close()


@pytest.mark.parametrize("flags", [(), ("--processes", "2")], ids=["one", "two pipelines"])
def test_a_spot_notice_under_load_ends_the_worker_in_time_and_loses_nothing(
    fast_world: World, machine: Machine, flags: tuple[str, ...]
) -> None:
    # given a worker on EC2 and in ECS, at work
    here = fast_world
    worker = here.worker(
        *flags,
        module=SLOW,
        AWS_EC2_METADATA_DISABLED="false",
        AWS_EC2_METADATA_SERVICE_ENDPOINT=machine.url,
        ECS_AGENT_URI=f"{machine.url}/api/task",
    ).ready()
    picture = here.request(1)
    here.send(*({**picture, "id": f"req-{n}"} for n in range(2000)))
    assert here.receiver.wait_for(50, 60)
    poll(lambda: machine.protection == [True], 20, "the task is protected")
    # when the instance is to be interrupted
    machine.notice = {"action": "terminate", "time": "2026-11-22T08:22:00Z"}
    began = time.monotonic()
    # then the worker ends well before it is
    assert worker.wait(WITHIN_S) == 0
    assert time.monotonic() - began < WITHIN_S
    assert worker.lines("spot interruption notice; stopping")[0]["action"] == "terminate"
    # and what it did not answer is there for others at once
    answered = len({each.webhook_id for each in here.receiver.accepted})
    assert not here.receiver.duplicates
    poll(lambda: here.counts() == (2000 - answered, 0), 30, "all the others are visible")
