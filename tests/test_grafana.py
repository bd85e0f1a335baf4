"""The dashboard: importable, complete, and every panel asks for what a worker exports."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from promql import of_the_registry, wrong_with

FILE = Path(__file__).parent.parent / "deploy" / "grafana" / "cvworker.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [each for each in DASHBOARD["panels"] if each["type"] != "row"]
ROWS = [each["title"] for each in DASHBOARD["panels"] if each["type"] == "row"]
VARIABLES = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}


def expressions() -> list[tuple[str, str]]:
    """Each panel's expressions, as Grafana would send them."""
    found = []
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression))
    return found


def test_it_has_a_row_for_everything_that_is_asked_at_night() -> None:
    wanted = ["throughput and backlog", "latency", "errors", "queues and limits", "callbacks", "sqs requests", "proc"]
    assert [title.lower().startswith(part) for title, part in zip(ROWS, wanted, strict=True)] == [True] * len(wanted)


def test_the_data_source_is_a_variable_of_every_panel() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for each in (*PANELS, *(target for panel in PANELS for target in panel["targets"])):
        assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert set(re.findall(r"\$(\w+)", FILE.read_text())) <= {*variables, "__rate_interval", "__all"}


def test_it_can_be_imported_beside_others() -> None:
    assert DASHBOARD["uid"] == "cvworker"
    assert "id" not in DASHBOARD, "the id is a database's own"
    ids = [each["id"] for each in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(each["title"] and each["targets"] for each in PANELS)
    assert all(each["fieldConfig"]["defaults"]["unit"] for each in PANELS)


def test_no_panel_lies_on_another() -> None:
    places = [each["gridPos"] for each in DASHBOARD["panels"]]
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"], (one, other)
    assert all(each["x"] + each["w"] <= 24 for each in places)


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_each_expression_asks_for_what_is_exported(title: str, expression: str) -> None:
    assert wrong_with(expression, of_the_registry(), {"job", "instance", "le"}) == [], title


def test_variables_ask_for_what_is_exported() -> None:
    asked = [re.findall(r"label_values\((\w+)", each.get("definition", "")) for each in DASHBOARD["templating"]["list"]]
    assert {name for names in asked for name in names} <= set(of_the_registry())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: Debian's prometheus")
def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": expression} for n, (_, expression) in enumerate(expressions())]
    file = tmp_path / "panels.json"  # which is YAML, too
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
