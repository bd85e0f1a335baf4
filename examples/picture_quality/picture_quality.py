"""Is this picture worth keeping, and have we seen it before: numpy only, no weights, no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cvworker import Module

SIDE = 256
"""Pixels: pictures are measured at this size, whatever they were."""
BLURRED, DARK, BRIGHT = 20.0, 40.0, 215.0


class PictureQuality(Module):
    """Brightness, contrast, sharpness, and a hash that is nearly the same for pictures that look the same."""

    name = "picture_quality"
    image_type = "pil"
    min_side = SIDE

    def preprocess(self, image: Image.Image) -> dict[str, Any]:
        """Grey values ``uint8 [SIDE, SIDE]``, and whether each of 64 places is lighter than the one on its left."""
        grey = image.convert("L")
        small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
        return {"grey": np.asarray(grey.resize((SIDE, SIDE))), "lighter": small[:, 1:] > small[:, :-1]}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Arrays of arrays: the default would make torch's tensors of them."""
        return {key: np.stack([sample[key] for sample in samples]) for key in ("grey", "lighter")}

    def process(self, batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        grey = batch["grey"].astype(np.float32)
        brightness, contrast = grey.mean((1, 2)), grey.std((1, 2))
        across, down = grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:], grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]
        sharpness = (across + down - 4 * grey[:, 1:-1, 1:-1]).var((1, 2))  # of the Laplacian
        hashes = np.packbits(batch["lighter"].reshape(len(grey), -1), axis=1)
        return [
            {
                "brightness": round(float(brightness[n]), 1),
                "contrast": round(float(contrast[n]), 1),
                "sharpness": round(float(sharpness[n]), 1),
                "hash": hashes[n].tobytes().hex(),
                "usable": bool(sharpness[n] >= BLURRED and DARK <= brightness[n] <= BRIGHT),
            }
            for n in range(len(grey))
        ]
