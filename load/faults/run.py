"""One run: peers, workers, requests, ends at random moments, and what the judge makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from aiohttp import web
from load.faults.chance import Chance
from load.faults.judge import Verdict, Violation, judge
from load.faults.ledger import Event, Ledger
from load.faults.peers import Peers
from load.faults.plans import Plan
from load.faults.requests import body
from load.faults.sqs import ACCOUNT, Sqs
from load.faults.watch import Sample, grown, look, told
from load.faults.workers import Worker

LOOK_S = 0.05
SAMPLES, SAMPLE_S = 200, 1.0
"""Measurements in a run, and the least seconds between two."""
STOP_WITHIN_S = 30.0
"""The worker's grace is 25 s."""
ORPHANS_S = 15.0


@dataclass(slots=True)
class Report:
    """What a run showed."""

    verdict: Verdict
    events: list[Event]
    injected: dict[str, int]
    samples: list[Sample]
    took: float
    stops_took: list[float] = field(default_factory=list)


class Run:
    """Plays one plan by one seed."""

    def __init__(self, plan: Plan, seed: int, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.ledger = Ledger()
        self.chance = Chance(seed, plan.rate)
        self.sqs = Sqs(self.ledger, self.chance, visibility=plan.visibility, max_receives=plan.max_receives)
        self.peers = Peers(self.ledger, self.chance, max_receives=plan.max_receives, callback_takes=plan.callback_takes)
        self.workers: list[Worker] = []
        self.ended: list[Worker] = []
        self.samples: list[Sample] = []
        self.stops_took: list[float] = []
        self.sent = 0
        self._names = iter(range(1_000_000))
        self._url = ""

    async def play(self) -> Report:
        """Run to the end, whatever happens to the workers, and judge."""
        began = self.ledger.clock()
        async with _serve(self.sqs, self.peers) as (self._url, self._images, self._callbacks):
            try:
                for _ in range(self.plan.workers):
                    self.workers.append(await self._start())
                await asyncio.gather(*(worker.ready() for worker in self.workers))
                async with asyncio.TaskGroup() as tasks:
                    watching = tasks.create_task(self._watch(self.workers[-1]))
                    sending = tasks.create_task(self._send())
                    ending = tasks.create_task(self._end_some())
                    await sending
                    await self._until(lambda: ending.done() and not self.sqs.open, self.plan.within)
                    ending.cancel()
                    watching.cancel()
                await asyncio.gather(*(self._stop(worker) for worker in list(self.workers)))
            finally:
                for worker in [*self.workers, *self.ended]:
                    if worker.alive:
                        await worker.kill()
        verdict = judge(self.ledger.events, self.plan.rules)
        verdict.violations += [Violation("growth", detail=each) for each in grown(self.samples)]
        for worker in self.ended:  # its children may take a moment
            if left := await worker.orphans(ORPHANS_S):
                verdict.violations.append(Violation("processes left behind", detail=f"{worker.name}: {left}"))
        return Report(
            verdict,
            self.ledger.events,
            dict(self.chance.injected),
            self.samples,
            self.ledger.clock() - began,
            self.stops_took,
        )

    async def _start(self) -> Worker:
        environment = {"AWS_ENDPOINT_URL_SQS": self._url, "CVWORKER_QUEUE_URL": f"{self._url}/{ACCOUNT}/images"}
        environment |= {f"CVWORKER_{name.upper()}": value for name, value in self.plan.flags.items()}
        return await Worker.start(f"worker-{next(self._names)}", environment, self.folder, self.ledger)

    def _send_one(self) -> None:
        number, self.sent = self.sent, self.sent + 1
        draw, nature = self.chance.of("nature", number).random(), "good"
        for other, share in self.plan.natures.items():
            draw -= share
            if draw < 0:
                nature = other
                break
        self.sqs.send(body(number, nature, self._images, self._callbacks), nature)

    async def _send(self) -> None:
        plan, began = self.plan, self.ledger.clock()
        if not plan.seconds:
            for _ in range(plan.messages):
                self._send_one()
        while (elapsed := self.ledger.clock() - began) < plan.seconds:
            if self.sqs.open < plan.backlog and self.sent < plan.pace * elapsed:
                self._send_one()
            else:
                await asyncio.sleep(LOOK_S)

    async def _end_some(self) -> None:
        """End workers: at random points of the work, or every so many seconds."""
        plan, chance = self.plan, self.chance.of("ends")
        ends = plan.kills + plan.stops
        for n in range(ends):
            point = plan.messages * (n + chance.random()) / (ends + 0.5)
            await self._until(partial(self._accepted, point), plan.within)
            await asyncio.sleep(chance.random() * 0.2)
            await self._replace(kill=n < plan.kills, new=n < plan.kills)
        if plan.outage:
            await self._until(partial(self._accepted, plan.messages / 10), plan.within)
            self.sqs.down_until = self.ledger.clock() + plan.outage
        until = self.ledger.clock() + plan.seconds
        for n in range(1_000_000):
            pause = plan.kill_every * (0.5 + chance.random())
            if not plan.kill_every or self.ledger.clock() + pause > until:
                return
            await asyncio.sleep(pause)
            await self._replace(kill=n % 2 == 0, new=True)

    async def _replace(self, *, kill: bool, new: bool) -> None:
        worker = self.workers[0]
        if kill:
            self.workers.remove(worker)
            self.ended.append(worker)
            await worker.kill()
        else:
            await self._stop(worker)
        if new:
            self.workers.insert(0, await self._start())
            await self.workers[0].ready()

    async def _stop(self, worker: Worker) -> None:
        self.workers.remove(worker)
        self.ended.append(worker)
        self.stops_took.append(await worker.stop(STOP_WITHIN_S))

    async def _watch(self, worker: Worker) -> None:
        """Measure the worker that nobody ends, while its model process is there."""
        while worker.alive:
            sample = await asyncio.to_thread(lambda: look(worker.tree()) if worker.whole() else None)
            if sample is not None and worker.alive:
                self.samples.append(sample)
            await asyncio.sleep(max(SAMPLE_S, self.plan.seconds / SAMPLES))

    def _accepted(self, point: float) -> bool:
        return self.peers.accepted >= point

    async def _until(self, condition: Callable[[], bool], within: float) -> bool:
        until = self.ledger.clock() + within
        while not condition():
            if self.ledger.clock() > until:
                return False
            self.sqs.sweep()
            await asyncio.sleep(LOOK_S)
        return True


@asynccontextmanager
async def _serve(sqs: Sqs, peers: Peers) -> AsyncIterator[tuple[str, str, str]]:
    """Three servers on free ports of this machine, so that each is a host of its own; their addresses."""
    runners, urls = [], []
    for method, path, handler in (
        ("POST", "/{anything:.*}", sqs.handle),
        ("GET", "/{number}/{nature}.png", peers.image),
        ("POST", "/{number}/{nature}", peers.callback),
    ):
        app = web.Application()
        app.router.add_route(method, path, handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield urls[0], urls[1], urls[2]
    finally:
        for runner in runners:
            await runner.cleanup()


def summary(report: Report) -> list[str]:
    """The report in lines for people."""
    counts = report.verdict.counts
    names = (
        "sent",
        "received",
        "accepted",
        "answered",
        "in the dead-letter queue",
        "repeats",
        "held at a kill",
        "poisoned",
    )
    return [
        ", ".join(f"{name} {counts[name]}" for name in names),
        f"SQS calls {counts['call']} ({counts['call'] / max(1, counts['sent']):.2f} per message), "
        f"extended {counts['extended']}, expired {counts['expired']}, "
        f"workers {counts['started']} (killed {counts['killed']}, stopped {counts['stopped']})",
        f"faults: {', '.join(f'{k} {n}' for k, n in sorted(report.injected.items())) or 'none'}",
        f"the worker watched: {told(report.samples)}",
        f"took {report.took:.1f} s; stops took {', '.join(f'{s:.1f}' for s in report.stops_took)} s",
    ]
