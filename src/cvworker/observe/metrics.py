"""What the worker counts and times, in Prometheus' terms."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from cvworker.errors import error_codes
from cvworker.observe.history import History
from cvworker.sqs.outcome import End

if TYPE_CHECKING:
    from types_boto3_sqs.type_defs import MessageTypeDef

    from cvworker.errors import JobError
    from cvworker.job import Job

STAGES = ("receive", "download", "preprocess", "process", "callback")
QUEUES = ("download", "inference", "results")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LONG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
COPY_SECONDS = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CODE_CLASSES = ("2xx", "3xx", "4xx", "5xx", "timeout", "error", "refused")
SQS_OPERATIONS = ("receive", "delete", "change_visibility", "get_attributes")
CARRIED = 30
"""Looks over which the share of one long piece of work may be spread."""
RECENT = 1000
"""Messages whose latency and timings the status shows quantiles of."""
EXAMPLES, LONGEST_EXAMPLE = 20, 300
"""Errors that the status shows, and characters of each."""
AGE_LOOKS = 60
"""Looks, one a second, over which the oldest message counts: an old one may be here for an instant only."""


class Metrics:
    """Counters and histograms with a registry of their own, so that two workers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.messages = Counter("cvworker_messages", "Messages ended", ["outcome"], registry=registry)
        self.errors = Counter("cvworker_errors", "Errors answered or retried", ["code"], registry=registry)
        self.pipelines = Gauge("cvworker_pipelines", "Pipelines that take messages", registry=registry)
        self.backlog = Gauge(
            "cvworker_backlog_messages", "Messages in SQS, by its own count", ["state"], registry=registry
        )
        self.oldest = Gauge(
            "cvworker_oldest_message_age_seconds",
            "Age of the oldest message held in the last minute",
            registry=registry,
        )
        self.inflight = Gauge("cvworker_inflight_messages", "Messages held", registry=registry)
        self.queue_depth = Gauge("cvworker_queue_depth", "Jobs waiting", ["queue"], registry=registry)
        self.queue_limit = Gauge("cvworker_queue_limit", "Bound of the queue", ["queue"], registry=registry)
        self.stage_duration = Histogram(
            "cvworker_stage_duration_seconds", "Time in a stage", ["stage"], registry=registry, buckets=SECONDS
        )
        self.stage_busy = Gauge(
            "cvworker_stage_busy_ratio",
            "Share of a stage's capacity in use over the last seconds",
            ["stage"],
            registry=registry,
        )
        self.queue_wait = Histogram(
            "cvworker_queue_wait_seconds", "Sent to received", registry=registry, buckets=LONG_SECONDS
        )
        self.end_to_end = Histogram(
            "cvworker_end_to_end_seconds", "Sent to answered", registry=registry, buckets=LONG_SECONDS
        )
        self.batch_size = Histogram("cvworker_batch_size", "Samples in a batch", registry=registry, buckets=BATCHES)
        self.to_device = Histogram(
            "cvworker_to_device_seconds",
            "Copy of a batch to a CUDA device",
            registry=registry,
            buckets=COPY_SECONDS,
        )
        self.callbacks = Counter("cvworker_callbacks", "Callback requests", ["code_class"], registry=registry)
        self.sqs_requests = Counter(
            "cvworker_sqs_requests", "Calls to SQS", ["operation", "outcome"], registry=registry
        )
        self.extensions = Counter("cvworker_visibility_extensions", "Leases extended", registry=registry)
        self.leases_lost = Counter("cvworker_leases_lost", "Leases lost or let go", registry=registry)
        self.restarts = Counter("cvworker_model_restarts", "Model processes brought back", registry=registry)
        self._begin_at_zero()
        for stage in STAGES:
            self.stage_duration.labels(stage)
            self.stage_busy.labels(stage)
        # Looked up once: `labels` takes as long as counting does.
        self._stage = {stage: self.stage_duration.labels(stage) for stage in STAGES}
        self._callbacks = {code_class: self.callbacks.labels(code_class) for code_class in CODE_CLASSES}
        self._ended = {end: self.messages.labels(end.value) for end in End}
        self.busy = Busy()
        self.recent: deque[tuple[float, dict[str, float]]] = deque(maxlen=RECENT)
        self.history = History()
        self.examples: deque[dict[str, Any]] = deque(maxlen=EXAMPLES)
        self._ages: deque[float] = deque(maxlen=AGE_LOOKS)
        self._longest_wait = 0.0
        self.answered_in_all = 0
        ProcessCollector(registry=registry)

    def _begin_at_zero(self) -> None:
        """A counter that first appears with a 1 has not grown, for Prometheus, and no alert would see it."""
        for end in End:
            self.messages.labels(end.value)
        for code in error_codes():
            self.errors.labels(code)
        for code_class in CODE_CLASSES:
            self.callbacks.labels(code_class)
        for operation in SQS_OPERATIONS:
            for outcome in ("ok", "error"):
                self.sqs_requests.labels(operation, outcome)

    def watch_model_process(self, pid: Callable[[], int | None]) -> None:
        """Tell memory and CPU of the process that ``pid`` names at each scrape, too."""
        ProcessCollector(namespace="cvworker_model", pid=lambda: pid() or -1, registry=self.registry)

    def timed(self, stage: str, seconds: float) -> None:
        """Count one piece of work of a stage."""
        self._stage[stage].observe(seconds)
        self.busy.add(stage, seconds)

    def received(self, outcome: str, seconds: float, messages: int) -> None:
        """One receive call returned; one that found nothing only waited, and was not busy."""
        self.sqs_requests.labels("receive", outcome).inc()
        self._stage["receive"].observe(seconds)
        if messages:
            self.busy.add("receive", seconds)

    def sqs_called(self, operation: str, outcome: str) -> None:
        """A call that settles or extends messages returned."""
        self.sqs_requests.labels(operation, outcome).inc()

    def admitted(self, message: MessageTypeDef, now: float) -> None:
        """A message was received at ``now``, seconds since the epoch."""
        sent = float(message.get("Attributes", {}).get("SentTimestamp", now * 1000)) / 1000
        waited = max(0.0, now - sent)
        self._longest_wait = max(self._longest_wait, waited)
        self.queue_wait.observe(waited)

    def batch_done(self, size: int, seconds: float, to_device: float | None) -> None:
        """A batch was computed. Its copy to the device, where there was one, ran beside the batch before it."""
        self.batch_size.observe(size)
        if to_device is not None:
            self.to_device.observe(to_device)
        self.timed("process", seconds)

    def called_back(self, code_class: str, seconds: float) -> None:
        """One callback request ended, in a status or in ``timeout``, ``error`` or ``refused``."""
        (self._callbacks.get(code_class) or self.callbacks.labels(code_class)).inc()
        self.timed("callback", seconds)

    def answered(self, timings_ms: Mapping[str, float]) -> None:
        """A callback was accepted, for a job with these timings."""
        self.recent.append((time.monotonic(), dict(timings_ms)))
        self.answered_in_all += 1

    def ended(self, end: End) -> None:
        """A message came to an end."""
        self._ended[end].inc()

    def erred(self, job: Job, error: JobError) -> None:
        """An error was met: answered, or a reason to try again."""
        self.errors.labels(error.code).inc()
        self.examples.append(
            {
                "at": round(time.time(), 1),
                "code": error.code,
                "message": error.message[:LONGEST_EXAMPLE],
                "id": job.request.id,
                "message_id": job.lease.message_id,
            }
        )

    def look(self, oldest_age: float) -> None:
        """Once a second: what is told of the last minutes. ``oldest_age`` is that of the oldest message held now."""
        longest, self._longest_wait = self._longest_wait, 0.0
        self._ages.append(max(oldest_age, longest))
        self.oldest.set(max(self._ages))
        self.history.look(time.monotonic(), self.answered_in_all, self.recent)

    def oldest_age(self) -> float:
        """Seconds since the oldest message was sent that was held within the last minute."""
        return max(self._ages, default=0.0)

    def done(self) -> dict[str, float]:
        """What each stage has done in all: messages received, images, callback requests; and the batches."""
        counts = {
            stage: _sample(self.stage_duration, "_count", stage=stage)
            for stage in ("download", "preprocess", "callback")
        }
        received, samples = _sample(self.queue_wait, "_count"), _sample(self.batch_size, "_sum")
        batches = _sample(self.batch_size, "_count")
        return {"receive": received, **counts, "process": samples, "batches": batches}

    def lease_event(self, what: str, count: int) -> None:
        (self.extensions if what == "extended" else self.leases_lost).inc(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def totals(self, counter: Counter) -> dict[str, float]:
        """A counter's values by label, those that are not zero."""
        return {
            ",".join(sample.labels.values()): sample.value
            for metric in counter.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.value
        }

    def total(self, counter: Counter) -> float:
        """The value of a counter without labels."""
        return _sample(counter, "_total")

    def quantiles(self) -> dict[str, dict[str, float]]:
        """p50 and p95 of the last messages' timings, in milliseconds."""
        rows = list(self.recent)
        found: dict[str, dict[str, float]] = {}
        for name in sorted({name for _, timings in rows for name in timings}):
            values = sorted(timings[name] for _, timings in rows if name in timings)
            found[name] = {"p50": values[len(values) // 2], "p95": values[int(len(values) * 0.95)]}
        return found

    def rate(self, seconds: float = 10.0) -> float:
        """Messages answered a second, over the last ``seconds``."""
        now = time.monotonic()
        rows = [at for at, _ in self.recent if now - at <= seconds]
        if not rows:
            return 0.0
        span = seconds if len(self.recent) < RECENT else max(now - rows[0], 0.001)
        return len(rows) / span


def _sample(metric: Counter | Histogram, suffix: str, **labels: str) -> float:
    """One sample's value; 0 where it is not there yet."""
    return next(
        (
            s.value
            for family in metric.collect()
            for s in family.samples
            if s.name.endswith(suffix) and s.labels == labels
        ),
        0.0,
    )


class Busy:
    """Seconds of work by stage, turned into the share of the capacity used since the last look."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self.ratios = dict.fromkeys(STAGES, 0.0)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    def look(self, capacity: Mapping[str, float]) -> dict[str, float]:
        now = time.monotonic()
        with self._lock:
            elapsed = max(now - self._looked_at, 1e-6)
            self._looked_at = now
            seconds, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        for stage, work in seconds.items():
            most = elapsed * max(capacity[stage], 1.0)
            ratio = min(1.0, work / most)
            if work > most:  # work longer than a look is counted when it ends: it was done before, and counts on
                self.add(stage, min(work - most, CARRIED * most))
            self.ratios[stage] = round(0.7 * self.ratios[stage] + 0.3 * ratio, 4)  # smoothed over some seconds
        return self.ratios
