"""Machine types and their prices: ``machines.toml`` beside this file, and what ``--prices`` puts over it.

A catalogue is TOML with these keys; a file for ``--prices`` may hold any part of it, and its machines and processors
replace those of the same name, field by field::

    date = 2026-07-15            of the prices
    region = "us-east-1"
    currency = "USD"
    source = "..."               where they are from

    [processors.T4]              a GPU
    names = ["Tesla T4"]         what drivers call it
    memory_gib = 16
    relative = 6100              optional; speed beside the other processors', in any unit

    [machines."g4dn.xlarge"]
    processor = "T4"             optional; a machine without one computes on its vCPUs
    processors = 1               how many, by default one
    vcpus = 4
    memory_gib = 16
    network_gbps = 5             what it can keep up, in gigabits a second
    on_demand = 0.526            an hour
    spot = 0.21                  optional; an hour

A wrong row or field ends the command with one line that names file, row and field.
"""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cvworker.errors import StartupError
from cvworker.lab.results import first_problem

BUILT_IN = Path(__file__).with_name("machines.toml")


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Processor(_Row):
    """A GPU: what drivers call it, its memory, and how fast it is beside the others."""

    names: tuple[str, ...] = ()
    memory_gib: float = Field(gt=0)
    relative: float | None = Field(None, gt=0)


class Machine(_Row):
    """A machine type; prices are for an hour, in the catalogue's currency."""

    name: str = ""
    processor: str | None = None
    processors: int = Field(1, ge=1)
    vcpus: int = Field(ge=1)
    memory_gib: float = Field(gt=0)
    network_gbps: float = Field(gt=0)
    on_demand: float = Field(gt=0)
    spot: float | None = Field(None, gt=0)


class Catalogue(_Row):
    """Processors and machines by name."""

    date: datetime.date
    region: str
    currency: str = "USD"
    source: str = ""
    processors: dict[str, Processor]
    machines: dict[str, Machine]

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name, machine in self.machines.items():
            if machine.processor is not None and machine.processor not in self.processors:
                raise ValueError(f"machines.{name}.processor: there is no processor {machine.processor!r}")
        return self

    @property
    def title(self) -> str:
        """What the prices are, for headings."""
        return f"{self.currency}, {self.region}, {self.date.isoformat()}"

    def machine(self, name: str) -> Machine:
        """Raises StartupError for a name that is not there."""
        if name not in self.machines:
            raise StartupError(
                f"machines: there is no {name!r} in the catalogue ({', '.join(self.machines)}); add it by --prices FILE"
            )
        return self.machines[name]

    def processor_named(self, device_name: str) -> str | None:
        """The processor that a driver calls ``device_name``."""
        return next((name for name, each in self.processors.items() if device_name in (name, *each.names)), None)


def load(prices: Path | None = None) -> Catalogue:
    """The built-in catalogue, with the machines and fields of ``prices`` in the place of its own.

    Raises:
        StartupError: the file cannot be read, or a row or field is wrong.
    """
    merged = _read(BUILT_IN)
    if prices is not None:
        own = _read(prices)
        for table in ("processors", "machines"):
            rows = own.pop(table, {})
            if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
                raise _wrong(prices, f"{table}: must be tables, such as [{table}.NAME]")
            for name, row in rows.items():
                merged[table][name] = {**merged[table].get(name, {}), **row}
        merged |= own
    for name, row in merged["machines"].items():
        row["name"] = name
    try:
        return Catalogue.model_validate(merged)
    except ValidationError as error:
        raise _wrong(prices or BUILT_IN, first_problem(error).removeprefix("Value error, ")) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"prices: {path} cannot be read ({error.strerror}); give a TOML file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _wrong(path, f"it is not TOML: {error}") from None


def _wrong(path: Path, problem: str) -> StartupError:
    return StartupError(f"prices: {path}: {problem}")
