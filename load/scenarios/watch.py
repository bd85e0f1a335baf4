"""What the workers say of themselves, and what their processes take, now and then while they run."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Sequence
from typing import Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from cvworker.bench import tree
from cvworker.embedded.demo_worker import DemoWorker

LOOK_S = 0.5
"""Between two looks at ``/status.json``; one costs the worker about two milliseconds."""
SIZE_LOOKS = 4
"""Memory, threads and descriptors are looked at each so many looks: reading them costs the same cores."""
WAITING = ("download", "inference", "results")
IN_HAND = ("download", "model", "callback")
COUNTERS = {
    "batches": "cvworker_batch_size_count",
    "samples": "cvworker_batch_size_sum",
    "copies": "cvworker_to_device_seconds_count",
    "copies_s": "cvworker_to_device_seconds_sum",
    "callbacks": "cvworker_stage_duration_seconds_count callback",
    "callback_s": "cvworker_stage_duration_seconds_sum callback",
    "restarts": "cvworker_model_restarts_total",
    "later": "cvworker_messages_total later",
    "left": "cvworker_messages_total left",
    "lost": "cvworker_messages_total lost",
    "extensions": "cvworker_visibility_extensions_total",
}


class Watch:
    """Looks as long as its context lasts; :meth:`found` has the looks as columns, seconds counting from ``began``."""

    def __init__(self, workers: Sequence[DemoWorker], every: float = LOOK_S) -> None:
        self._workers, self._every = workers, every
        self._looks: list[dict[str, float]] = []
        self._sizes: list[dict[str, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def found(self, began: float, ended: float) -> dict[str, dict[str, list[float]]]:
        """``looks``: messages waiting and in hand; ``sizes``: bytes, threads, descriptors. All workers together."""
        return {"looks": _columns(self._looks, began, ended), "sizes": _columns(self._sizes, began, ended)}

    def _run(self) -> None:
        number = 0
        while not self._over.wait(self._every) and self._workers:
            try:
                self._looks.append(_look(self._workers))
            except (OSError, ValueError, KeyError):  # one of them is busy, or ends: the run will tell
                continue
            if number % SIZE_LOOKS == 0:
                self._sizes.append(sizes(self._workers))
            number += 1


def counters(workers: Sequence[DemoWorker]) -> dict[str, float]:
    """What the workers have counted so far, and the CPU seconds of all their processes."""
    total = dict.fromkeys(COUNTERS, 0.0)
    for worker in workers:
        metrics = scrape(worker.url)
        for name, metric in COUNTERS.items():
            total[name] += metrics.get(metric, 0.0)
    return total | {"cpu_s": sum(sum(tree.cpu_seconds(worker.pid).values()) for worker in workers)}


def sizes(workers: Sequence[DemoWorker]) -> dict[str, float]:
    """Bytes of memory (shared pages once), threads and open descriptors of all processes of the workers."""
    now = {"at": time.monotonic(), "memory_bytes": 0.0, "threads": 0.0, "descriptors": 0.0}
    for worker in workers:
        now["memory_bytes"] += tree.pss_bytes(worker.pid)
        for each in tree.members(worker.pid):
            try:
                now["threads"] += each.num_threads()
                now["descriptors"] += each.num_fds()
            except psutil.Error:  # it has just ended
                pass
    return now


def _look(workers: Sequence[DemoWorker]) -> dict[str, float]:
    now = {"at": time.monotonic()}
    for worker in workers:
        status = json.loads(fetch(f"{worker.url}status.json"))
        for name in WAITING:
            now[f"{name}_queue"] = now.get(f"{name}_queue", 0) + status["queues"][name]["depth"]
        for name in IN_HAND:
            now[f"in_{name}"] = now.get(f"in_{name}", 0) + status["in_hand"][name]
        now["held"] = now.get("held", 0) + status["held"]
    return now


def _columns(looks: Sequence[dict[str, float]], began: float, ended: float) -> dict[str, list[float]]:
    kept = [each for each in looks if began <= each["at"] <= ended]
    names = kept[0] if kept else {}
    return {
        name: [round(each[name] - began, 3) if name == "at" else round(each[name]) for each in kept] for name in names
    }


def scrape(url: str) -> dict[str, float]:
    """The metrics of the worker at ``url``, by name and label values, as in ``cvworker_messages_total later``."""
    families = text_string_to_metric_families(fetch(f"{url}metrics"))
    samples = (sample for family in families for sample in family.samples if not sample.name.endswith("_bucket"))
    return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


def fetch(url: str) -> str:
    """What is at ``url``, as text."""
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310
        return str(response.read().decode())
