"""What the actors of all stages are told, and the tables that go from stage to stage.

A table has a row for each image. What failed carries its error along in place of a payload. Payloads are bytes: the
file as it was downloaded, then the sample, pickled with its pixels as one flat copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cvworker.errors import JobError
from cvworker.net import AddressGuard

PIECE = 64
"""Rows that travel together, or four batches where that is more: what is done again when an actor dies."""
CHUNK_BYTES = 64 * 2**20
"""Payloads that are gathered before they are handed over: a piece of ordinary images is one chunk, and in order."""

BETWEEN = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("image_url", pa.string()),
        ("metadata", pa.string()),
        ("error", pa.list_(pa.string())),
        ("download", pa.float64()),
        ("preprocess", pa.float64()),
        ("payload", pa.large_binary()),
    ]
)
"""What goes between the stages; ``error`` is the class's name and the message, times are milliseconds."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the actors are told at their start."""

    module: str
    name: str
    weights: str | None
    weights_digest: str | None
    device: str
    precision: str
    forms: tuple[str, ...]
    optimize: str
    batch_size: int
    guard: AddressGuard
    buckets: frozenset[str]
    base: Path | None
    download_timeout: float
    download_concurrency: int
    max_image_bytes: int
    max_image_pixels: int
    max_inflight_bytes: int
    stall_timeout: float
    path: tuple[str, ...]
    log_level: str

    @property
    def piece(self) -> int:
        return max(PIECE, 4 * self.batch_size)


def settle_in(work: Work) -> None:
    """What each of the actors' processes does first."""
    from cvworker.observe.logs import configure

    sys.path.extend(path for path in work.path if path not in sys.path)
    configure("json", work.log_level)


class Gathered:
    """Rows on their way into a table, handed over as they are enough, each table in the manifest's order."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, row: dict[str, Any]) -> Iterator[pa.Table]:
        self._rows.append(row)
        self._bytes += len(row["payload"] or b"")
        if self._bytes >= CHUNK_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[pa.Table]:
        if self._rows:
            rows, self._rows, self._bytes = sorted(self._rows, key=lambda row: int(row["row"])), [], 0
            yield pa.Table.from_pylist(rows, schema=BETWEEN)


def columns_of(table: pa.Table) -> tuple[list[dict[str, Any]], Any]:
    """The rows without their payloads, and the payloads where they lie."""
    rows = table.drop_columns(["payload"]).to_pylist()
    return rows, table["payload"]


def told(error: JobError | None) -> list[str] | None:
    """An error as it crosses from process to process; a subclass that a module made is its nearest known class."""
    if error is None:
        return None
    known = next(cls for cls in type(error).__mro__ if cls.__module__ == JobError.__module__)
    return [known.__name__, text_of(error.message)]


def text_of(text: str) -> str:
    """JSON can spell lone surrogates, which no column of text can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
