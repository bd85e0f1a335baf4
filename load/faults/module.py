"""The module that the harness's workers run: its answers tell which picture it saw, and some pictures poison it."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch

from cvworker import Module

GOOD, RAISES, SEGFAULTS, HANGS = 77, 201, 202, 203
"""The blue of a picture says what ``process`` does with it."""


class Fragile(Module):
    """The mean of each channel, unless the blue one is poison."""

    name = "fragile"

    def preprocess(self, image: Any) -> torch.Tensor:
        mean: torch.Tensor = image.float().mean((1, 2))
        return mean

    def process(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        results = [[round(value) for value in row] for row in batch.tolist()]
        for _, _, blue in results:
            if blue == RAISES:
                raise ValueError("this picture is too blue")
            if blue == SEGFAULTS:
                ctypes.string_at(0)  # at once and in this thread; a signal to oneself may arrive after the answer
            if blue == HANGS:
                time.sleep(3600)
        return [{"mean": mean} for mean in results]
