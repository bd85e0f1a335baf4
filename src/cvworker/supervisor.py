"""``processes: n``: complete pipelines in one container, under a small process that owns the port and adds them up.

For machines where one Python process is the limit. The supervisor holds neither torch nor a client of AWS; it starts
the pipelines, replaces one that ends, and is the one to be asked, told to stop and warned by the machine.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import structlog
from pydantic import ByteSize

from cvworker import __version__
from cvworker.clock import Clock
from cvworker.errors import StartupError, WorkerFailed
from cvworker.keeper import Keeper
from cvworker.observe import merged_metrics, merged_status
from cvworker.observe.emf import Emf
from cvworker.observe.http import Endpoints
from cvworker.observe.verdict import Judge
from cvworker.settings import AUTO, Settings, how_to_set
from cvworker.surroundings import Surroundings
from cvworker.tuning import preprocess_workers

LOOK_S, STARTING_LOOK_S = 1.0, 0.2
LATE_S = 3.0
"""Beyond ``shutdown_grace``, for pipelines that have not ended by then: they are killed."""
PRECISIONS = ("fp32", "bf16", "fp16")

log = structlog.get_logger(__name__)


class Supervisor:
    """Runs ``processes`` pipelines until told to stop, until all have ended idle, or until one cannot go on."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or Clock()
        self.state = "starting"
        share = shared_out(settings, os.cpu_count() or 1)
        self.keepers = [Keeper(number, share, self.clock) for number in range(1, settings.processes + 1)]
        self._running: list[asyncio.Task[None]] = []
        self._born = self.clock.monotonic()
        self._stop_asked = asyncio.Event()
        self.judge = Judge()

    async def run(self) -> int:
        """The exit code: 0 stopped as asked or idle, 1 failed.

        Raises:
            StartupError: settings or surroundings will not do, by what the first pipeline says that finds out.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, signal.Signals(number).name)
        endpoints = Endpoints(
            problems=self.problems,
            missing=self.missing,
            status=self.status,
            metrics=self.metrics_text,
            refresh=self._look,
        )
        s = self.settings
        await endpoints.start(s.http_host, s.http_port)
        url = f"http://{s.http_host}:{endpoints.port}/"
        log.info("starting", version=__version__, module=s.module, processes=s.processes, url=url)
        surroundings = Surroundings(self._held, self._interrupted, self.clock, max_lease=s.max_lease)
        around = [asyncio.create_task(each) for each in (surroundings.run(), self._keep_looking())]
        if s.cloudwatch_namespace is not None:
            around.append(asyncio.create_task(Emf(s.cloudwatch_namespace, self.status, self.clock).run()))
        failure: WorkerFailed | None = None
        try:
            await self._until_over()
        except WorkerFailed as error:
            failure = error
            log.critical("failed", error=str(error))
        finally:
            in_time = await self._stop()
            for task in around:
                task.cancel()
            await asyncio.wait(around)
            await endpoints.stop()
        return 0 if failure is None and in_time else 1

    async def _until_over(self) -> None:
        """Start the pipelines, and wait for a reason to end. The first one finds out alone whether they can run.

        So what is wrong is told once, and what they all need, such as weights, is fetched once.
        """
        stop = asyncio.create_task(self._stop_asked.wait())
        first, *others = self.keepers
        ran = asyncio.create_task(first.ran.wait())
        try:
            self._running.append(asyncio.create_task(first.run()))
            await asyncio.wait([*self._running, ran, stop], return_when=asyncio.FIRST_COMPLETED)
            if ran.done() and not stop.done():
                self._agree(first)
                self._running += [asyncio.create_task(each.run()) for each in others]
            while not stop.done():
                for task in self._running:
                    if task.done():
                        task.result()
                left = [task for task in self._running if not task.done()]
                if not left:
                    return
                await asyncio.wait([*left, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            ran.cancel()

    def _agree(self, first: Keeper) -> None:
        """Take what ``auto`` found in one for all: the precision, as answers might differ if each measured, and the
        batch size, as they would measure while others work."""
        found: dict[str, Any] = {}
        model = first.status["model"] if first.status else {}
        if self.settings.precision == "auto" and model.get("precision") in PRECISIONS:
            found["precision"] = model["precision"]
        if self.settings.batch_size == AUTO and model.get("batch_size"):
            found["batch_size"] = model["batch_size"]
        for keeper in self.keepers:
            keeper.settings = keeper.settings.model_copy(update=found)

    async def _stop(self) -> bool:
        """Have all pipelines end in order, each within the same grace; whether they did."""
        self.state = "stopping"
        for keeper in self.keepers:
            keeper.stop()
        running = [task for task in self._running if not task.done()]
        if not running:
            return True
        log.info("stopping", processes=len(running), grace_s=self.settings.shutdown_grace)
        _, late = await asyncio.wait(running, timeout=self.settings.shutdown_grace + LATE_S)
        if late:
            log.error("pipelines did not stop in time and are killed", processes=len(late))
            self._kill()
            await asyncio.wait(late, timeout=LATE_S)
        for task in self._running:
            if task.done():
                task.exception()  # several may have failed alike, and one of them has been told
        self.state = "stopped"
        log.info("stopped")
        return not late

    async def _keep_looking(self) -> None:
        while True:
            await self._look()
            if self.state == "starting" and all(keeper.ran.is_set() for keeper in self.keepers):
                self.state = "running"
                log.info("ready", processes=len(self.keepers), after_s=round(self.clock.monotonic() - self._born, 1))
            await asyncio.sleep(STARTING_LOOK_S if self.state == "starting" else LOOK_S)

    async def _look(self) -> None:
        await asyncio.gather(*(keeper.look() for keeper in self.keepers))
        self.judge.look(
            merged_status.merge([status for keeper in self.keepers for status in keeper.statuses()])["queues"]
        )

    def _held(self) -> int:
        return sum(status["held"] for keeper in self.keepers if (status := keeper.status))

    def _interrupted(self, action: str, at: str) -> None:
        log.warning("spot interruption notice; stopping", action=action, at=at)
        self._stop_asked.set()

    def _signalled(self, name: str) -> None:
        if self._stop_asked.is_set():
            log.warning("second signal; ending at once", signal=name)
            self._kill()
            os._exit(1)
        log.info("signal received; stopping (once more to end at once)", signal=name)
        self._stop_asked.set()

    def _kill(self) -> None:
        for keeper in self.keepers:
            keeper.kill()

    def problems(self) -> list[str]:
        return [each for keeper in self.keepers for each in keeper.problems()]

    def missing(self) -> list[str]:
        stopping = ["stopping"] if self.state in ("stopping", "stopped") else []
        return stopping + [each for keeper in self.keepers for each in keeper.missing()]

    def metrics_text(self) -> bytes:
        readings = [reading for keeper in self.keepers for reading in keeper.readings()]
        return merged_metrics.write(merged_metrics.add(readings))

    def status(self) -> dict[str, Any]:
        """As one worker's, for all pipelines together, with what each says of itself in ``processes``."""
        merged = merged_status.merge([status for keeper in self.keepers for status in keeper.statuses()])
        own = {
            "version": __version__,
            "state": self.state,
            "uptime_s": round(self.clock.monotonic() - self._born, 1),
            "problems": self.problems(),
            "missing": self.missing(),
        }
        settings = self.settings.shown()
        merged["queue"]["url"] = merged["queue"]["url"] or settings["queue_url"]
        processes = [
            {"pid": keeper.link.pid if keeper.link else None, **(keeper.status or {"state": "not running"})}
            for keeper in self.keepers
        ]
        told = own | {name: value for name, value in merged.items() if name not in own} | {"settings": settings}
        return told | {"verdict": self.judge.verdict(told).json(), "processes": processes}


def shared_out(settings: Settings, cores: int) -> Settings:
    """What one pipeline gets of the container's.

    Raises:
        StartupError: too little memory for so many.
    """
    n = settings.processes
    memory = int(settings.max_inflight_bytes) // n
    if memory < settings.max_image_bytes:
        raise StartupError(
            f"max_inflight_bytes ({settings.max_inflight_bytes}) is shared by {n} processes, and each share must be at "
            f"least max_image_bytes ({settings.max_image_bytes}): raise it with {how_to_set('max_inflight_bytes')}"
        )
    workers = settings.preprocess_workers
    if workers == "auto":
        workers = preprocess_workers(cores, n)
    return settings.model_copy(
        update={"processes": 1, "max_inflight_bytes": ByteSize(memory), "preprocess_workers": workers}
    )
