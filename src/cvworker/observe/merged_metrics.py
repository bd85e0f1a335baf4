"""The metrics of several pipelines as those of one worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

Reading = list[Metric]
TOTALS = ("counter", "histogram")
BEGUN = "_created"
"""When a counter began to count, which the exposition has as a gauge."""
EARLIEST = (BEGUN, "_start_time_seconds")
SEEN_BY_ALL = ("cvworker_backlog_messages", "cvworker_oldest_message_age_seconds")
"""Not each pipeline's own: the most that one says."""


def read(text: str) -> Reading:
    """What one pipeline's ``/metrics`` would say."""
    return list(text_string_to_metric_families(text))


def add(readings: Iterable[Reading]) -> Reading:
    """Amounts and limits are summed, ratios averaged; a counter began when the first of them did.

    Of what all see alike, such as the queue's length, the largest counts.
    """
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], list[float]]] = {}
    for family in (family for reading in readings for family in reading):
        families.setdefault(family.name, family)
        samples = values.setdefault(family.name, {})
        for sample in family.samples:
            samples.setdefault((sample.name, frozenset(sample.labels.items())), []).append(sample.value)
    return [_family(families[name], samples) for name, samples in values.items()]


def totals(reading: Reading) -> Reading:
    """What is still true of a pipeline that has ended: what it counted, and not what it held."""
    return [family for family in reading if family.type in TOTALS or family.name.endswith(BEGUN)]


def write(reading: Reading) -> bytes:
    """The exposition."""
    registry = CollectorRegistry()
    registry.register(_Given(reading))
    return generate_latest(registry)


class _Given(Collector):
    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        return iter(self._reading)


def _family(like: Metric, samples: dict[tuple[str, frozenset[tuple[str, str]]], list[float]]) -> Metric:
    family = Metric(like.name, like.documentation, like.type)
    for (name, labels), values in samples.items():
        family.add_sample(name, dict(sorted(labels)), _together(like.name, values))
    return family


def _together(name: str, values: Sequence[float]) -> float:
    if name.endswith("_ratio"):
        return sum(values) / len(values)
    if name in SEEN_BY_ALL:
        return max(values)
    return min(values) if name.endswith(EARLIEST) else sum(values)
