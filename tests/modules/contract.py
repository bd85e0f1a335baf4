"""What the contract tests run: modules that fail for the pictures whose colours say so."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from cvworker import Module


class Picky(Module):
    """The mean of each channel. Green 1 raises in ``preprocess``; red 250, 252 and 253 spoil ``process``."""

    name = "picky"

    def preprocess(self, image):
        if int(image[1, 0, 0]) == 1:
            raise ValueError("this picture is too green")
        return image.float().mean((1, 2))

    def process(self, batch):
        return [self._result([round(value) for value in row.tolist()]) for row in batch]

    def _result(self, mean):
        if mean[0] == 250:
            raise ValueError("this picture is too red")
        if mean[0] == 252:
            return {"mean": torch.zeros(3)}
        if mean[0] == 253:
            return {"mean": float("inf")}
        return {"mean": mean}


class Gated(Picky):
    """Is not ready before the file that ``CONTRACT_GATE`` names exists."""

    name = "gated"

    def setup(self, device):
        while not Path(os.environ["CONTRACT_GATE"]).exists():
            time.sleep(0.05)


class RaisesInInit(Picky):
    def __init__(self, weights=None):
        super().__init__(weights)
        raise ValueError("no luck\nin the beginning")


class RaisesInSetup(Picky):
    def setup(self, device):
        raise ValueError("no luck\nin setup")
