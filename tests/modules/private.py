"""A module whose results carry a mark, and that fails with pictures and results in its local variables."""

from __future__ import annotations

import os
import signal

import torch

from cvworker import Module

RESULT = "RESULTMARKER" + "plugh"


class Private(Module):
    """What the red of a picture's first pixel does: 240 raises in ``preprocess``, 241 kills its process there, 242
    raises in ``process``, 243 kills its process there; all others are answered with the mark."""

    name = "private"

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        pixels = bytes(image.permute(1, 2, 0)[0].flatten().tolist())
        red = int(image[0, 0, 0])
        if red == 240:
            held = pixels
            raise ValueError(f"too private, with {len(held)} bytes at hand")
        if red == 241:
            os.kill(os.getpid(), signal.SIGSEGV)
        return image[:, 0, 0].float()

    def process(self, batch: torch.Tensor) -> list[dict[str, str]]:
        results = [{"says": f"{RESULT} {row[0]:.0f}"} for row in batch]
        if 242 in batch[:, 0]:
            raise ValueError(f"too private, with {len(results)} results at hand")
        if 243 in batch[:, 0]:
            os.abort()
        return results
