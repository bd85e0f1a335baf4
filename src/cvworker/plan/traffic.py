"""What arrives: rate over a day, bursts, pictures, and how long others take to answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DAY_S = 86_400.0
HOURS = 24
CURVE_STEP_S = 60.0
RARE_S = 10.0
"""Bursts that are further apart than this are looked at one by one."""
Z95 = 1.6448536269514722
"""The 95th percentile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long something takes, in seconds: lognormal with this median and 95th percentile, or always the same."""

    median_s: float
    p95_s: float = 0.0
    """0: no spread."""

    @property
    def _sigma(self) -> float:
        return math.log(self.p95_s / self.median_s) / Z95 if self.p95_s > self.median_s > 0 else 0.0

    @property
    def mean_s(self) -> float:
        return self.median_s * math.exp(self._sigma**2 / 2)

    def draw(self, random: np.random.Generator, count: int) -> Floats:
        """``count`` samples in seconds."""
        if not self._sigma:
            return np.full(count, self.median_s)
        return self.median_s * np.exp(self._sigma * random.standard_normal(count))


@dataclass(frozen=True, slots=True)
class Peak:
    """A time of the day in which at least ``rate`` images a second arrive."""

    at_s: float
    seconds: float
    rate: float


@dataclass(frozen=True, slots=True)
class Images:
    """Pictures of one size, and their share of all."""

    bytes: int
    megapixels: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """A day of requests.

    The daily curve is 24 numbers in any unit, one for each full hour and straight lines between them; scaled so that
    the day's mean is ``rate``, in images a second. ``burst`` messages arrive together; bursts come by chance (Poisson).
    """

    rate: float
    daily: tuple[float, ...] = (1.0,) * HOURS
    peaks: tuple[Peak, ...] = ()
    burst: int = 1
    images: tuple[Images, ...] = (Images(130_000, 0.7),)
    host: Latency = field(default=Latency(0.1))
    """From the request for a picture to its last byte, but for the time that the worker's own network takes."""
    callback: Latency = field(default=Latency(0.05))
    host_errors: float = 0.0
    """Share of downloads that fail for now: the message comes back after a delay."""

    def rate_at(self, seconds: Floats) -> Floats:
        """Images a second at these seconds since midnight; the days are alike."""
        hours = np.mod(seconds, DAY_S) / 3600
        curve = np.asarray([*self.daily, self.daily[0]])
        rates = np.interp(hours, np.arange(HOURS + 1), curve) * self.rate / max(float(np.mean(self.daily)), 1e-12)
        for peak in self.peaks:
            inside = np.mod(seconds - peak.at_s, DAY_S) < peak.seconds
            rates = np.where(inside, np.maximum(rates, peak.rate), rates)
        return np.asarray(rates, dtype=np.float64)

    @property
    def busiest(self) -> float:
        """The highest rate of the day, in images a second."""
        return float(self.rate_at(np.arange(0, DAY_S, CURVE_STEP_S)).max())

    @property
    def a_day(self) -> float:
        """Images a day that are to be expected."""
        return float(self.rate_at(np.arange(0, DAY_S, CURVE_STEP_S) + CURVE_STEP_S / 2).sum() * CURVE_STEP_S)

    @property
    def bursts_are_rare(self) -> bool:
        """Whether bursts come one by one, rather than being part of a steady state."""
        return self.burst > RARE_S * self.rate

    @property
    def mean_bytes(self) -> float:
        return self._mean([each.bytes for each in self.images])

    @property
    def mean_megapixels(self) -> float:
        return self._mean([each.megapixels for each in self.images])

    def _mean(self, values: list[float]) -> float:
        shares = [each.share for each in self.images]
        return sum(value * share for value, share in zip(values, shares, strict=True)) / sum(shares)

    def busiest_stretch(self, seconds: float) -> float:
        """When the stretch of that length with the most images begins, in seconds since midnight."""
        step = min(CURVE_STEP_S, seconds)
        times = np.arange(0, DAY_S, step)
        rates = self.rate_at(times)
        width = max(1, round(seconds / step))
        wrapped = np.concatenate([rates, rates[: width - 1]])
        sums = np.convolve(wrapped, np.ones(width), mode="valid")
        return float(times[int(sums.argmax())])

    def scaled(self, factor: float) -> Traffic:
        """The same day with so many times the images."""
        peaks = tuple(replace(peak, rate=peak.rate * factor) for peak in self.peaks)
        return replace(self, rate=self.rate * factor, peaks=peaks)

    def steady(self, rate: float) -> Traffic:
        """The same images at one rate all day."""
        return replace(self, rate=rate, daily=(1.0,) * HOURS, peaks=())

    def arrivals(self, random: np.random.Generator, start: float, seconds: float) -> Floats:
        """When messages arrive in ``[start, start + seconds)``, ascending, counted from ``start``.

        A Poisson process of bursts with the curve's rate, drawn by turning the expected number over time around.
        """
        step = min(CURVE_STEP_S, seconds / 100)
        edges = np.linspace(0.0, seconds, max(2, math.ceil(seconds / step) + 1))
        middle = (edges[1:] + edges[:-1]) / 2
        expected = np.concatenate([[0.0], np.cumsum(self.rate_at(start + middle) * np.diff(edges))]) / self.burst
        count = int(random.poisson(expected[-1])) if expected[-1] > 0 else 0
        bursts = np.sort(np.interp(random.random(count) * expected[-1], expected, edges))
        return np.repeat(bursts, self.burst)

    def draw_images(self, random: np.random.Generator, count: int) -> tuple[Floats, Floats]:
        """Bytes and megapixels of ``count`` images."""
        shares = np.asarray([each.share for each in self.images])
        kinds = random.choice(len(self.images), size=count, p=shares / shares.sum()) if len(shares) > 1 else None
        sizes = np.asarray([(each.bytes, each.megapixels) for each in self.images], dtype=np.float64)
        drawn = sizes[kinds] if kinds is not None else np.repeat(sizes, count, axis=0)
        return drawn[:, 0], drawn[:, 1]
