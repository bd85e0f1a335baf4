"""The worker of ``cvworker demo``: the one that ``cvworker run`` starts, as a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvworker.errors import StartupError, WorkerFailed
from cvworker.loading import DEMO, installed
from cvworker.settings import PREFIX, Settings

STOP_S, STOP_NOW_S = 3.0, 2.0
"""How long the worker may take to stop in order, and then to end at all."""
ASK_S = 2.0
A_DAY_S = 86_400.0
OWN_PACKAGE = "cvworker."


def environment(settings: Settings, forced: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with every setting as a variable, those in ``forced`` as they are there.

    The worker reads the user's ``.env`` too, but variables win over that.
    """
    given = settings.model_dump(mode="json", include=set(Settings.model_fields))
    values = {name: v if isinstance(v, str) else json.dumps(v) for name, v in given.items() if v is not None}
    if "weights" not in values and _has_weights(settings.module or ""):
        values["weights"] = DEMO
    if "exit_when_idle" in values:  # it is idle while pictures are drawn
        values["exit_when_idle"] = str(A_DAY_S)
    own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**own, **{PREFIX + name.upper(): value for name, value in {**values, **forced}.items()}}


def _has_weights(module: str) -> bool:
    """Whether the module is one of cvworker's own, which come with weights for demos."""
    entry = installed().get(module)
    return entry is not None and entry.module.startswith(OWN_PACKAGE)


def free_port() -> int:
    """A port that nobody has just now: the worker is asked at it, and its log need not say which it picked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class DemoWorker:
    """``cvworker run``, or another ``command``, with its output in the file ``log`` and its endpoints at ``url``.

    It is in a process group of its own: Ctrl-C at a terminal reaches every process of the group, and a worker that is
    told to stop twice does not stop in order.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        log: Path,
        url: str = "",
        cwd: Path | None = None,
        command: Sequence[str] = ("cvworker", "run"),
    ) -> None:
        self.url = url
        self._log = log
        self._asked = False
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a proxy knows no such host
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
                cwd=cwd,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def check(self) -> None:
        """Raises :class:`StartupError` or :class:`WorkerFailed`, with what it said last, once it has ended."""
        code = self.exit_code
        if code is None:
            return
        said = (self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        if code == 2:
            raise StartupError(f"{said.removeprefix('cvworker run: ')} (the worker's log: {self._log})")
        raise WorkerFailed(f"the worker ended with exit code {code}; its log: {self._log}")

    def ready(self) -> dict[str, Any] | None:
        """What its status says of the model; None until it can work."""
        try:
            with self._open(f"{self.url}readyz", timeout=ASK_S):
                pass
            with self._open(f"{self.url}status.json", timeout=ASK_S) as response:
                return dict(json.load(response)["model"])
        except (OSError, ValueError):  # nobody there yet, or a 503
            return None

    def ask_to_stop(self) -> None:
        """Begin its stop in order, without waiting for the end; asked twice it would end at once."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def close(self, stop_s: float = STOP_S) -> int:
        """End it, in order within ``stop_s`` seconds, else by force; its exit code. Harmless where it has ended."""
        for end, seconds in ((self.ask_to_stop, stop_s), (self._process.terminate, STOP_NOW_S)):
            end()
            try:
                return self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        self._process.kill()
        return self._process.wait()
