"""The module of the proof's workers: its ``process`` waits as for a GPU, so that two cores are enough for four."""

from __future__ import annotations

import time
from typing import Any

import torch

from cvworker import Module

FIXED_S, EACH_S = 0.2, 0.025
"""Seconds of a batch: so much, and so much for each image."""


class Waiting(Module):
    """The mean of each channel, after the time that a device would take."""

    name = "waiting"

    def preprocess(self, image: Any) -> torch.Tensor:
        mean: torch.Tensor = image.float().mean((1, 2))
        return mean

    def process(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        time.sleep(FIXED_S + EACH_S * len(batch))
        return [{"mean": row} for row in batch.tolist()]
