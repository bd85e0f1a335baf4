"""What ``cvworker bench`` found, as it is kept: one JSON file that the table, the CSV and the page are made from.

Format 1 of ``bench.json``, UTF-8 JSON: :class:`Bench` with a :class:`Sample` for each rung of each round. Every number
shown is worked out from the samples, so that the other files can be written anew, the same to the byte.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cvworker.errors import StartupError
from cvworker.lab.results import MachineInfo, first_problem

FORMAT, VERSION = "cvworker bench", 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Design(_Record):
    """A rung that was measured, as it was described then."""

    name: str
    on: str
    off: str


class Sample(_Record):
    """One rung in one round. ``given`` and what follows it count from its start to its end, the rest its window."""

    rung: str
    round: int = Field(ge=1)
    seconds: float = Field(gt=0)
    answers: int = Field(ge=0)
    cpu_s: float = Field(ge=0)
    """CPU time of the worker and all its processes."""
    around_cpu_s: float = Field(ge=0)
    """CPU time of queue, image host and callback receiver, which share the machine."""
    memory_bytes: int = Field(ge=0)
    """The most that the worker's processes took together; pages that they share count once."""
    gpu_share: float | None = None
    """Mean share of the time in which the GPU ran something, 0 to 1."""
    gpu_memory_bytes: int | None = None
    """The most that was taken on the GPU, less what was taken before the worker started."""
    start_s: float
    """From its start to its first answer."""
    processes: int
    given: int
    """Messages that the queue gave out."""
    unanswered: int
    """Of those, the ones that no answer came for."""
    repeats: int
    """Answers beyond the first for a message."""
    unsigned: int
    """Answers without the right signature."""
    errors: int
    """Answers that tell an error."""
    first_error: str = ""

    @property
    def requests_s(self) -> float:
        return self.answers / self.seconds


class Row(_Record):
    """A rung over all rounds: medians, but for the counts, which are sums. Ratios are taken within a round."""

    rung: str
    requests_s: float
    spread: float
    """Largest less smallest of the rounds, as a share of the median."""
    over_before: float | None
    """Times the rung before it; None for the first, and where the one before answered nothing."""
    over_first: float | None
    cpu_share: float
    """Of all the machine's cores, 0 to 1."""
    around_cpu_share: float
    cpu_ms: float | None
    """For each answer."""
    gpu_share: float | None
    gpu_memory_bytes: int | None
    memory_bytes: int
    start_s: float
    processes: int
    rounds: int
    answers: int
    unanswered: int
    repeats: int
    unsigned: int
    errors: int


class Bench(_Record):
    """A whole run of the ladder."""

    format: Literal["cvworker bench"] = FORMAT  # type: ignore[assignment]
    version: Literal[1] = VERSION  # type: ignore[assignment]
    made: str
    """When it began, ISO 8601."""
    commit: str | None = None
    module: str
    """As ``--module`` named it."""
    machine: MachineInfo
    versions: dict[str, str]
    settings: dict[str, Any]
    """The worker's settings in force that are not the default."""
    pictures: str
    """For people: how many, what kind, how large."""
    seconds: float
    rounds: int
    host_latency_ms: float
    callback_latency_ms: float
    rungs: list[Design] = Field(min_length=1)
    samples: list[Sample] = Field(min_length=1)
    notes: list[str] = []

    @property
    def title(self) -> str:
        """Module and machine, for headings."""
        return f"{self.module} on {self.machine.device_name} ({self.machine.type or f'{self.machine.cores} cores'})"

    @property
    def rows(self) -> list[Row]:
        """One for each rung, in the order of the ladder."""
        found: list[Row] = []
        names = [rung.name for rung in self.rungs]
        for index, name in enumerate(names):
            if any(sample.rung == name for sample in self.samples):
                found.append(self._row(name, names[index - 1] if index else None, names[0]))
        return found

    @property
    def problems(self) -> list[str]:
        """Why the figures of a rung are not to be relied on, a sentence each."""
        kinds = (("unanswered", "not answered"), ("repeats", "answered again"), ("unsigned", "without a signature"))
        return [
            f"{row.rung}: {count} messages {what}"
            for row in self.rows
            for field, what in kinds
            if (count := getattr(row, field))
        ]

    def _of(self, name: str) -> dict[int, Sample]:
        return {sample.round: sample for sample in self.samples if sample.rung == name}

    def _row(self, name: str, before: str | None, first: str) -> Row:
        mine = self._of(name)
        samples = list(mine.values())

        def middle(value: Callable[[Sample], float]) -> float:
            return median(value(sample) for sample in samples)

        def over(other: str | None) -> float | None:
            of = {} if other is None or other == name else self._of(other)
            ratios = [mine[n].requests_s / of[n].requests_s for n in mine if n in of and of[n].answers]
            return median(ratios) if ratios else None

        rate, cores = middle(lambda each: each.requests_s), self.machine.cores
        rates = [each.requests_s for each in samples]
        shares = [each.gpu_share for each in samples if each.gpu_share is not None]
        return Row(
            rung=name,
            requests_s=rate,
            spread=(max(rates) - min(rates)) / rate if rate else 0.0,
            over_before=over(before),
            over_first=over(first),
            cpu_share=middle(lambda each: each.cpu_s / each.seconds / cores),
            around_cpu_share=middle(lambda each: each.around_cpu_s / each.seconds / cores),
            cpu_ms=middle(lambda each: 1000 * each.cpu_s / each.answers) if all(s.answers for s in samples) else None,
            gpu_share=median(shares) if shares else None,
            gpu_memory_bytes=max((s.gpu_memory_bytes for s in samples if s.gpu_memory_bytes is not None), default=None),
            memory_bytes=max(each.memory_bytes for each in samples),
            start_s=middle(lambda each: each.start_s),
            processes=max(each.processes for each in samples),
            rounds=len(samples),
            **{
                field: sum(getattr(each, field) for each in samples)
                for field in ("answers", "unanswered", "repeats", "unsigned", "errors")
            },
        )

    def save(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        write(path, self.model_dump_json(indent=1) + "\n")

    def save_csv(self, path: Path) -> None:
        """Write the rows as a table, whole or not at all."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Row.model_fields)
        writer.writerows(_csv_cells(row) for row in self.rows)
        write(path, text.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a run.

        Raises:
            StartupError: the file cannot be read, or is no run of the ladder: the first field at fault is named.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            why = getattr(error, "strerror", None) or f"it is not JSON: {error}"
            raise StartupError(f"from: {path} cannot be read ({why}); give a bench.json of 'cvworker bench'") from None
        except ValidationError as error:
            raise StartupError(
                f"from: {path} is no bench.json: {first_problem(error)}; make it anew with 'cvworker bench'"
            ) from None


def _csv_cells(row: Row) -> Sequence[Any]:
    return [round(value, 6) if isinstance(value, float) else value for value in row.model_dump().values()]


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
