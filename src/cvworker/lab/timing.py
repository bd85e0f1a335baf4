"""Timing one batch, soundly: warm-up outside, synchronised, windows until the last three agree."""

from __future__ import annotations

from collections.abc import Callable

from cvworker.lab.results import Pass, Split, Window, steady, window_rate

WINDOWS = 5
"""A fifth of the time for a point is one window."""
MOST_WINDOWS = 10
"""After so many that do not agree the point is unstable: the machine does something else besides."""
WARM_BATCHES = 2
"""Run before anything is timed, at least: libraries choose kernels and allocate in the first batch of each shape."""
MOST_SAMPLES = 1000
"""In one window: more would say nothing new, and fill the file."""

Batch = Callable[[], Split]
"""Runs one batch, waits until it is done, and says how long each part took."""


def warm_up(run: Batch, seconds: float) -> None:
    """Run batches for the length of one window, at least :data:`WARM_BATCHES`."""
    _window(run, seconds / WINDOWS)
    for _ in range(WARM_BATCHES - 1):
        run()


def measure(run: Batch, batch: int, seconds: float) -> Pass:
    """One pass: windows of a fifth of ``seconds`` until the last three agree, three at least and ten at most."""
    windows: Pass = []
    rates: list[float] = []
    while len(windows) < MOST_WINDOWS and not steady(rates):
        windows.append(_window(run, seconds / WINDOWS))
        rates.append(window_rate(windows[-1], batch))
    return windows


def _window(run: Batch, seconds: float) -> Window:
    window: Window = []
    spent = 0.0
    while not window or (spent < seconds * 1000 and len(window) < MOST_SAMPLES):
        window.append(run())
        spent += window[-1].total
    return window
