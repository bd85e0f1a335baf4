"""The third stage: samples → results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cvworker.bulk.engine import Engine
from cvworker.bulk.partitions import SCHEMA
from cvworker.bulk.suspects import Suspects
from cvworker.bulk.work import Work, columns_of, text_of
from cvworker.errors import ProcessFailed, job_error


class Infer:
    """Samples → results: the module's ``collate`` and ``process`` in batches, on the actor's device."""

    def __init__(self, work: Work, ledger: Any, actors: int) -> None:
        self._work = work
        self._engine = Engine(work)
        self._engine.put_forms_on()
        self._engine.warm_up()
        self._suspects = Suspects(ledger, "process", actors=actors, stall_timeout=work.stall_timeout)

    def __call__(self, table: pa.Table) -> pa.Table:
        from cvworker.bulk.samples import loads
        from cvworker.model.batcher import Sample
        from cvworker.model.runner import Done

        rows, payloads = columns_of(table)
        good = [index for index, row in enumerate(rows) if row["error"] is None]

        def processed(indices: Any) -> Iterator[tuple[int, Done]]:
            # The sample's number is its place in this table; values are unpickled batch by batch.
            samples = (Sample(good[index], loads(payloads[good[index]].as_buffer()), 0.0) for index in indices)
            for batch in self._engine.batches(samples):
                with self._suspects.watched():
                    done = self._engine.run(batch)
                yield from ((each.sample.number, each) for each in done)

        def guilty(index: int) -> tuple[int, Done]:
            error = ProcessFailed("its process ended while running on this image")
            return good[index], Done(Sample(good[index], None, 0.0), 0.0, error=error)

        done = dict(self._suspects.guarded([rows[index]["row"] for index in good], processed, guilty))
        info = self._engine.info
        return pa.Table.from_pylist(
            [_answer(row, done.get(index), info) for index, row in enumerate(rows)], schema=SCHEMA
        )


def _answer(row: dict[str, Any], done: Any, info: dict[str, str | None]) -> dict[str, Any]:
    """A row of the output."""
    error = job_error(*row["error"]) if row["error"] else done.error
    times = {"download": row["download"], "preprocess": row["preprocess"]}
    times["process"] = done.process_ms if done is not None else None
    return {
        "row": row["row"],
        "id": row["id"],
        "status": "ok" if error is None else "error",
        "task": row["task"],
        "result": done.result if error is None else None,
        "error": error and {"code": error.code, "message": text_of(error.message), "retryable": error.retryable},
        "image_url": row["image_url"],
        "metadata": row["metadata"],
        "timings_ms": {name: None if value is None else round(value, 1) for name, value in times.items()},
        "worker": info,
    }
