"""CloudFormation templates as AWS would see them: read, and filled in with parameters."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "cloudformation"
QUEUE_ARN = "arn:aws:sqs:eu-west-1:123456789012:images"
REQUIRED = {"ImageTag": "1", "QueueArn": QUEUE_ARN, "VpcId": "vpc-1", "SubnetIds": "subnet-1,subnet-2"}
PSEUDO = {
    "AWS::AccountId": "123456789012",
    "AWS::Partition": "aws",
    "AWS::Region": "eu-west-1",
    "AWS::StackName": "cvworker",
    "AWS::URLSuffix": "amazonaws.com",
}


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short forms (``!Ref x``), as their long ones (``{"Ref": x}``)."""


def _long_form(loader: _Loader, tag: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    if tag == "GetAtt":
        value = value.split(".", 1)
    return {tag if tag in ("Ref", "Condition") else f"Fn::{tag}": value}


_Loader.add_multi_constructor("!", _long_form)


@functools.cache
def read(name: str) -> dict[str, Any]:
    """The template of that file, with long forms only."""
    return dict(yaml.load((FOLDER / name).read_text(), _Loader))  # noqa: S506 - a safe loader, and our own file


class _Nothing:
    """AWS::NoValue: takes away the property or the item that it is."""


class Filled:
    """A template with parameters: its resources, with conditions decided and functions evaluated.

    What only AWS knows keeps the name it has in the template: ``TaskRole``, ``TaskRole.Arn``.
    """

    def __init__(self, name: str, **parameters: Any) -> None:
        self.template = read(name)
        unknown = set(parameters) - set(self.template["Parameters"])
        if unknown:
            raise ValueError(f"no such parameters: {unknown}")
        self.parameters = {
            key: _typed(each, parameters.get(key, each.get("Default")))
            for key, each in self.template["Parameters"].items()
        }
        self.resources = {
            key: self.value({name: part for name, part in each.items() if name != "Condition"})
            for key, each in self.template["Resources"].items()
            if "Condition" not in each or self.holds(each["Condition"])
        }

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        return {key: each["Properties"] for key, each in self.resources.items() if each["Type"] == kind}

    def properties(self, name: str) -> dict[str, Any]:
        return dict(self.resources[name]["Properties"])

    def holds(self, condition: str) -> bool:
        return bool(self.value(self.template["Conditions"][condition]))

    def value(self, part: Any) -> Any:
        if isinstance(part, list):
            return [found for each in part if (found := self.value(each)) is not _Nothing]
        if not isinstance(part, dict):
            return part
        if len(part) == 1:
            (name, argument), *_ = part.items()
            if name == "Ref":
                return self._ref(argument)
            if name.startswith("Fn::"):
                return getattr(self, "_" + name.removeprefix("Fn::").lower())(argument)
        return {key: found for key, each in part.items() if (found := self.value(each)) is not _Nothing}

    def _ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return _Nothing
        return {**PSEUDO, **self.parameters}.get(name, name)

    def _getatt(self, path: list[str]) -> str:
        return ".".join(path)

    def _if(self, argument: list[Any]) -> Any:
        condition, yes, no = argument
        return self.value(yes if self.holds(condition) else no)

    def _not(self, argument: list[Any]) -> bool:
        return not self.value(argument[0])

    def _equals(self, argument: list[Any]) -> bool:
        one, other = self.value(argument)
        return str(one) == str(other)

    def _join(self, argument: list[Any]) -> str:
        separator, parts = self.value(argument)
        return str(separator).join(map(str, parts))

    def _split(self, argument: list[Any]) -> list[str]:
        separator, text = self.value(argument)
        return str(text).split(separator)

    def _select(self, argument: list[Any]) -> Any:
        index, parts = self.value(argument)
        return parts[int(index)]

    def _findinmap(self, argument: list[Any]) -> Any:
        first, second, third = self.value(argument)
        return self.template["Mappings"][first][str(second)][third]

    def _base64(self, argument: Any) -> Any:
        return self.value(argument)

    def _sub(self, argument: Any) -> str:
        text, own = (argument, {}) if isinstance(argument, str) else (argument[0], self.value(argument[1]))
        return re.sub(r"\$\{([\w:.]+)\}", lambda found: str(own.get(found[1], self._ref(found[1]))), text)


def _typed(declared: dict[str, Any], value: Any) -> Any:
    is_list = declared["Type"] == "CommaDelimitedList" or declared["Type"].startswith("List<")
    return str(value).split(",") if is_list and isinstance(value, str) else value


def service(**parameters: Any) -> Filled:
    """``service.yaml``, filled in with what it needs and what is given."""
    return Filled("service.yaml", **{**REQUIRED, "RouteTableIds": "rtb-1", **parameters})


def metric_math(expression: str, **series: float | None) -> float | None:
    """What CloudWatch makes of ``expression`` for one minute: None where there is no data, or a division by zero.

    Knows what the templates use: ``+ - * /``, comparisons, ``IF`` and ``FILL``.
    """

    def fill(value: float | None, other: float) -> float:
        return other if value is None else value

    def choose(condition: _Point, yes: Any, no: Any) -> Any:
        return None if condition.value is None else (yes if condition.value else no)

    def as_point(value: Any) -> _Point:
        return value if isinstance(value, _Point) else _Point(value)

    names = {name: _Point(value) for name, value in series.items()}
    functions = {
        "IF": lambda condition, yes, no: as_point(choose(as_point(condition), yes, no)),
        "FILL": lambda point, other: _Point(fill(point.value, other)),
    }
    return as_point(eval(expression, {"__builtins__": {}}, {**functions, **names})).value  # noqa: S307 - our template


class _Point:
    """A number, or no data, which whatever is done to it stays."""

    def __init__(self, value: Any) -> None:
        self.value = value.value if isinstance(value, _Point) else value

    def _with(self, other: Any, operation: Any) -> _Point:
        other = _Point(other).value
        if self.value is None or other is None:
            return _Point(None)
        try:
            return _Point(operation(self.value, other))
        except ZeroDivisionError:
            return _Point(None)

    def __add__(self, other: Any) -> _Point:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> _Point:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> _Point:
        return self._with(other, lambda a, b: a * b)

    def __truediv__(self, other: Any) -> _Point:
        return self._with(other, lambda a, b: a / b)

    def __gt__(self, other: Any) -> _Point:
        return self._with(other, lambda a, b: a > b)


class Scaling:
    """The scaling of a filled-in ``service.yaml``, as Application Auto Scaling would carry it out."""

    def __init__(self, filled: Filled) -> None:
        target = filled.properties("ScalableTarget")
        self.least, self.most = target["MinCapacity"], target["MaxCapacity"]
        tracking = filled.properties("FollowBacklog")["TargetTrackingScalingPolicyConfiguration"]
        self.per_task = tracking["TargetValue"]
        self.tracked = tracking["CustomizedMetricSpecification"]["Metrics"]
        self.alarm = filled.properties("WaitingWithoutTasks")
        self.step = filled.properties("FromZero")["StepScalingPolicyConfiguration"]

    def desired(self, tasks: int | None, attributes: dict[str, str], wanted: int) -> int:
        """Tasks wanted next, where ``wanted`` are wanted now and ``tasks`` is what CloudWatch has of that number."""
        following = wanted
        if (metric := self._evaluate(self.tracked, tasks, attributes)) is not None:
            following = math.ceil(wanted * metric / self.per_task)
        waiting = self._evaluate(self.alarm["Metrics"], tasks, attributes)
        if waiting is not None and waiting >= self.alarm["Threshold"]:
            following = max(following, wanted + self.step["StepAdjustments"][0]["ScalingAdjustment"])
        return max(self.least, min(following, self.most))

    def _evaluate(self, metrics: list[dict[str, Any]], tasks: int | None, attributes: dict[str, str]) -> float | None:
        known = {
            ("AWS/SQS", "ApproximateNumberOfMessagesVisible"): int(attributes["ApproximateNumberOfMessages"]),
            ("AWS/SQS", "ApproximateNumberOfMessagesNotVisible"): int(
                attributes["ApproximateNumberOfMessagesNotVisible"]
            ),
            ("ECS/ContainerInsights", "DesiredTaskCount"): tasks,
        }
        series = {}
        for each in metrics:
            if "MetricStat" in each:
                metric = each["MetricStat"]["Metric"]
                series[each["Id"]] = known[metric["Namespace"], metric["MetricName"]]
        (returned,) = [each["Expression"] for each in metrics if each["ReturnData"]]
        return metric_math(returned, **series)
