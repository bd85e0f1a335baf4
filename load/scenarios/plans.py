"""The scenarios: which traffic is offered, one row after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SHARES = tuple(share / 10 for share in range(1, 13))
"""Of the offline throughput: 10 % to 120 %."""
WARM, PROBE = 96, 3.0
"""Requests that warm the workers up and tell their pace roughly; seconds of work at that pace, to tell it better."""
TIMES_THE_MEAN = 10
BURST_SHARE = 0.3
"""The mean of ``burst``, of the pace: the burst itself is three times what the workers can do."""
BURST_S = 3.0


class Offered(NamedTuple):
    """Traffic of one row, in the words of ``arrivals.py``."""

    name: str
    traffic: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long the rows of each scenario take, seconds; ``bursts`` is how many."""

    offline: float = 20.0
    online: float = 20.0
    shares: tuple[float, ...] = SHARES
    bursts: int = 3
    soak: float = 600.0
    soak_share: float = 0.7
    arrivals: str = "poisson"


def offline(pace: float, sizes: Sizes) -> list[Offered]:
    """As many as ``pace`` does in the time given."""
    count = max(WARM, round(pace * sizes.offline))
    return [Offered("full queue", f"full:{count}", sizes.offline)]


def online(pace: float, sizes: Sizes) -> list[Offered]:
    """Each share of ``pace``, from the lowest to the highest."""
    return [
        Offered(f"{share:.0%}", f"{sizes.arrivals}:{share * pace:.2f}", sizes.online) for share in sorted(sizes.shares)
    ]


def burst(pace: float, sizes: Sizes) -> list[Offered]:
    """Nothing, then ten times the mean, then nothing, so that the mean is the mean."""
    mean = BURST_SHARE * pace
    idle = (TIMES_THE_MEAN - 1) * BURST_S / 2
    steps = f"0@{idle:g},{TIMES_THE_MEAN * mean:.2f}@{BURST_S:g},0@{idle:g}"
    return [Offered(f"10 × {mean:.1f}/s", "step:" + ",".join([steps] * sizes.bursts), 0.0)]


def soak(pace: float, sizes: Sizes) -> list[Offered]:
    """One share of ``pace`` for a long time."""
    rate = sizes.soak_share * pace
    return [Offered(f"{sizes.soak_share:.0%}", f"{sizes.arrivals}:{rate:.2f}", sizes.soak)]


MAKERS = {"offline": offline, "online": online, "burst": burst, "soak": soak}
