"""How many samples make the best batch: found by doubling, for ``batch_size: auto`` and for ``cvworker profile``."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from cvworker import memory
from cvworker.memory import is_out_of_memory

GAIN = 0.05
"""A doubled batch that gives less than 5 % more images a second has gained nothing."""
PATIENCE = 2
"""Doublings in a row without a gain, after which there is none to be expected."""
LARGEST = 4096
AUTO_LARGEST = 256
"""At start: the worker holds three batches, and a message waits for those in front of it."""
BUDGET_S = 5.0
"""For measuring at start."""
ROUNDS = 3
SHARE = 0.5
"""Of the memory that is available: the worker holds images and samples besides."""


class Doubling:
    """Batch sizes 1, 2, 4, …, until the gain is under :data:`GAIN` :data:`PATIENCE` times in a row, or ``largest``."""

    def __init__(self, largest: int = LARGEST, first: int = 1) -> None:
        self.next: int | None = first
        self._largest = largest
        self._best = 0.0
        self._without_gain = 0

    def measured(self, images_s: float) -> None:
        """Take in the rate of the batch size that was next."""
        assert self.next is not None
        gained = images_s > self._best * (1 + GAIN)
        self._without_gain = 0 if gained else self._without_gain + 1
        self._best = max(self._best, images_s)
        over = self._without_gain >= PATIENCE or self.next >= self._largest
        self.next = None if over else min(2 * self.next, self._largest)

    def ended(self) -> None:
        """There is no room for the batch size that was next."""
        self.next = None


class Room:
    """Whether a batch twice the last fits into the host's memory; on a device, its own errors tell that."""

    def __init__(self, *, on_device: bool) -> None:
        self._on_device = on_device
        self._base = memory.resident_bytes()

    def fits(self, _batch: int) -> bool:
        """Whether twice of what batches have taken so far is there."""
        return self._on_device or 2 * (memory.peak_bytes() - self._base) <= SHARE * memory.available_bytes()


def smallest_good(rates: dict[int, float]) -> int:
    """The smallest batch within :data:`GAIN` of the highest rate: a larger one only takes longer."""
    enough = max(rates.values()) * (1 - GAIN)
    return min(batch for batch, rate in rates.items() if rate >= enough)


def measure(
    run: Callable[[int], object],
    clock: Callable[[], float],
    *,
    largest: int = AUTO_LARGEST,
    budget_s: float = BUDGET_S,
    fits: Callable[[int], bool] = lambda _batch: True,
) -> tuple[int, dict[int, float]]:
    """The best batch size for ``run(batch)``, and the images a second of each that was tried.

    Each size is run once to warm up and :data:`ROUNDS` times more. Nothing larger is tried when ``budget_s`` seconds
    are over, when one that is twice as slow would not end within them, when ``fits`` says no, or when the device's
    memory does. Raises what ``run`` raises for a single image.
    """
    doubling, rates, until = Doubling(largest), {}, clock() + budget_s
    while (batch := doubling.next) is not None:
        times = []
        try:
            for _ in range(1 + ROUNDS):
                began = clock()
                run(batch)
                times.append(clock() - began)
                if clock() > until:
                    break
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            break
        rates[batch] = batch / max(median(times[1:] or times), 1e-9)
        doubling.measured(rates[batch])
        if doubling.next and (clock() + 2 * (1 + ROUNDS) * times[-1] > until or not fits(doubling.next)):
            doubling.ended()
    return smallest_good(rates), rates
