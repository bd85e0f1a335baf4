"""What an expression of Prometheus' language asks for, and what a worker exports."""

from __future__ import annotations

import re
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from cvworker.observe.metrics import Metrics

WORDS = {"and", "or", "unless", "bool", "offset", "group_left", "group_right"}
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?(\s*\()?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')

Exported = dict[str, dict[str, set[str]]]
"""Each sample's name, with the values of each of its labels."""


def selectors(expression: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Each metric that is asked for, with its matchers: label, operator, value."""
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", expression)
    bare = re.sub(r"\[[^\]]*\]|\b[0-9.]+(e[0-9]+)?\b", " ", bare)
    found = []
    for name, matchers, called in SELECTOR.findall(bare):
        if not called and name not in WORDS:
            found.append((name, MATCHER.findall(matchers)))
    return found


def grouping(expression: str) -> set[str]:
    """The labels that it groups or matches by."""
    lists = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}


def exported(text: str) -> Exported:
    """What an exposition has."""
    found: Exported = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found[sample.name]
            for label, value in sample.labels.items():
                labels[label].add(value)
    return found


def of_the_registry() -> Exported:
    """What a worker would export, without one running."""
    metrics = Metrics()
    metrics.watch_model_process(lambda: None)
    for state in ("visible", "hidden", "delayed"):
        metrics.backlog.labels(state).set(0)
    for queue in ("download", "inference", "results"):
        metrics.queue_depth.labels(queue).set(0)
        metrics.queue_limit.labels(queue).set(0)
    found = exported(metrics.text().decode())
    for name in [name for name in found if name.startswith("process_")]:  # the same for another process, not there now
        found["cvworker_model_" + name] = found[name]
    return found


def wrong_with(expression: str, there: Exported, of_prometheus: set[str]) -> list[str]:
    """What it asks for that is not exported; Prometheus itself adds some labels."""
    problems, asked = [], selectors(expression)
    if not asked:
        problems.append("asks for no metric")
    known: set[str] = set(of_prometheus)
    for name, matchers in asked:
        if name not in there:
            problems.append(f"{name} is not exported")
            continue
        known |= set(there[name])
        for label, operator, value in matchers:
            if label in of_prometheus:
                continue
            if label not in there[name]:
                problems.append(f"{name} has no label {label}")
            asked_for = value.split("|") if "~" in operator else [value]
            problems += [f"{name} has no {label}={one}" for one in asked_for if one not in there[name].get(label, ())]
    problems += [f"groups by {label}, which is not there" for label in grouping(expression) - known]
    return problems
