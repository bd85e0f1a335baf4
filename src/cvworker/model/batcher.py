"""Dynamic batches: full, or as old as the first sample may get."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Sample:
    """One preprocessed image, waiting for its batch."""

    number: int
    value: Any
    preprocess_ms: float
    alone: bool = False
    arrived: float = 0.0


class Batcher:
    """Forms batches after preprocessing, where partial ones cannot fragment over workers.

    A batch leaves when it is full, or when its first sample has waited ``max_wait`` seconds. It is only formed when
    somebody takes it, so samples go on joining while the device is busy. A sample that must be alone is a batch.
    """

    def __init__(self, batch_size: int, max_wait: float, clock: Callable[[], float]) -> None:
        self.batch_size = batch_size
        self._max_wait = max_wait
        self._clock = clock
        self._samples: deque[Sample] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, samples: list[Sample]) -> None:
        now = self._clock()
        with self._changed:
            for sample in samples:
                sample.arrived = now
                self._samples.append(sample)
            self._changed.notify()

    def close(self) -> None:
        """No more samples will come: what waits leaves at once."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def ready(self) -> list[Sample]:
        """The batch that may leave now; empty if none may yet."""
        with self._changed:
            return self._pop() if self._leaves_in() <= 0 else []

    def take(self) -> list[Sample]:
        """Wait for the next batch; empty when closed and nothing is left."""
        with self._changed:
            while True:
                if not self._samples:
                    if self._closed:
                        return []
                    self._changed.wait()
                elif (wait := self._leaves_in()) > 0:
                    self._changed.wait(wait)
                else:
                    return self._pop()

    def _leaves_in(self) -> float:
        """Seconds until a batch may leave."""
        if not self._samples:
            return float("inf")
        if self._closed or self._run() < len(self._samples) or self._run() >= self.batch_size:
            return 0.0
        if self._samples[0].alone:
            return 0.0
        return self._samples[0].arrived + self._max_wait - self._clock()

    def _run(self) -> int:
        """How many samples in front may share a batch."""
        count = 0
        for sample in self._samples:
            if sample.alone:
                return max(count, 1)
            count += 1
            if count >= self.batch_size:
                break
        return count

    def _pop(self) -> list[Sample]:
        return [self._samples.popleft() for _ in range(self._run())]
