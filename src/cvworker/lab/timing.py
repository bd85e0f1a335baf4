"""Timing one batch, soundly: warm-up outside, synchronised, windows until the last three agree."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from cvworker.lab.results import Pass, Split, Window, steady, window_rate

WINDOWS = 5
"""A fifth of the time for a point is one window."""
MOST_WINDOWS = 10
"""After so many that do not agree the point is unstable: the machine does something else besides."""
WARM_BATCHES = 2
"""Run before anything is timed, at least: libraries choose kernels and allocate in the first batch of each shape."""
MOST_SAMPLES = 1000
"""In one window: more would say nothing new, and fill the file."""

YARDSTICK = {"cpu": 512, "cuda": 4096}
"""Rows and columns of the matrices for :func:`pace`: milliseconds of work in which every unit takes part."""
YARDSTICK_RUNS = 9

Batch = Callable[[], Split]
"""Runs one batch, waits until it is done, and says how long each part took."""


def pace(device: torch.device) -> float:
    """How fast the machine itself is just now: multiplications of two fixed fp32 matrices a second.

    The median of a few, after one that does not count. A lower clock, or a neighbour on a shared host, takes from this
    what it takes from everything, so that points measured beside different paces are known not to be comparable.
    """
    side = YARDSTICK[device.type]
    matrix = torch.ones(side, side, device=device)
    times = []
    for _ in range(YARDSTICK_RUNS + 1):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 1 / max(median(times[1:]), 1e-9)


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
