"""What fails, and when: by seed, so that a run that found something can be run again."""

from __future__ import annotations

import random
from collections import Counter

FAULTS = {
    "image": ("500", "503", "reset", "short", "slow", "hang"),
    "callback": ("503", "503", "429", "reset", "reset after", "slow"),
    "receive": ("500", "503", "throttle", "reset", "reset after", "slow", "duplicate", "duplicate", "ghost"),
    "batch": ("500", "503", "throttle", "reset", "reset after", "slow", "partial", "partial"),
}
"""For each kind of peer the faults it has, one as likely as the other (one that stands twice, twice as likely).

``reset`` cuts the connection before anything happened, ``reset after`` when it has happened and only its answer is
missing. ``duplicate`` delivers a message that is in flight, ``ghost`` one that was deleted.
"""


class Chance:
    """Decides by seed, key and how often that key was asked for: the order in which calls arrive changes nothing."""

    def __init__(self, seed: int, rate: float = 0.0) -> None:
        self.seed = seed
        self.rate = rate
        self.injected: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()

    def of(self, *key: object) -> random.Random:
        """A generator of random numbers for this key alone."""
        return random.Random(f"{self.seed}:{key}")  # noqa: S311 - repeatable is what it must be

    def fault(self, kind: str, key: object) -> str:
        """What goes wrong with this call; empty for nothing."""
        if not self.rate:
            return ""
        name = f"{kind}:{key}"
        self._asked[name] += 1
        chance = self.of(name, self._asked[name])
        if chance.random() >= self.rate:
            return ""
        fault = chance.choice(FAULTS[kind])
        self.injected[f"{kind} {fault}"] += 1
        return fault
