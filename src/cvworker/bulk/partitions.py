"""Results as Parquet: partition ``k`` holds rows ``k x size`` up to the next, and is written once all are there."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cvworker.errors import WorkerFailed

if TYPE_CHECKING:
    from cvworker.bulk.store import Store

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("status", pa.string()),
        ("task", pa.string()),
        ("result", pa.string()),
        ("error", pa.struct([("code", pa.string()), ("message", pa.string()), ("retryable", pa.bool_())])),
        ("image_url", pa.string()),
        ("metadata", pa.string()),
        (
            "timings_ms",
            pa.struct([("download", pa.float64()), ("preprocess", pa.float64()), ("process", pa.float64())]),
        ),
        (
            "worker",
            pa.struct([(name, pa.string()) for name in ("version", "module", "weights", "precision")]),
        ),
    ]
)
"""The answer's fields, and the row's place in the manifest.

``result`` and ``metadata`` are JSON text: they are free in form, and a type found from a partition's own rows would
differ from one partition to the next, which no reader of the whole folder takes.
"""


class Partitions:
    """Which partitions are there, and the rows of those that are not whole yet."""

    def __init__(self, store: Store, rows: int, size: int, names: set[str]) -> None:
        self._store = store
        self._rows = rows
        self._size = size
        self._held: dict[int, list[pa.Table]] = {}
        self.count = -(-rows // size)
        self.left = [number for number in range(self.count) if name_of(number) not in names]

    def rows_of(self, number: int) -> range:
        return range(number * self._size, min((number + 1) * self._size, self._rows))

    def rows_left(self) -> int:
        return sum(len(self.rows_of(number)) for number in self.left)

    def add(self, results: pa.Table) -> None:
        """Take rows of one partition, in any order; the partition is written with its last.

        Raises WorkerFailed where it cannot be written, or where a row came twice.
        """
        number = results["row"][0].as_py() // self._size
        held = self._held.setdefault(number, [])
        held.append(results)
        rows = self.rows_of(number)
        if sum(map(len, held)) < len(rows):
            return
        table = pa.concat_tables(self._held.pop(number)).sort_by("row")
        if table["row"].to_pylist() != list(rows):
            raise WorkerFailed(f"{name_of(number)} has rows missing or twice, and was not written")
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd")
        self._store.write(name_of(number), file.getvalue())
        self.left.remove(number)


def name_of(number: int) -> str:
    return f"part-{number:06}.parquet"
