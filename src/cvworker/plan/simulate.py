"""The discrete-event simulation: every message, every batch.

A message's way is the worker's own (docs/architecture.md): SQS → a worker with room, by chance → download → one of the
DataLoader processes → a batch that leaves when full or when its first sample has waited → the device → the callback.
A message is held from its receive until its callback was accepted, and a worker holds only so many.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from cvworker.plan.autoscaler import LOOK_S, Bill, Fleet, Scaling
from cvworker.plan.capacity import CALLBACKS, RECEIVE_BATCH, RECEIVE_THREADS, Worker
from cvworker.plan.traffic import Floats, Traffic
from cvworker.tuning import LEAST_DOWNLOADS, MOST_DOWNLOADS, SMOOTHING, queue_limit

RETRY_S, RETRY_CAP_S, RETRY_SPREAD = 5.0, 900.0, 0.2
"""The worker's delays before SQS redelivers what failed for now: 5 s x 2^n, ±20 %."""
DRAIN_S = 86_400.0
"""How long after the last arrival a backlog is worked off at most."""
_EPS = 1e-9


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of a simulation. Times in seconds; ``done`` is NaN for a message that nobody has answered."""

    arrived: Floats
    done: Floats
    seconds: float
    """Length of the stretch in which messages arrived; the run went on until the last was answered."""
    batches: int
    batched: int
    device_busy_s: float
    in_flight_s: float
    """Messages held, integrated over time; ``visible_s`` and ``hidden_s`` the same for those in SQS."""
    visible_s: float
    hidden_s: float
    most_in_flight: int
    receives: int
    bill: Bill

    @property
    def latencies(self) -> Floats:
        """From arrived to answered; infinite where there is no answer."""
        return np.where(np.isnan(self.done), np.inf, self.done - self.arrived)

    def percentile(self, share: float) -> float:
        """The latency that this share of all messages does not exceed; 0 without messages."""
        found = self.latencies
        return float(np.quantile(found, share, method="inverted_cdf")) if len(found) else 0.0

    @property
    def achieved(self) -> float:
        """Answers a second within the stretch."""
        return float(np.count_nonzero(self.done <= self.seconds)) / self.seconds

    @property
    def utilisation(self) -> float:
        """Share of the active workers' time in which the device was busy."""
        return self.device_busy_s / max(self.bill.active, _EPS)

    @property
    def mean_batch(self) -> float:
        return self.batched / max(1, self.batches)


class _Task:
    """One worker at work."""

    __slots__ = (
        *("held", "hand", "downloading", "to_download", "decoding", "to_decode", "ready", "staged", "computing"),
        *(
            "timer",
            "calling",
            "to_call",
            "link_free",
            "open_at",
            "leaving",
            "dead",
            "calls",
            "rate",
            "second",
            "answers",
        ),
    )

    def __init__(self) -> None:
        self.held = self.downloading = self.decoding = self.calling = 0
        self.hand: set[int] = set()
        self.to_download: deque[int] = deque()
        self.to_decode: deque[int] = deque()
        self.ready: deque[tuple[float, int]] = deque()
        self.staged: deque[list[int]] = deque()
        self.to_call: deque[int] = deque()
        self.computing = self.leaving = self.dead = False
        self.timer = self.link_free = self.rate = 0.0
        self.calls, self.second, self.answers = 1, 0, 0
        self.open_at = -1
        """Its place among those that receive; -1 while it has no room or ends."""


class Simulation:
    """One run: a traffic, a kind of worker, and how many of them."""

    def __init__(
        self,
        traffic: Traffic,
        worker: Worker,
        scaling: Scaling,
        *,
        seed: int = 0,
        start: float = 0.0,
        seconds: float = 86_400.0,
        first: int | None = None,
        without_notice: float = 0.0,
        arrivals: Floats | None = None,
    ) -> None:
        random = np.random.default_rng(seed)
        times = traffic.arrivals(random, start, seconds) if arrivals is None else arrivals
        self._arrived = times
        self._arrivals: list[float] = times.tolist()
        count = len(times)
        sizes, megapixels = traffic.draw_images(random, count)
        worker = worker.paced(traffic)
        self._download = (traffic.host.draw(random, count) + worker.overhead_s).tolist()
        self._transfer = (sizes / worker.network_bytes_s).tolist()
        pace = {size: worker.decode_seconds(float(size)) for size in np.unique(megapixels)}
        self._decode = [pace[size] for size in megapixels]
        self._call = traffic.callback.draw(random, count).tolist()
        self._errors = traffic.host_errors
        self._attempts = [0] * count
        self._done = [float("nan")] * count
        self._batch_table = worker.batch_table
        self._worker, self._seconds = worker, seconds
        self._limit = max(1, worker.held(traffic))
        self._reopen = max(self._limit - RECEIVE_BATCH, self._limit // 2)
        self._servers = worker.preprocess_servers
        self._downloads, self._callbacks = MOST_DOWNLOADS * worker.processes, CALLBACKS * worker.processes
        self._ahead = worker.ahead * worker.processes
        self._without_notice = without_notice
        self._random = Random(seed)  # noqa: S311 - a simulation
        self._events: list[tuple[float, int, Any, _Task, Any]] = []
        self._order = 0
        self._queue: deque[int] = deque()
        self._open: list[_Task] = []
        self._tasks: list[_Task] = []
        self._in_flight = self._hidden = self._most = self._receives = self._batches = self._batched = 0
        self._areas = [0.0, 0.0, 0.0]
        self._now = self._busy = 0.0
        self._fleet = Fleet(scaling, scaling.least if first is None else first)
        self._nobody = _Task()

    def run(self) -> Outcome:
        """Simulate until every message is answered, or nothing can be any more."""
        for _ in range(self._fleet.active):
            self._begin()
        self._at(LOOK_S, self._look, self._nobody)
        arrivals, events, left, count = self._arrivals, self._events, 0, len(self._arrivals)
        end = self._seconds + DRAIN_S
        while left < count or self._in_flight or self._queue or self._hidden:
            if left < count and arrivals[left] <= events[0][0]:
                now = arrivals[left]
                self._pass(now)
                while left < count and arrivals[left] <= now:
                    self._queue.append(left)
                    left += 1
                self._hand_out()
                continue
            now, _, handle, task, what = heapq.heappop(events)
            if now > end:
                break
            self._pass(now)
            handle(task, what)
        self._fleet.advance(max(self._now, self._seconds))
        return Outcome(
            arrived=self._arrived,
            done=np.asarray(self._done),
            seconds=self._seconds,
            batches=self._batches,
            batched=self._batched,
            device_busy_s=self._busy,
            visible_s=self._areas[0],
            in_flight_s=self._areas[1],
            hidden_s=self._areas[2],
            most_in_flight=self._most,
            receives=self._receives,
            bill=self._fleet.bill,
        )

    def _at(self, when: float, handle: Any, task: _Task, what: Any = None) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, handle, task, what))

    def _pass(self, now: float) -> None:
        passed, self._now = now - self._now, now
        areas = self._areas
        areas[0] += len(self._queue) * passed
        areas[1] += self._in_flight * passed
        areas[2] += self._hidden * passed

    # ---- receiving

    def _hand_out(self) -> None:
        """A call takes up to ten messages; which comes first is chance, and a worker may have more of them waiting."""
        queue, open_tasks, random = self._queue, self._open, self._random.random
        while queue and open_tasks:
            task = open_tasks[int(random() * len(open_tasks))]
            if random() * RECEIVE_THREADS >= task.calls:
                continue
            for _ in range(min(RECEIVE_BATCH, self._limit - task.held, len(queue))):
                self._take(task, queue.popleft())
            self._receives += 1
            if task.held >= self._limit:
                self._close(task)

    def _take(self, task: _Task, i: int) -> None:
        task.held += 1
        task.hand.add(i)
        self._in_flight += 1
        if self._in_flight > self._most:
            self._most = self._in_flight
        if task.downloading < self._downloads:
            self._fetch(task, i)
        else:
            task.to_download.append(i)

    def _release(self, task: _Task, i: int) -> None:
        task.held -= 1
        task.hand.discard(i)
        self._in_flight -= 1
        if task.open_at < 0 and task.held <= self._reopen and not task.leaving:
            self._reopened(task)
            if self._queue:
                self._hand_out()

    def _reopened(self, task: _Task) -> None:
        task.open_at = len(self._open)
        self._open.append(task)

    def _close(self, task: _Task) -> None:
        if task.open_at < 0:
            return
        last = self._open.pop()
        if last is not task:
            self._open[task.open_at] = last
            last.open_at = task.open_at
        task.open_at = -1

    # ---- a message's way

    def _fetch(self, task: _Task, i: int) -> None:
        task.downloading += 1
        task.link_free = max(task.link_free, self._now) + self._transfer[i]  # the task's share of the network
        arrives = self._now + self._download[i] + self._transfer[i]
        self._at(max(arrives, task.link_free), self._downloaded, task, i)

    def _downloaded(self, task: _Task, i: int) -> None:
        if task.dead:
            return
        task.downloading -= 1
        if task.to_download:
            self._fetch(task, task.to_download.popleft())
        if self._errors and self._random.random() < self._errors:
            spread = 1 + RETRY_SPREAD * (2 * self._random.random() - 1)
            self._put_back(i, min(RETRY_S * 2 ** self._attempts[i], RETRY_CAP_S) * spread)
            self._release(task, i)
        elif task.decoding < self._servers:
            task.decoding += 1
            self._at(self._now + self._decode[i], self._decoded, task, i)
        else:
            task.to_decode.append(i)

    def _decoded(self, task: _Task, i: int) -> None:
        if task.dead:
            return
        if task.to_decode:
            following = task.to_decode.popleft()
            self._at(self._now + self._decode[following], self._decoded, task, following)
        else:
            task.decoding -= 1
        task.ready.append((self._now, i))
        self._form(task)

    def _form(self, task: _Task, _what: Any = None) -> None:
        """Form the batches that may leave now: full, or as old as the first sample may get."""
        size, ready = self._worker.batch_size, task.ready
        while ready and not task.dead and not (task.computing and len(task.staged) >= self._ahead):
            if len(ready) < size:
                leaves = ready[0][0] + self._worker.max_wait_s
                if leaves > self._now + _EPS:
                    if task.timer < leaves:
                        task.timer = leaves
                        self._at(leaves, self._form, task)
                    return
            batch = [ready.popleft()[1] for _ in range(min(size, len(ready)))]
            if task.computing:
                task.staged.append(batch)
            else:
                self._compute(task, batch)

    def _compute(self, task: _Task, batch: list[int]) -> None:
        task.computing = True
        took = self._batch_table[len(batch)]
        self._batches += 1
        self._batched += len(batch)
        self._busy += took
        self._at(self._now + took, self._computed, task, batch)

    def _computed(self, task: _Task, batch: list[int]) -> None:
        if task.dead:
            return
        task.computing = False
        if task.staged:
            self._compute(task, task.staged.popleft())
        self._form(task)
        for i in batch:
            if task.calling < self._callbacks:
                task.calling += 1
                self._at(self._now + self._call[i], self._answered, task, i)
            else:
                task.to_call.append(i)

    def _answered(self, task: _Task, i: int) -> None:
        if task.dead:
            return
        self._done[i] = self._now
        if int(self._now) != task.second:
            self._tune(task)
        task.answers += 1
        if task.to_call:
            following = task.to_call.popleft()
            self._at(self._now + self._call[following], self._answered, task, following)
        else:
            task.calling -= 1
        self._release(task, i)

    def _tune(self, task: _Task) -> None:
        """A worker's look at its own pace, once a second, which bounds its queues (:mod:`cvworker.tuning`).

        The places of its waiting calls are taken from that bound: the larger it is the more calls wait, and the more of
        what arrives this worker gets.
        """
        if self._queue and task.rate:
            task.rate += SMOOTHING * (task.answers - task.rate)
        else:
            task.rate = max(task.rate, task.answers)
        task.second, task.answers = int(self._now), 0
        task.calls = self._calls(task.rate)

    def _calls(self, rate: float) -> int:
        worker = self._worker
        size = worker.max_queue_size
        if size is None:
            size = queue_limit(
                rate, visibility=worker.visibility_s, batch_size=worker.batch_size, downloads=LEAST_DOWNLOADS
            )
        return min(RECEIVE_THREADS, -(-size // RECEIVE_BATCH))

    def _put_back(self, i: int, delay: float) -> None:
        self._attempts[i] += 1
        self._hidden += 1
        self._at(self._now + delay, self._visible_again, self._nobody, i)

    def _visible_again(self, _task: _Task, i: int) -> None:
        self._hidden -= 1
        self._queue.append(i)
        self._hand_out()

    # ---- workers come and go

    def _begin(self) -> None:
        task = _Task()
        task.calls = self._calls(0.0)
        self._tasks.append(task)
        self._reopened(task)
        rate = self._fleet.scaling.interruptions_per_hour
        if rate > 0 and self._fleet.scaling.on_demand is not None:
            self._at(self._now + self._random.expovariate(rate / 3600), self._interrupted, task)

    def _look(self, _task: _Task, _what: Any) -> None:
        """The minute's look at the queue."""
        fleet = self._fleet
        self._advance()
        for _ in range(fleet.look(self._now, len(self._queue), self._in_flight + self._hidden)):
            self._leave(self._tasks.pop())
        self._at(self._now + LOOK_S, self._look, self._nobody)
        self._await_ready()

    def _await_ready(self) -> None:
        if self._fleet.next_ready < self._now + LOOK_S:
            self._at(self._fleet.next_ready, self._started, self._nobody)

    def _started(self, _task: _Task, _what: Any) -> None:
        self._advance()
        self._await_ready()

    def _advance(self) -> None:
        if begun := self._fleet.advance(self._now):
            for _ in range(begun):
                self._begin()
            self._hand_out()

    def _leave(self, task: _Task) -> None:
        """It receives no more, and ends with what it holds."""
        self._close(task)
        task.leaving = True

    def _interrupted(self, task: _Task, _what: Any) -> None:
        """A spot machine goes: in order where there was notice; without, what it held comes back when it is due."""
        fleet = self._fleet
        if task.leaving or not fleet.scaling.spot_tasks(fleet.active):
            return
        self._advance()
        fleet.interrupted(self._now, 1)
        self._tasks.remove(task)
        self._leave(task)
        self._await_ready()
        if self._random.random() < self._without_notice:
            task.dead = True
            for i in sorted(task.hand):
                self._in_flight -= 1
                self._put_back(i, self._worker.visibility_s * (0.5 + 0.5 * self._random.random()))
