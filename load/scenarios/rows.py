"""The numbers of a row, worked out from its raw data and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from load.scenarios.arrivals import Floats

BEHIND_S, BEHIND_SHARE = 0.1, 0.01
"""Where more than this share of the requests was sent so much later than intended, the run does not count. A late send
is in the latency, which counts from the intended time; but above this share it is what the higher percentiles tell,
up to p99, and what was offered is not what was meant."""
FULL = "full:"
SETTLED, NEARLY_ALL = 0.2, 0.95
"""Of a full queue's answers: the pace is taken between them, when the start is over and the last batches are not."""
PERCENTILES = (50, 90, 95, 99)
SPLIT = (
    "send",
    "queue",
    "download wait",
    "download",
    "preprocess wait",
    "preprocess",
    "batch wait",
    "to device",
    "compute",
    "callback",
)
"""Where a message's time goes, in its order."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table. Rates a second, ``*_ms`` milliseconds; None is what nobody told."""

    name: str
    traffic: str
    requests: int
    offered: float
    achieved: float
    latency_ms: dict[str, float]
    """p50, p90, p95, p99, avg and max, from intended to answered; an unanswered request counts with all the time
    that it was waited for."""
    split_ms: dict[str, float | None]
    """Means, see :data:`SPLIT`."""
    batch: float | None
    cpu: float | None
    """Cores that the workers kept busy, on average."""
    cpu_beside: float
    """The same of queue, image host, receiver and generator."""
    gpu: float | None
    gpu_memory_mb: float | None
    memory_mb: float | None
    errors: int
    repeats: int
    lost: int
    late: float
    """Share of the requests that were sent too late, see :data:`BEHIND_S`."""
    full: bool
    """Whether all were sent at the beginning: then there is no send to be late with."""

    @property
    def valid(self) -> bool:
        return self.full or self.late <= BEHIND_SHARE


def row(raw: dict[str, Any]) -> Row:
    """Of one row's raw data."""
    samples, counters = raw["samples"], raw["counters"]
    intended, sent, answered = (_floats(samples[name]) for name in ("intended", "sent", "answered"))
    full = raw["traffic"].startswith(FULL)
    here = np.where(np.isnan(answered), samples["waited"], answered)
    latencies = (here - intended) * 1000
    sizes, seconds = raw["sizes"], max(counters["at"], 1e-9)
    busy, taken = raw["gpu"]["busy"], raw["gpu"]["memory_bytes"]
    workers = bool(sizes)
    return Row(
        name=raw["name"],
        traffic=raw["traffic"],
        requests=len(intended),
        offered=len(intended) / raw["seconds"] if raw["seconds"] else float("inf"),
        achieved=pace(answered, full=full),
        latency_ms={
            **{f"p{at}": float(np.percentile(latencies, at, method="inverted_cdf")) for at in PERCENTILES},
            "avg": float(latencies.mean()),
            "max": float(latencies.max()),
        },
        split_ms=split(raw),
        batch=counters["samples"] / counters["batches"] if counters["batches"] else None,
        cpu=counters["cpu_s"] / seconds if workers else None,
        cpu_beside=(counters["world_cpu_s"] + counters["queue_cpu_s"] + samples["cpu_s"]) / seconds,
        gpu=busy,
        gpu_memory_mb=None if taken is None else taken / 2**20,
        memory_mb=max(sizes["memory_bytes"]) / 2**20 if workers else None,
        errors=sum(code not in ("ok", "lost") for code in samples["code"]),
        repeats=samples["repeats"],
        lost=sum(code == "lost" for code in samples["code"]),
        late=float(np.mean(np.nan_to_num(sent - intended, nan=0.0) > BEHIND_S)),
        full=full,
    )


def pace(answered: Floats, *, full: bool = False) -> float:
    """Answers a second from the first to the last of them; of a full queue from where it has settled."""
    times = np.sort(answered[~np.isnan(answered)])
    if full:
        times = times[int(SETTLED * len(times)) : max(1, int(NEARLY_ALL * len(times)))]
    took = times[-1] - times[0] if len(times) > 1 else 0.0
    return float((len(times) - 1) / took) if took > 0 else 0.0


def split(raw: dict[str, Any]) -> dict[str, float | None]:
    """Where the time goes, means over the answers that tell everything, in milliseconds.

    What the answers tell is taken from them. What is left of their total is waiting between the steps; it is shared
    out by how many messages waited where, as Little's law has it: mean wait = mean number waiting / rate. What waits
    in the model process, for a free DataLoader process and for its batch, is what is left then.
    """
    samples, counters, looks = raw["samples"], raw["counters"], raw["looks"]
    told = {name: _floats(samples[f"{name}_ms"]) for name in ("queue", "download", "preprocess", "process", "total")}
    whole = ~np.isnan(np.sum(list(told.values()), axis=0))
    found: dict[str, float | None] = dict.fromkeys(SPLIT)
    if not whole.any():
        return found
    means = {name: float(column[whole].mean()) for name, column in told.items()}
    latencies = (_floats(samples["answered"]) - _floats(samples["intended"]))[whole] * 1000
    rest = max(0.0, means["total"] - sum(means[name] for name in ("queue", "download", "preprocess", "process")))
    found |= {
        "send": max(0.0, float(latencies.mean()) - means["total"]),
        "queue": means["queue"],
        "download": means["download"],
        "preprocess": means["preprocess"],
        "compute": means["process"],
    }
    rate = len(latencies) / max(counters["at"], 1e-9)
    if looks and rate:
        waits = {name: 1000 * float(np.mean(looks[f"{name}_queue"])) / rate for name in ("download", "inference")}
        scale = min(1.0, rest / sum(waits.values())) if sum(waits.values()) else 1.0
        found["download wait"], found["preprocess wait"] = (scale * wait for wait in waits.values())
        found["batch wait"] = rest - scale * sum(waits.values())
        found["to device"] = 1000 * counters["copies_s"] / counters["copies"] if counters.get("copies") else 0.0
    if counters["callbacks"]:
        found["callback"] = 1000 * counters["callback_s"] / counters["callbacks"]
    return found


def knee(rows: list[Row]) -> Row | None:
    """Where the curve of mean latency over offered rate bends: the row farthest below the line from first to last.

    Both axes scaled to 0..1 (Satopää et al., Finding a "Kneedle" in a Haystack, ICDCSW 2011). Rows that do not count
    are left out; None where fewer than three are left, or latency does not rise.
    """
    valid = sorted((each for each in rows if each.valid), key=lambda each: each.offered)
    if len(valid) < 3:
        return None
    rates, times = [each.offered for each in valid], [each.latency_ms["avg"] for each in valid]
    if rates[-1] <= rates[0] or times[-1] <= times[0]:
        return None
    below = [
        (rate - rates[0]) / (rates[-1] - rates[0]) - (ms - times[0]) / (max(times) - times[0])
        for rate, ms in zip(rates, times, strict=True)
    ]
    return valid[below.index(max(below))]


def outstanding(raw: dict[str, Any], points: int = 200) -> tuple[list[float], list[float]]:
    """Seconds, and how many requests were sent and not answered at each."""
    samples = raw["samples"]
    intended, answered = np.sort(_floats(samples["intended"])), np.sort(_floats(samples["answered"]))
    answered = answered[~np.isnan(answered)]
    times = np.linspace(0.0, samples["waited"], points)
    waiting = np.searchsorted(intended, times, "right") - np.searchsorted(answered, times, "right")
    return [float(each) for each in times], [float(each) for each in waiting]


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth an hour of something that was looked at now and then, and the error of that (one standard deviation)."""

    name: str
    seconds: float
    """Between the first look that counts and the last."""
    first: float
    last: float
    an_hour: float
    error: float


def slopes(raw: dict[str, Any]) -> list[Slope]:
    """By least squares over the looks after the first quarter, in which caches fill and heaps find their size."""
    sizes = raw["sizes"]
    found = []
    for name, unit in (("memory_bytes", 2**20), ("threads", 1), ("descriptors", 1)):
        kept = [(at, value / unit) for at, value in zip(sizes.get("at", []), sizes.get(name, []), strict=True)]
        kept = kept[len(kept) // 4 :]
        if len(kept) < 4:
            continue
        hours, values = np.asarray(kept).T / np.asarray([[3600.0], [1.0]])
        centred = hours - hours.mean()
        slope = float((centred * (values - values.mean())).sum() / (centred**2).sum())
        left = values - values.mean() - slope * centred
        error = float(np.sqrt((left**2).sum() / (len(left) - 2) / (centred**2).sum()))
        seconds = 3600 * float(hours[-1] - hours[0])
        found.append(Slope(name.removesuffix("_bytes"), seconds, float(values[0]), float(values[-1]), slope, error))
    return found


def _floats(column: list[float | None]) -> Floats:
    return np.asarray([np.nan if each is None else each for each in column], dtype=np.float64)
