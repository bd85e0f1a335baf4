"""Worker processes: started as users start them, ended as kernels and orchestrators end them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
from load.faults.ledger import Kind, Ledger

MODULE = f"{Path(__file__).parent / 'module.py'}:Fragile"
READY_S = 120.0
DRAIN_S = 0.1
"""What a killed worker had written into its sockets is read within this time, and belongs to its life."""


class Worker:
    """One ``cvworker run``; its name is its access key, by which the queue knows it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, ledger: Ledger) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.family: list[psutil.Process] = []
        """Its children, as they were when it was last looked at."""
        self._ledger = ledger
        self._read = 0
        self._missing = 0

    @classmethod
    async def start(cls, name: str, environment: Mapping[str, str], folder: Path, ledger: Ledger) -> Worker:
        """Start one; it is not yet ready."""
        log = folder / f"{name}.log"
        own = {key: value for key, value in os.environ.items() if not key.startswith(("CVWORKER_", "AWS_"))}
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "cvworker", "run", "--http-port", "0", "--module", MODULE),
                env={**own, **_AWS, "AWS_ACCESS_KEY_ID": name, **environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=folder,
            )
        ledger.note(Kind.STARTED, worker=name)
        return cls(name, process, log, ledger)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    async def ready(self) -> None:
        """Wait until its model is warm. Raises RuntimeError with its log's end if that does not happen."""
        until = self._ledger.clock() + READY_S
        while '"event": "ready"' not in self.text():
            if not self.alive or self._ledger.clock() > until:
                raise RuntimeError(f"{self.name} is not ready ({self.process.returncode}):\n{self.text()[-3000:]}")
            await asyncio.sleep(0.05)
        self.tree()

    def whole(self) -> bool:
        """Whether no model process of it is being replaced, as its log tells."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        self._missing += text.count(b'"the model process ended"') - text.count(b'"the model process is back"')
        return not self._missing

    def tree(self) -> list[psutil.Process]:
        """Its processes, itself first."""
        try:
            parent = psutil.Process(self.process.pid)
            self.family = parent.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [parent, *self.family]

    async def kill(self) -> None:
        """SIGKILL, as the kernel's out-of-memory killer does."""
        self.tree()
        if self.alive:
            self.process.kill()
        await self.process.wait()
        await asyncio.sleep(DRAIN_S)
        self._ledger.note(Kind.KILLED, worker=self.name, status=-signal.SIGKILL)

    async def stop(self, within: float) -> float:
        """SIGTERM, as orchestrators do, and SIGKILL when it does not end in time; the seconds that it took."""
        self.tree()
        began = self._ledger.clock()
        self._ledger.note(Kind.STOPPING, worker=self.name)
        if self.alive:
            self.process.terminate()
        try:
            async with asyncio.timeout(within):
                status = await self.process.wait()
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        self._ledger.note(Kind.STOPPED, worker=self.name, status=status)
        return self._ledger.clock() - began

    async def orphans(self, within: float) -> list[psutil.Process]:
        """Children that are still there so long after its end."""
        until = self._ledger.clock() + within
        while True:
            left = [each for each in self.family if _runs(each)]
            if not left or self._ledger.clock() > until:
                return left
            await asyncio.sleep(0.2)


_AWS = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "CVWORKER_ALLOW_PRIVATE_NETWORKS": "true",
    "CVWORKER_LOG_FORMAT": "json",
}


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
