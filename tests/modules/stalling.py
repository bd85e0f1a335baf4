"""A module whose ``process`` stalls once, when a file is there: what a load test must not hide."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from cvworker import Module

STALL_S = 5.0


class Stalling(Module):
    """The mean of each channel; the file named by ``STALL_FILE`` goes away, and five seconds with it."""

    name = "stalling"

    def preprocess(self, image: Any) -> torch.Tensor:
        mean: torch.Tensor = image.float().mean((1, 2))
        return mean

    def process(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        trigger = Path(os.environ["STALL_FILE"])
        if trigger.exists():
            trigger.unlink()
            time.sleep(STALL_S)
        return [{"mean": row} for row in batch.tolist()]
