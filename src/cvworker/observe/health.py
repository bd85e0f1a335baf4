"""Whether the worker is alive, whether it is ready, and what it is doing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any


class Health:
    """Collects the reasons not to be alive or ready; no reason means all is well."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._alive: list[Callable[[], str | None]] = []
        self._ready: list[Callable[[], str | None]] = []
        self.stopping = False

    def watch(self, threads: Iterable[threading.Thread]) -> None:
        """These threads must live for as long as the worker does."""
        self._threads.extend(threads)

    def alive_if(self, check: Callable[[], str | None]) -> None:
        """``check`` returns what is wrong, or None."""
        self._alive.append(check)

    def ready_if(self, check: Callable[[], str | None]) -> None:
        """``check`` returns what is missing, or None."""
        self._ready.append(check)

    def dead_threads(self) -> list[str]:
        if self.stopping:
            return []
        return [f"thread {thread.name} has ended" for thread in self._threads if not thread.is_alive()]

    def problems(self) -> list[str]:
        """For ``/livez``: a step has stalled or a thread died."""
        return self.dead_threads() + _reasons(self._alive)

    def missing(self) -> list[str]:
        """For ``/readyz``: the model is not warm, the queue cannot be reached, the worker stops."""
        return (["stopping"] if self.stopping else []) + _reasons(self._ready)


def _reasons(checks: Iterable[Callable[[], str | None]]) -> list[str]:
    return [reason for check in checks if (reason := check()) is not None]


def status(worker: Any) -> dict[str, Any]:
    """What ``/status.json`` tells. No URL's query string and no secret is among it."""
    metrics, settings = worker.metrics, worker.settings
    ready = worker.inference.ready
    return {
        "version": worker.version,
        "state": worker.state,
        "uptime_s": round(worker.uptime(), 1),
        "problems": worker.health.problems(),
        "missing": worker.health.missing(),
        "queue": {"url": worker.queue.url, "reachable": worker.receiver.reachable, "max_receives": worker.queue.max_receives},
        "model": {
            "module": ready.get("name"),
            "device": ready.get("device_name"),
            "precision": ready.get("precision"),
            "weights": ready.get("weights"),
            "restarts": worker.inference.restarts,
            "pid": worker.inference.pid,
        },
        "held": len(worker.leases),
        "image_bytes": worker.arena.used,
        "queues": {queue.name: {"depth": len(queue), "limit": queue.limit} for queue in worker.queues},
        "in_hand": {
            "download": worker.downloading(),
            "model": len(worker.inference),
            "callback": len(worker.answering) if worker.answering else 0,
        },
        "download_concurrency": worker.tuner.downloads,
        "rate_per_s": round(metrics.rate(), 2),
        "pace_per_s": round(worker.tuner.pace.rate, 2),
        "busy": dict(metrics.busy.ratios),
        "latency_ms": metrics.quantiles(),
        "messages": metrics.totals(metrics.messages),
        "errors": metrics.totals(metrics.errors),
        "callbacks": metrics.totals(metrics.callbacks),
        "settings": settings.shown(),
    }
