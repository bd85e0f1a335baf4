"""What a run has written about itself, so that the next one goes on with the same work or is refused."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cvworker import __version__
from cvworker.bulk.manifest import Manifest
from cvworker.bulk.store import Store
from cvworker.errors import StartupError
from cvworker.module import Module
from cvworker.weights import sha256_of

RECORD, SUCCESS = "_manifest.json", "_SUCCESS"
FORMAT = 1
SAME = {
    "input_digest": "input",
    "rows": "input",
    "partition_rows": "partition_rows",
    "module": "module",
    "module_digest": "module",
    "weights": "weights",
}
"""What must be the same in a run that goes on, and the setting that it hangs on."""


@dataclass(frozen=True, slots=True)
class Record:
    """The work of one output: rows, module and weights by their SHA-256, and the arithmetic that was chosen.

    ``module_digest`` is that of the file which defines the class: answers of two versions of it do not belong together.
    ``precision`` and ``forms`` are what the first run found fastest. Those that go on take them as they are, as a
    measurement of their own might come out otherwise.
    """

    input: str
    input_digest: str
    rows: int
    partition_rows: int
    module: str
    module_digest: str | None
    weights: str | None
    precision: str
    forms: tuple[str, ...]
    version: str = __version__
    format: int = FORMAT

    def dump(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def load(cls, data: bytes, place: str) -> Record:
        try:
            values = json.loads(data)
            values["forms"] = tuple(values["forms"])
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            raise StartupError(f"output: {place}/{RECORD} is none that this version can go on from") from None


def begun(store: Store, names: set[str]) -> Record | None:
    """The record of a run that has written to ``store``, if any. Raises StartupError for files of somebody else."""
    if RECORD in names:
        return Record.load(store.read(RECORD), store.place)
    if names:
        some = ", ".join(sorted(names)[:3])
        raise StartupError(f"output: {store.place} has files that are not of a bulk run ({some}); give another place")
    return None


def of_run(manifest: Manifest, partition_rows: int, cls: type[Module], module: Module) -> Record:
    """The record of a run that is about to begin; precision and forms are not known yet."""
    return Record(
        input=manifest.source,
        input_digest=manifest.digest,
        rows=len(manifest),
        partition_rows=partition_rows,
        module=cls.name,
        module_digest=_source_digest(cls),
        weights=sha256_of(module.weights) if module.weights else None,
        precision="",
        forms=(),
    )


def check_same(before: Record, now: Record, place: str) -> None:
    """Raises StartupError, naming what differs, where ``now`` is other work than what ``place`` holds."""
    for name, setting in SAME.items():
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            what = "the module's code" if name == "module_digest" else name
            raise StartupError(
                f"{setting}: {place} was begun with another one ({what} was {_short(old)}, is {_short(new)}); "
                "give the same again to go on, or another --output"
            )


def _source_digest(cls: type[Module]) -> str | None:
    try:
        return sha256_of(Path(inspect.getfile(cls)))
    except (OSError, TypeError):
        return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:19] + "…"
