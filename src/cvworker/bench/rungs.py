"""The ladder: five designs for the same work, each with something more switched on than the one before."""

from __future__ import annotations

from dataclasses import dataclass

DOWNLOADS, CALLBACKS = 32, 16
"""Threads of the rungs that have them. The article got by with 10 and 3; at the latencies that are usual here those
would be the bound of every rung that has threads, and the rest of the ladder could not be seen."""
RECEIVERS = 3
QUEUE_SIZE = 32
"""Jobs between two steps: enough that no step waits, and few enough that the end of a rung is soon there."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One design. ``threads``, ``loader`` and ``batches`` are its switches; ``worker`` is ``cvworker run`` itself."""

    name: str
    on: str
    off: str
    threads: bool = False
    loader: bool = False
    batches: bool = False
    worker: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """What Python runs as a module, with its arguments."""
        return ("cvworker", "run") if self.worker else ("cvworker.bench", self.name)


LADDER = (
    Rung(
        "sequential",
        on="one thread: receive ten, then each message by itself, download, decode, preprocess, process, callback, "
        "delete",
        off="everything that could overlap",
    ),
    Rung(
        "threads",
        on=f"{RECEIVERS} threads receive, {DOWNLOADS} download, {CALLBACKS} call back and delete; one thread decodes, "
        "preprocesses and runs the model, image by image",
        off="DataLoader, batches",
        threads=True,
    ),
    Rung(
        "dataloader",
        on="threads, and DataLoader processes that decode and preprocess, with pinned memory on a GPU",
        off="batches: the model gets image by image",
        threads=True,
        loader=True,
    ),
    Rung(
        "batches",
        on="threads, DataLoader, and batches of --batch-size, or of what has come within --max-wait-ms",
        off="a process of its own for I/O, tuning, staging ahead, calls to SQS ten at a time, heartbeat",
        threads=True,
        loader=True,
        batches=True,
    ),
    Rung(
        "everything",
        on="cvworker run: I/O in a process of its own with many downloads a thread, as many as are needed; on a GPU "
        "the next batch on its way while one computes; precision and form of the network tuned; deletes ten at a time; "
        "heartbeat",
        off="nothing",
        worker=True,
    ),
)
RUNGS = {rung.name: rung for rung in LADDER}
