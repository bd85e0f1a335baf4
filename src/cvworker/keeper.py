"""Keeps one pipeline of a container running: starts it, and replaces it when it ends unasked."""

from __future__ import annotations

import asyncio
import signal

import structlog

from cvworker.clock import Clock
from cvworker.errors import StartupError, WorkerFailed
from cvworker.observe import merged_metrics, merged_status
from cvworker.observe.merged_metrics import Reading
from cvworker.observe.merged_status import Status
from cvworker.pipeline_link import PipelineLink
from cvworker.settings import Settings

MAX_DEATHS = 3
"""Ends in a row, without one answered message or a minute of readiness between them, before it is given up."""
PROVEN_S = 60.0
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0
SILENT_S = 10.0
"""A pipeline whose event loop has not answered for so long does not live."""

log = structlog.get_logger(__name__)


class Keeper:
    """The place of one pipeline, filled by one process after the other.

    What the processes that ended had counted is kept, or a Prometheus would take the sum for one that began anew.
    """

    def __init__(self, number: int, settings: Settings, clock: Clock) -> None:
        self.number = number
        self.link: PipelineLink | None = None
        self.ran = asyncio.Event()
        """Set once it takes messages for the first time."""
        self.idle = False
        self.settings = settings
        self._clock = clock
        self._stop_asked = asyncio.Event()
        self._last_end = ""
        self._past_metrics: Reading = []
        self._past_status: list[Status] = []

    async def run(self) -> None:
        """Until it is stopped, or has ended because it was idle, as asked.

        Raises:
            StartupError: it says that it cannot start, before it ever ran.
            WorkerFailed: it ends again and again.
        """
        deaths = 0
        while not self._stop_asked.is_set():
            link = self.link = await PipelineLink.start(self.number, self.settings, self._clock)
            if self._stop_asked.is_set():
                link.stop()
            code = await link.ended()
            self._keep_counts(link)
            if self._stop_asked.is_set():
                return
            if code == 0 and self.settings.exit_when_idle is not None and link.running_since is not None:
                self.idle = True
                return
            if link.unusable and not self.ran.is_set():
                raise StartupError(link.unusable)
            deaths = 1 if self._proven(link) else deaths + 1
            self._last_end = _how(code, link)
            if deaths >= MAX_DEATHS:
                raise WorkerFailed(f"pipeline {self.number} ends again and again ({self._last_end})")
            delay = min(FIRST_BACKOFF_S * 2 ** (deaths - 1), LONGEST_BACKOFF_S)
            log.error("a pipeline ended; it is replaced", number=self.number, ended=self._last_end, after_s=delay)
            await self._pause(delay)

    async def look(self) -> None:
        """Have a new report of it."""
        if self.link is not None:
            await self.link.ask()
            if self.link is not None and self.link.running_since is not None:
                self.ran.set()

    def stop(self) -> None:
        """Have it stop in order; :meth:`run` returns once it has."""
        self._stop_asked.set()
        if self.link is not None:
            self.link.stop()

    def kill(self) -> None:
        if self.link is not None:
            self.link.kill()

    def problems(self) -> list[str]:
        """Why it does not live."""
        link = self.link
        if link is None:
            return [self._told(f"ended ({self._last_end}) and is replaced")] if self._last_end and self._wanted else []
        if (silent := link.silent_for()) > SILENT_S:
            return [self._told(f"has not answered for {silent:.0f} s")]
        return [self._told(each) for each in (link.report["problems"] if link.report else [])]

    def missing(self) -> list[str]:
        """Why it is not ready."""
        link = self.link
        if link is None:
            return [self._told("not started")] if self._wanted else []
        return [self._told(each) for each in (link.report["missing"] if link.report else ["starting"])]

    @property
    def status(self) -> Status | None:
        """What the process that runs now says of itself."""
        return self.link.report["status"] if self.link and self.link.report else None

    def statuses(self) -> list[Status]:
        """The same, and what those before it had counted."""
        return [*self._past_status, *([self.status] if self.status else [])]

    def readings(self) -> list[Reading]:
        report = self.link.report if self.link else None
        return [self._past_metrics, *([merged_metrics.read(report["metrics"])] if report else [])]

    @property
    def _wanted(self) -> bool:
        return not self.idle and not self._stop_asked.is_set()

    def _told(self, what: str) -> str:
        return f"pipeline {self.number}: {what}"

    def _proven(self, link: PipelineLink) -> bool:
        answered = link.report and (link.report["status"] or {}).get("messages", {}).get("answered")
        since = link.running_since
        return bool(answered) or (since is not None and self._clock.monotonic() - since > PROVEN_S)

    def _keep_counts(self, link: PipelineLink) -> None:
        self.link = None
        if link.report is None:
            return
        counted = merged_metrics.totals(merged_metrics.read(link.report["metrics"]))
        self._past_metrics = merged_metrics.add([self._past_metrics, counted])
        if status := link.report["status"]:
            merged = merged_status.merge([*self._past_status, merged_status.totals(status)])
            self._past_status = [merged_status.totals(merged)]

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop_asked.wait()
        except TimeoutError:
            pass


def _how(code: int, link: PipelineLink) -> str:
    if link.unusable:
        return link.unusable
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
