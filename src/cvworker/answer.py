"""The body of a callback: the answer, as the contract words it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cvworker.errors import JobError, ProcessFailed
from cvworker.messages import Request

_ALWAYS_TIMED: Final = ("queue", "total")
_TIMINGS: Final = ("queue", "download", "preprocess", "process", "total")

# One encoder for all answers: json.dumps would make one per call. It writes ASCII, so that lone surrogates, which a
# request can spell, come back as the escapes they were.
_ENCODER: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who answered: this package's version, the module's name, its weights' ``sha256:…`` and the precision it ran in.

    Weights and precision are left out of the answer where they are not known.
    """

    version: str
    module: str
    weights: str | None
    precision: str | None = None

    def as_json(self) -> dict[str, str]:
        info = {"version": self.version, "module": self.module}
        if self.weights is not None:
            info["weights"] = self.weights
        if self.precision is not None:
            info["precision"] = self.precision
        return info


def answer_body(
    request: Request,
    *,
    result: Mapping[str, Any] | None,
    error: JobError | None,
    attempt: int,
    timings_ms: Mapping[str, float],
    worker: WorkerInfo,
) -> bytes:
    """The JSON to post to the request's callback: ``error`` where there is one, else ``result``.

    ``attempt`` is the receive count. ``timings_ms`` must hold ``queue`` and ``total``; of ``download``,
    ``preprocess`` and ``process``, those that ran. A clock that is behind SQS's gives 0 rather than less.

    Raises ProcessFailed where ``result`` is no mapping or cannot be written as JSON (NaN, tensors, …); the caller
    answers with that instead. Never raises for an error.
    """
    answer: dict[str, Any] = {"id": request.id, "status": "ok" if error is None else "error"}
    answer["task"] = worker.module if request.task is None else request.task
    if error is None:
        if type(result) is not dict and not isinstance(result, Mapping):
            raise ProcessFailed("the module's result is not a mapping")
        answer["result"] = dict(result)
    else:
        answer["error"] = {"code": error.code, "message": error.message, "retryable": error.retryable}
    answer["image_url"] = request.image_url
    answer["metadata"] = request.metadata
    answer["attempt"] = attempt
    answer["timings_ms"] = {
        name: max(0.0, round(timings_ms[name], 1)) for name in _TIMINGS if name in timings_ms or name in _ALWAYS_TIMED
    }
    answer["worker"] = worker.as_json()
    try:
        return _ENCODER.encode(answer).encode("ascii")
    except (TypeError, ValueError, RecursionError) as cause:
        # Everything else in the answer was decoded from JSON or made here.
        raise ProcessFailed(f"the module's result is not JSON: {cause}") from None
