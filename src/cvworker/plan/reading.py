"""Traffic files and load results, read and checked: what is wrong is one line that names the row and the field."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cvworker.errors import StartupError
from cvworker.plan.traffic import HOURS, Images, Latency, Peak, Traffic

EXAMPLE = """rate = 50                     # images a second, the mean of a day
daily = [2, 1, 1, 1, 1, 2, 3, 5, 8, 9, 9, 9, 8, 8, 8, 8, 8, 9, 10, 10, 8, 6, 4, 3]   # its curve, any unit
burst = 1                     # messages that arrive together

[[peaks]]                     # a time of the day with at least this rate
at = "18:30"
minutes = 30
rate = 200

[[images]]                    # pictures of one size, and their share
bytes = 130_000
megapixels = 0.7

[host]                        # where the pictures are
latency_ms = 100
p95_ms = 400
errors = 0.001                # share of downloads that fail for now

[callback]
latency_ms = 50

[spot]
share = 0.5                   # of the tasks at the busiest time
interruptions_per_month = 1   # of each machine
without_notice = 0.05         # share of these
"""


def _clock(text: str) -> str:
    if not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", text):
        raise ValueError("must be a time of the day such as 18:30")
    return text


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Peak(_Row):
    at: Annotated[str, AfterValidator(_clock)]
    minutes: Annotated[float, Field(gt=0, le=1440)]
    rate: Positive


class _Images(_Row):
    bytes: Annotated[int, Field(gt=0)]
    megapixels: Positive
    share: Positive = 1.0


class _Latency(_Row):
    latency_ms: NotNegative
    p95_ms: NotNegative = 0.0

    @model_validator(mode="after")
    def _in_order(self) -> _Latency:
        if self.p95_ms and self.p95_ms < self.latency_ms:
            raise ValueError("p95_ms must not be below latency_ms, the median")
        return self

    def latency(self) -> Latency:
        return Latency(self.latency_ms / 1000, self.p95_ms / 1000)


class _Host(_Latency):
    errors: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class _Spot(_Row):
    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    interruptions_per_month: NotNegative = 1.0
    without_notice: Annotated[float, Field(ge=0, le=1)] = 0.05


class TrafficFile(_Row):
    """The file as it is written; :data:`EXAMPLE` has every field."""

    rate: Annotated[float, Field(gt=0, le=1e6)]
    daily: Annotated[tuple[NotNegative, ...], Field(min_length=HOURS, max_length=HOURS)] = (1.0,) * HOURS
    burst: Annotated[int, Field(ge=1, le=100_000)] = 1
    peaks: tuple[_Peak, ...] = ()
    images: Annotated[tuple[_Images, ...], Field(min_length=1)] = (_Images(bytes=130_000, megapixels=0.7),)
    host: _Host = _Host(latency_ms=100)
    callback: _Latency = _Latency(latency_ms=50)
    spot: _Spot = _Spot()

    @model_validator(mode="after")
    def _some(self) -> TrafficFile:
        if not any(self.daily):
            raise ValueError("daily: one of the numbers must be above 0")
        return self

    def traffic(self) -> Traffic:
        """What the simulations work with."""
        return Traffic(
            rate=self.rate,
            daily=self.daily,
            peaks=tuple(Peak(_seconds(each.at), each.minutes * 60, each.rate) for each in self.peaks),
            burst=self.burst,
            images=tuple(Images(each.bytes, each.megapixels, each.share) for each in self.images),
            host=self.host.latency(),
            callback=self.callback.latency(),
            host_errors=self.host.errors,
        )


def read_traffic(path: Path) -> TrafficFile:
    """Raises StartupError with one line: the file, the row and field, and what is wrong with it."""
    try:
        found: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"traffic: {path} cannot be read ({error.strerror}); see --example for one") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartupError(f"traffic: {path}: it is not TOML: {error}") from None
    try:
        return TrafficFile.model_validate(found)
    except ValidationError as error:
        raise StartupError(f"traffic: {path}: {_problem(error)}") from None


LOAD_FORMAT, LOAD_VERSION = "cvworker load", 1
"""Of the raw data that ``python -m load.scenarios`` writes (load/scenarios/raw.py)."""


class _Machine(BaseModel):
    type: str | None = None


class _LoadResult(BaseModel):
    """What is read of it; the rest is ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    scenario: str
    workers: Annotated[int, Field(ge=0)]
    machine: _Machine
    pace_images_s: Positive | None


def read_load_result(path: Path) -> tuple[str | None, float]:
    """The machine type, where it is known, and the images a second that one of its workers did at most.

    Raises StartupError with one line: the file, the field, and what is wrong with it.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"load_result: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise StartupError(f"load_result: {path}: it is not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("format") != LOAD_FORMAT:
        raise StartupError(f"load_result: {path}, format: not of 'python -m load.scenarios'; give its offline.json")
    if found.get("version") != LOAD_VERSION:
        raise StartupError(
            f"load_result: {path}, version: {found.get('version')!r}, and this reads {LOAD_VERSION}: measure again"
        )
    try:
        result = _LoadResult.model_validate(found)
    except ValidationError as error:
        raise StartupError(f"load_result: {path}: {_problem(error)}") from None
    if result.pace_images_s is None:
        raise StartupError(
            f"load_result: {path}, pace_images_s: {result.scenario!r} tells none; give offline.json or online.json"
        )
    if not result.workers:
        raise StartupError(
            f"load_result: {path}, workers: they ran elsewhere, and how many is not known; give the pace of one by "
            "--measured MACHINE=IMAGES_S"
        )
    return result.machine.type, result.pace_images_s / result.workers


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ", ".join(f"row {part + 1}" if isinstance(part, int) else str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "there is no such field"
    given = first.get("input")
    shown = f" (it is {given!r})" if isinstance(given, (int, float, str)) and first["type"] != "extra_forbidden" else ""
    return f"{place}: {what}{shown}" if place else what


def _seconds(clock: str) -> float:
    hours, minutes = clock.split(":")
    return int(hours) * 3600.0 + int(minutes) * 60.0
