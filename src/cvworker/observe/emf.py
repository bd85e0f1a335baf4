"""A line a minute in CloudWatch's embedded metric format, from which CloudWatch Logs makes metrics: no agent, no calls.

The format is https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import structlog

from cvworker import __version__
from cvworker.clock import Clock

PERIOD_S = 60.0
"""CloudWatch's own resolution: a metric's values of a minute become one point."""
UNITS = {"Backlog": "Count", "MessagesPerSecond": "Count/Second", "OldestMessageAge": "Seconds", "Errors": "Count"}
DIMENSIONS = ("Queue",)
"""One set of one dimension: each combination of values is a metric to be paid for."""


class Emf:
    """Writes what ``status`` says, the answer of ``/status.json``, as one line a minute.

    Several pipelines' status is already their sum, so one line is right for any number of them. Over several workers,
    the statistics to look at are the maximum of ``Backlog`` and ``OldestMessageAge`` and the sum of the others.
    """

    def __init__(
        self,
        namespace: str,
        status: Callable[[], dict[str, Any]],
        clock: Clock,
        write: Callable[[str], object] | None = None,
    ) -> None:
        self._namespace = namespace
        self._status = status
        self._clock = clock
        self._write = write or structlog.WriteLogger(sys.stdout).msg  # under the same lock as the log's lines
        self._answered = self._errors = 0.0

    async def run(self) -> None:
        """Until cancelled; then what has come since the last line is told, too."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                self.tell()
        finally:
            self.tell(only_news=True)

    def tell(self, *, only_news: bool = False) -> None:
        """Write the line of the time since the last one; with ``only_news`` only if anything was done in it."""
        status = self._status()
        answered, errors = status["messages"].get("answered", 0.0), sum(status["errors"].values())
        new_answers, new_errors = answered - self._answered, errors - self._errors
        if only_news and not new_answers and not new_errors:
            return
        self._answered, self._errors = answered, errors
        values = {
            "Backlog": status["backlog"]["visible"],
            # Over the whole minute, also where the last line is of less: the sum of a minute's values stays right.
            "MessagesPerSecond": round(new_answers / PERIOD_S, 3),
            "OldestMessageAge": status["leases"]["oldest_s"],
            "Errors": new_errors,
        }
        known = {name: value for name, value in values.items() if value is not None}
        self._write(json.dumps(self._line(status, known), ensure_ascii=True))

    def _line(self, status: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
        directive = {
            "Namespace": self._namespace,
            "Dimensions": [list(DIMENSIONS)],
            "Metrics": [{"Name": name, "Unit": UNITS[name]} for name in values],
        }
        return {
            "_aws": {"Timestamp": int(self._clock.wall() * 1000), "CloudWatchMetrics": [directive]},
            "Queue": str(status["queue"]["url"]).rpartition("/")[2],
            "Module": status["model"]["module"],
            "Version": __version__,
            "Held": status["held"],
            **values,
        }
