"""The worker's side of a model process: start it, speak with it, end it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import structlog

from cvworker.errors import StartupError
from cvworker.model.config import ModelConfig

HIDDEN_PREFIXES = ("AWS_", "CVWORKER_CALLBACK_SECRET", "CVWORKER_EGRESS_PROXY", "CVWORKER_SECRETS_DIR", "ECS_", "OTEL_")
"""Variables the model process does not get: it decodes untrusted bytes and needs no credentials."""
LONGEST_TMPDIR = 70
"""multiprocessing keeps sockets in there, whose paths can have 107 characters at most."""
DUMP_S = 0.3
READY_TIMEOUT_S = 900.0
"""For importing the module, ``setup`` with the largest of models, and warm-up."""

log = structlog.get_logger(__name__)


class ModelLink:
    """One model process, from its start to its end."""

    def __init__(self, config: ModelConfig, arena_fd: int) -> None:
        self._config = config
        self._arena_fd = arena_fd
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cvworker.model", str(theirs.fileno()), str(arena_fd)],
                pass_fds=(theirs.fileno(), arena_fd),
                env=_environment(),
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self._connection.send_bytes(config.dump())
        self.pid = self._process.pid

    def wait_ready(self, timeout: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """Wait until the model is loaded and warm; what it says of itself.

        Raises:
            StartupError: it says that it cannot run, it ended, or it takes longer than ``timeout`` seconds.
        """
        if not self._connection.poll(timeout):
            self.kill(dump=True)
            raise StartupError(f"module: it was not ready after {timeout:.0f} s; its stacks are in the log above")
        for frame in self.frames():
            if "ready" in frame:
                ready: dict[str, Any] = frame["ready"]
                return ready
            if "unusable" in frame:
                raise StartupError(frame["unusable"])
        raise StartupError(f"module: its process ended while starting ({self.how_it_ended()}); see the log above")

    def frames(self) -> Iterator[dict[str, Any]]:
        """What the process says, until it ends."""
        while True:
            try:
                yield json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                return

    def submit(self, jobs: list[tuple[int, int, int, bool]]) -> None:
        """Hand over images; silently nothing if the process has ended, which :meth:`frames` tells."""
        self._send({"jobs": jobs})

    def stop(self, timeout: float) -> None:
        """Let it finish what it has, and end it if that takes longer than ``timeout`` seconds."""
        self._send({"stop": True})
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self, *, dump: bool = False) -> None:
        """End it at once, with the stacks of its threads on stderr first where ``dump``."""
        if dump and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(DUMP_S)
        self._process.kill()
        self._process.wait()

    def how_it_ended(self) -> str:
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        with self._lock:  # a descriptor closed during a send may be another connection's by the time of the write
            self._connection.close()

    def _send(self, frame: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._connection.send_bytes(json.dumps(frame).encode())
        except OSError:
            pass


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN_PREFIXES)}
    # What is killed cannot clean up; the tracker does so for it, and need not say so on the user's terminal.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    if len(tempfile.gettempdir()) > LONGEST_TMPDIR:
        kept["TMPDIR"] = "/tmp"  # noqa: S108 - multiprocessing makes a directory of its own there
    kept["PYTHONWARNINGS"] = ",".join(filter(None, [kept.get("PYTHONWARNINGS"), quiet]))
    return kept
