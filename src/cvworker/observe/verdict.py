"""What holds a worker back, in words, and which setting would change it: for the status page and ``cvworker top``."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from cvworker.observe.metrics import STAGES

LOOKS = 5
"""A queue's fill is the mean of these, one a second: a single look may meet a burst."""
FULL, BUSY, HALF, IDLE = 0.9, 0.85, 0.5, 0.05
STICKY = 0.03
"""How much busier another step must be to take over the first place: no flicker between equals."""
MEMORY_FULL = 0.95
QUEUE_BEFORE = {"download": "download", "preprocess": "inference", "process": "inference", "callback": "results"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``tone`` is good, warn or bad; ``step`` is marked with ``tag``, where there is one to be marked."""

    tone: str
    text: str
    hint: str = ""
    step: str | None = None
    tag: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Looks at the queues once a second, and says what it makes of a status."""

    def __init__(self) -> None:
        self._fills: deque[dict[str, float]] = deque(maxlen=LOOKS)
        self._limit: str | None = None

    def look(self, queues: dict[str, dict[str, int]]) -> None:
        """Take note of how full the queues are, as ``/status.json`` has them."""
        self._fills.append({name: each["depth"] / max(1, each["limit"]) for name, each in queues.items()})

    def verdict(self, status: dict[str, Any]) -> Verdict:
        """What ``status`` means."""
        found = _not_at_work(status) or self._at_work(status)
        self._limit = found.step
        return found

    def _at_work(self, status: dict[str, Any]) -> Verdict:
        settings = status["settings"]
        memory_full = status["image_bytes"] > MEMORY_FULL * settings["max_inflight_bytes"]
        step = self._limiting(status, memory_full)
        busy, waiting = status["busy"].get(step, 0.0), self._fill(step)
        if memory_full and busy < HALF:
            mebibytes = f"{settings['max_inflight_bytes'] / 2**20:,.0f} MiB"
            hint = f"Downloads wait for room: raise max_inflight_bytes ({mebibytes})."
            return Verdict("warn", "Too little memory for images holds it back.", hint, "download", "waits for memory")
        if busy > BUSY or waiting > FULL or (busy > HALF and waiting > HALF):
            return Verdict(
                "warn", f"{step} holds it back: {busy:.0%} busy.", _advice(step, status), step, "holds it back"
            )
        if busy < IDLE:
            return Verdict("good", "It keeps up with what arrives.", "Every step has room.")
        hint = f"With more to do, {step} would be first ({busy:.0%} busy). {_advice(step, status)}"
        return Verdict("good", "It keeps up with what arrives.", hint, step, "busiest")

    def _limiting(self, status: dict[str, Any], memory_full: bool) -> str:
        """The busiest step after the last full queue: all before that one only wait for room."""
        full = [
            at for at, step in enumerate(STAGES) if self._fill(step) > FULL or (memory_full and step == "preprocess")
        ]
        first = max(full, default=0)
        if STAGES[first] == "process":  # one queue is before both
            first -= 1
        return max(STAGES[first:], key=lambda step: status["busy"].get(step, 0.0) + STICKY * (step == self._limit))

    def _fill(self, step: str) -> float:
        """Of the queue before a step."""
        fills = [each[name] for each in self._fills if (name := QUEUE_BEFORE.get(step, "")) in each]
        return sum(fills) / len(fills) if fills else 0.0


def _not_at_work(status: dict[str, Any]) -> Verdict | None:
    problems, missing, held = status["problems"], "; ".join(status["missing"]), status["held"]
    if problems:
        return Verdict("bad", f"Failing: {problems[0]}.", "; ".join([*problems[1:], *status["missing"]]))
    if status["state"] == "starting":
        return Verdict("warn", "Starting: no messages taken yet.", missing)
    if status["state"] != "running":
        return Verdict("warn", f"Stopping: {held:,} messages in hand.", "What is not finished in time is given back.")
    if missing:
        unreachable = not status["queue"]["reachable"]
        return Verdict(
            "warn", "Not ready.", missing, "receive" if unreachable else None, "no queue" if unreachable else ""
        )
    if not held and not status["rate_per_s"]:
        return Verdict("good", "Idle: no messages to work on.", "Nothing here holds it back.")
    return None


def _advice(step: str, status: dict[str, Any]) -> str:
    """Which setting would change a step."""
    settings, model = status["settings"], status["model"]

    def named(name: str, now: object = None) -> str:
        value = settings[name]
        return f"{name} ({value}, now {now})" if value == "auto" and now else f"{name} ({value})"

    return {
        "receive": f"A call brings 10 messages at most: raise {named('receive_threads')}.",
        "download": "The image hosts or the network are slow, or "
        f"{named('download_concurrency', status['download_concurrency'])} is too low.",
        "preprocess": f"Raise {named('preprocess_workers', model.get('preprocess_workers'))} if CPU cores are free, "
        "or set min_side in the module.",
        "process": f"Raise {named('batch_size')} if the device has memory left; else another "
        f"{named('precision', model['precision'])} or {named('device', model['device'])}.",
        "callback": f"The receivers are slow or refuse, or {named('callback_concurrency')} is too low.",
    }[step]
