"""The second stage: bytes → samples."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cvworker import weights
from cvworker.bulk.suspects import Suspects
from cvworker.bulk.work import Gathered, Work, columns_of, settle_in, told
from cvworker.errors import PreprocessFailed


class Preprocess:
    """Bytes → samples: decode and the module's ``preprocess``, one image after the other."""

    def __init__(self, work: Work, ledger: Any, actors: int) -> None:
        settle_in(work)
        import torch

        from cvworker.loading import load, make
        from cvworker.model.link import HIDDEN_PREFIXES
        from cvworker.model.preprocess import limit_memory

        self._work = work
        self._module = make(load(work.module), weights.local(work.weights, work.guard))
        for name in [name for name in os.environ if name.startswith(HIDDEN_PREFIXES)]:
            del os.environ[name]  # decoders of untrusted bytes, and what they may start, need no credentials
        torch.set_grad_enabled(False)
        torch.set_num_threads(1)  # as in a DataLoader's process: the others have their own core
        limit_memory(work.max_image_pixels)
        self._suspects = Suspects(ledger, "preprocess", actors=actors, stall_timeout=work.stall_timeout)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        rows, data = columns_of(table)
        good = [index for index, row in enumerate(rows) if row["error"] is None]
        gathered = Gathered()

        def sampled(indices: Any) -> Iterator[dict[str, Any]]:
            for index in indices:
                yield self._sampled(rows[good[index]], data[good[index]].as_buffer())

        def guilty(index: int) -> dict[str, Any]:
            error = PreprocessFailed("its process ended while preparing this image")
            return {**rows[good[index]], "error": told(error), "payload": None}

        for row in rows:
            if row["error"] is not None:
                yield from gathered.add({**row, "payload": None})
        for row in self._suspects.guarded([rows[index]["row"] for index in good], sampled, guilty):
            yield from gathered.add(row)
        yield from gathered.rest()

    def _sampled(self, row: dict[str, Any], image: Any) -> dict[str, Any]:
        from cvworker.bulk.samples import dumps
        from cvworker.model.preprocess import describe, sample_of

        began = time.perf_counter()
        with self._suspects.watched():
            sample, error = sample_of(
                self._module, memoryview(image), self._work.max_image_pixels, job=row["row"], crosses_border=False
            )
        took = (time.perf_counter() - began) * 1000
        payload = None
        if error is None:
            try:
                payload = dumps(sample)
            except Exception as raised:  # what cannot leave this process: the module's own
                error = PreprocessFailed(describe(raised))
        return {**row, "error": told(error), "preprocess": took, "payload": payload}
