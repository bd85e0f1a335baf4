"""The alerts: each asks for what is exported, fires on what it names, and says where to read on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from promql import Exported, exported, of_the_registry, selectors, wrong_with
from world import WorkerProcess, fetch, poll, world

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "cvworker.rules.yaml"
CASES = FOLDER / "cvworker.rules.test.yaml"
ALERTS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
NAMES = [each["alert"] for each in ALERTS]
ADDED = {"job", "instance", "le"}

with_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: Debian's prometheus")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, ministack: Any) -> Iterator[WorkerProcess]:
    """A worker that has answered a message."""
    with world(tmp_path_factory.mktemp("prometheus"), sqs=ministack, name="prometheus") as here:
        worker = here.worker().ready()
        here.send(here.request(1))
        assert here.receiver.wait_for(1, 60)
        poll(lambda: worker.metric("cvworker_messages_total", outcome="answered") == 1, 20, "it is counted")
        poll(lambda: 'state="visible"' in fetch(worker.url() + "metrics"), 20, "the backlog is known")
        yield worker


@pytest.fixture(scope="module")
def scraped(worker: WorkerProcess) -> str:
    """Its ``/metrics``."""
    return fetch(worker.url() + "metrics")


def promtool(*arguments: str | Path, given: str | None = None) -> str:
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@with_promtool
def test_prometheus_takes_the_rules() -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", RULES)


@with_promtool
def test_prometheus_finds_nothing_wrong_with_what_a_worker_exports(scraped: str) -> None:
    assert promtool("check", "metrics", given=scraped) == ""


@with_promtool
def test_each_alert_fires_on_its_condition_and_not_otherwise() -> None:
    assert "SUCCESS" in promtool("test", "rules", CASES)


@pytest.mark.parametrize("name", NAMES)
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(name: str) -> None:
    tests = [each for case in yaml.safe_load(CASES.read_text())["tests"] for each in case["alert_rule_test"]]
    fires = [bool(each["exp_alerts"]) for each in tests if each["alertname"] == name]
    assert sorted(fires) == [False, True]


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_each_alert_asks_for_what_a_real_worker_exports(alert: dict[str, Any], scraped: str) -> None:
    assert wrong_with(alert["expr"], exported(scraped), ADDED) == []


def test_the_registry_has_what_a_real_worker_exports(scraped: str) -> None:
    real: Exported = exported(scraped)
    assert {name for name in real if not name.endswith("_created")} <= set(of_the_registry())


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_each_alert_says_what_is_wrong_and_where_to_read_what_to_do(alert: dict[str, Any]) -> None:
    notes = alert["annotations"]
    assert notes["summary"].startswith(("{{ $labels.job }}: ", "{{ $labels.instance }}: "))
    assert "{{ $value" in notes["description"]
    assert alert["labels"]["severity"] in ("info", "warning", "critical")
    page, _, anchor = notes["runbook_url"].partition("#")
    assert anchor == alert["alert"].lower()
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_what_is_asked_for_would_be_found_wrong() -> None:
    there = of_the_registry()
    assert selectors('sum by (job) (rate(a_total{b="c"}[5m])) / on (job) x > 0.5') == [
        ("a_total", [("b", "=", "c")]),
        ("x", []),
    ]
    assert wrong_with("rate(cvworker_nothing_total[5m])", there, ADDED) == ["cvworker_nothing_total is not exported"]
    assert wrong_with('cvworker_messages_total{outcome="gone"}', there, ADDED) == [
        "cvworker_messages_total has no outcome=gone"
    ]
    assert wrong_with("sum by (queue) (cvworker_pipelines)", there, ADDED) == ["groups by queue, which is not there"]


def test_a_worker_says_what_the_processes_do(worker: WorkerProcess) -> None:
    # given a worker that is well
    assert worker.metric("cvworker_pipelines") == 1
    assert worker.metric("cvworker_model_restarts_total") == 0
    assert worker.metric("process_resident_memory_bytes") > 10e6
    assert worker.metric("cvworker_model_process_resident_memory_bytes") > 100e6, "torch is in there"
    # when its model process is killed
    os.kill(worker.status()["model"]["pid"], signal.SIGKILL)
    # then that is counted
    poll(lambda: worker.metric("cvworker_model_restarts_total") == 1, 60, "the restart is counted")
