"""What several pipelines say in ``/status.json``, in the shape in which one worker says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cvworker.observe import history
from cvworker.observe.metrics import EXAMPLES, STAGES

Status = dict[str, Any]

EMPTY: Status = {
    "queue": {"url": None, "reachable": None, "max_receives": None},
    "model": {
        "module": None,
        "device": None,
        "precision": None,
        "weights": None,
        "restarts": 0,
        "pid": None,
        "preprocess_workers": 0,
    },
    "backlog": {"visible": None, "hidden": None, "delayed": None},
    "held": 0,
    "image_bytes": 0,
    "queues": {},
    "in_hand": {"download": 0, "model": 0, "callback": 0},
    "download_concurrency": 0,
    "rate_per_s": 0.0,
    "pace_per_s": 0.0,
    "busy": {},
    "latency_ms": {},
    "messages": {},
    "errors": {},
    "callbacks": {},
    "done": dict.fromkeys((*STAGES, "batches"), 0.0),
    "leases": {"extended": 0.0, "lost": 0.0, "oldest_s": None},
    "history": history.EMPTY,
    "examples": [],
}
"""What is said before any pipeline has said something."""
COUNTED = ("messages", "errors", "callbacks", "done", "examples")
RATIOS = ("busy",)
SUMMED_IN_MODEL = ("restarts", "preprocess_workers")
WORST = ("p95", "oldest_s")


def merge(statuses: Sequence[Status]) -> Status:
    """Amounts, limits and rates are summed; shares are averaged; what should be the same in all is said once.

    Quantiles cannot be had from quantiles: p50 is the mean of theirs, p95 the worst.
    """
    merged: Status = _merge((), [EMPTY, *statuses])
    alive = [each for each in statuses if "queue" in each]
    merged["queue"]["reachable"] = bool(alive) and all(each["queue"]["reachable"] for each in alive)
    merged["history"] = history.together([each["history"] for each in statuses if "history" in each])
    examples = [example for each in statuses for example in each["examples"]]
    merged["examples"] = sorted(examples, key=lambda example: float(example["at"]))[-EXAMPLES:]
    return merged


def totals(status: Status) -> Status:
    """What is still true of a pipeline that has ended: what it counted, and not what it held."""
    counted = {name: status[name] for name in COUNTED}
    leases = {name: status["leases"][name] for name in ("extended", "lost")}
    return {**counted, "leases": leases, "model": {"restarts": status["model"]["restarts"]}}


def _merge(path: tuple[str, ...], values: list[Any]) -> Any:
    if all(isinstance(value, dict) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _merge((*path, name), [value[name] for value in values if name in value]) for name in names}
    there = [value for value in values if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        return _same(there)
    if path[0] == "queue" or (path[0] == "model" and path[-1] not in SUMMED_IN_MODEL):
        return _same(there)
    if path[0] == "backlog" or path[-1] in WORST:  # a backlog is the queue's, and not each pipeline's own
        return max(there, default=None)
    if path[0] in RATIOS or path[-1] == "p50":
        return round(sum(there) / len(there), 4) if there else 0.0
    return round(sum(there), 4)


def _same(values: list[Any]) -> Any:
    """The one value there is; several texts one beside the other, and None where that would make no sense."""
    unique = [value for at, value in enumerate(values) if value not in values[:at]]
    if len(unique) == 1:
        return unique[0]
    return " / ".join(unique) if unique and all(isinstance(value, str) for value in unique) else None
