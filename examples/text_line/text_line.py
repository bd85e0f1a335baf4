"""Text of any length from pictures of any size: one line of dark digits on light paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cvworker import Module, StartupError

DARK = 128  # of 255: less is ink
HEIGHT, WIDTH = 32, 24  # of a glyph as the weights have it, in pixels


class TextLine(Module):
    """The text of a line, and how sure each glyph is: a picture gives as many glyphs as it has, none included."""

    name = "text_line"

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        if weights is None:
            raise StartupError(
                "weights: make some with 'python make_weights.py digits.safetensors', and give --weights"
            )
        with safe_open(weights, framework="numpy") as file:
            self.alphabet = file.metadata()["alphabet"]

    def setup(self, device: torch.device) -> None:
        """One matrix, of which each row is a glyph of unit length: a product with it is a cosine."""
        self.templates = load_file(self.weights)["templates"].to(device)

    def preprocess(self, image: Tensor) -> Tensor:
        """From ``uint8 [3, H, W]`` to ``uint8 [n, HEIGHT, WIDTH]``: the glyphs of the line, ink 255 on paper 0."""
        grey = image.float().mean(0)
        glyphs = [fitted(grey[:, start:end]) for start, end in runs((grey < DARK).any(0))]
        return torch.stack(glyphs) if glyphs else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.uint8)

    def collate(self, samples: Sequence[Tensor]) -> dict[str, Any]:
        """All glyphs of all pictures in one tensor, and how many are whose: nothing is padded."""
        return {"glyphs": torch.cat(list(samples)), "counts": [len(sample) for sample in samples]}

    def process(self, batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        scores, letters = (unit(batch["glyphs"]) @ self.templates.T).max(1)
        parts = zip(scores.split(batch["counts"]), letters.split(batch["counts"]), strict=True)
        return [
            {"text": "".join(self.alphabet[n] for n in which.tolist()), "scores": [round(s, 3) for s in how.tolist()]}
            for how, which in parts
        ]


def runs(inked: Tensor) -> list[tuple[int, int]]:
    """Where each run of True in ``bool [W]`` begins and ends."""
    edges = torch.diff(pad(inked.int(), (1, 1))).nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def fitted(column: Tensor) -> Tensor:
    """A glyph cut out of ``float [H, w]`` and scaled to HEIGHT, at the left of ``uint8 [HEIGHT, WIDTH]``."""
    rows = (column < DARK).any(1).nonzero().flatten()
    glyph = 255 - column[rows[0] : rows[-1] + 1]
    width = max(1, min(WIDTH, round(glyph.shape[1] * HEIGHT / glyph.shape[0])))
    glyph = interpolate(glyph[None, None], size=(HEIGHT, width), mode="bilinear", antialias=True)[0, 0]
    return pad(glyph, (0, WIDTH - width)).round().clamp(0, 255).to(torch.uint8)


def unit(glyphs: Tensor) -> Tensor:
    """``uint8 [n, HEIGHT, WIDTH]`` as ``float [n, HEIGHT * WIDTH]`` of mean 0 and length 1."""
    flat = glyphs.float().flatten(1)
    return torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
