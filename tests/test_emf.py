"""CloudWatch's lines: valid by the format's specification, right for one pipeline and for several."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from cvworker.observe import merged_status
from cvworker.observe.emf import PERIOD_S, Emf
from cvworker.settings import Settings
from fakes import EPOCH, StepClock
from world import World, poll

TEXT = {"type": "string", "minLength": 1}
SIZES = [f"{much}{what}".capitalize() for what in ("bytes", "bits") for much in ("", "kilo", "mega", "giga", "tera")]
UNITS = ["Seconds", "Microseconds", "Milliseconds", "Percent", "Count", "Count/Second", "None"]  # of a MetricDatum
UNITS += [*SIZES, *(f"{size}/Second" for size in SIZES)]
SCHEMA = {  # after the specification of the embedded metric format, 2023: its limits, and which members there must be
    "type": "object",
    "required": ["_aws"],
    "properties": {
        "_aws": {
            "type": "object",
            "required": ["Timestamp", "CloudWatchMetrics"],
            "properties": {
                "Timestamp": {"type": "integer", "minimum": 0},
                "CloudWatchMetrics": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["Namespace", "Dimensions", "Metrics"],
                        "additionalProperties": False,
                        "properties": {
                            "Namespace": {**TEXT, "maxLength": 1024},
                            "Dimensions": {
                                "type": "array",
                                "minItems": 1,
                                "items": {"type": "array", "maxItems": 30, "items": {**TEXT, "maxLength": 250}},
                            },
                            "Metrics": {
                                "type": "array",
                                "minItems": 1,
                                "maxItems": 100,
                                "items": {
                                    "type": "object",
                                    "required": ["Name"],
                                    "additionalProperties": False,
                                    "properties": {
                                        "Name": {**TEXT, "maxLength": 1024},
                                        "Unit": {"enum": UNITS},
                                        "StorageResolution": {"enum": [1, 60]},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        }
    },
}


def valid(line: str) -> dict[str, Any]:
    """The document, if it is one: by the schema, and by what the specification says beyond one."""
    assert "\n" not in line
    assert len(line) < 256 * 1024
    document: dict[str, Any] = json.loads(line)
    jsonschema.validate(document, SCHEMA)
    for directive in document["_aws"]["CloudWatchMetrics"]:
        for name in (name for names in directive["Dimensions"] for name in names):
            assert isinstance(document[name], str), "a dimension's value is a text member of the document itself"
            assert 1 <= len(document[name]) <= 1024
        for metric in directive["Metrics"]:
            assert isinstance(document[metric["Name"]], int | float), "a metric's value is a number beside it"
    return document


class Minutes:
    """An Emf whose minutes pass when a test says so."""

    def __init__(self, **status: Any) -> None:
        self.status = copy.deepcopy(merged_status.EMPTY)
        self.status["queue"]["url"] = "https://sqs.eu-west-1.amazonaws.com/123456789012/images"
        self.status["model"]["module"] = "threat"
        self.status |= status
        self.lines: list[str] = []
        self.clock = StepClock()
        self.emf = Emf("Pictures/cvworker", lambda: self.status, self.clock, self.lines.append)

    def pass_one(self, **status: Any) -> dict[str, Any]:
        self.status |= status
        self.clock.advance(PERIOD_S)
        self.emf.tell()
        return valid(self.lines[-1])


def test_a_line_says_backlog_rate_age_and_errors() -> None:
    minutes = Minutes(backlog={"visible": 1500, "hidden": 40, "delayed": 2})
    said = minutes.pass_one(
        messages={"answered": 600.0, "later": 3.0},
        errors={"image_not_found": 2.0, "download_failed": 3.0},
        leases={"extended": 1.0, "lost": 0.0, "oldest_s": 42.5},
    )
    assert {name: said[name] for name in ("Backlog", "MessagesPerSecond", "OldestMessageAge", "Errors")} == {
        "Backlog": 1500,
        "MessagesPerSecond": 10.0,
        "OldestMessageAge": 42.5,
        "Errors": 5,
    }
    (directive,) = said["_aws"]["CloudWatchMetrics"]
    assert directive["Namespace"] == "Pictures/cvworker"
    assert directive["Dimensions"] == [["Queue"]]
    assert said["Queue"] == "images"
    units = {each["Name"]: each["Unit"] for each in directive["Metrics"]}
    assert units == {
        "Backlog": "Count", "MessagesPerSecond": "Count/Second", "OldestMessageAge": "Seconds", "Errors": "Count"
    }  # fmt: skip
    assert said["_aws"]["Timestamp"] == int((EPOCH + minutes.clock.now) * 1000)


def test_each_line_counts_its_own_minute() -> None:
    minutes = Minutes()
    rates = [minutes.pass_one(messages={"answered": total})["MessagesPerSecond"] for total in (60.0, 60.0, 180.0)]
    assert rates == [1.0, 0.0, 2.0]
    errors = [minutes.pass_one(errors={"download_failed": total})["Errors"] for total in (5.0, 5.0, 6.0)]
    assert errors == [5, 0, 1]


def test_what_is_not_known_is_left_out_and_not_told_as_none() -> None:
    said = Minutes().pass_one()
    assert not {"Backlog", "OldestMessageAge"} & set(said)
    assert [each["Name"] for each in said["_aws"]["CloudWatchMetrics"][0]["Metrics"]] == ["MessagesPerSecond", "Errors"]


def test_the_last_line_is_there_only_if_it_has_something_to_tell() -> None:
    minutes = Minutes()
    minutes.emf.tell(only_news=True)
    assert minutes.lines == []
    minutes.status["messages"] = {"answered": 30.0}
    minutes.emf.tell(only_news=True)
    minutes.emf.tell(only_news=True)
    (line,) = minutes.lines
    assert valid(line)["MessagesPerSecond"] == 0.5, "of the whole minute: its lines may then be summed"


@pytest.mark.parametrize("name", ["AWS/SQS", ":mine", "", "two words", "x" * 256, "umläut"])
def test_a_namespace_that_cloudwatch_would_refuse_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cloudwatch_namespace"):
        Settings(cloudwatch_namespace=name)


@pytest.mark.parametrize("flags", [(), ("--processes", "2")], ids=["one", "two pipelines"])
def test_a_worker_writes_one_line_that_counts_all_its_pipelines(fast_world: World, flags: tuple[str, ...]) -> None:
    # given a worker that is to write lines
    here = fast_world
    worker = here.worker(*flags, "--cloudwatch-namespace", "cvworker").ready()
    # when it has answered 40 messages, one of them an error, and stops
    missing = {"id": "m", "image_url": here.images.url + "/none", "callback_url": here.receiver.url + "/answers"}
    here.send(missing, *(here.request(n) for n in range(39)))
    assert here.receiver.wait_for(40, 60)
    poll(lambda: worker.metric("cvworker_messages_total", outcome="answered") == 40, 20, "all are counted")
    worker.signal()
    assert worker.wait() == 0
    # then the rest of the minute is told in one line among the others
    documents = [valid(line) for line in worker.text().splitlines() if '"_aws"' in line]
    assert sum(round(each["MessagesPerSecond"] * PERIOD_S) for each in documents) == 40
    assert sum(each["Errors"] for each in documents) == 1
    assert documents[-1]["Queue"] == here.queue_url.rpartition("/")[2]
    for name in ("OldestMessageAge", "Backlog"):  # once no pipeline is left, they are not known
        assert 0 <= documents[-1].get(name, 0.0 if flags else -1) < 300


def test_without_the_setting_there_is_no_line(fast_world: World) -> None:
    worker = fast_world.worker().ready()
    fast_world.send(fast_world.request(1))
    assert fast_world.receiver.wait_for(1, 60)
    worker.signal()
    assert worker.wait() == 0
    assert "_aws" not in worker.text()
