"""Weights for the example: the digits of Pillow's own font. ``python make_weights.py digits.safetensors``"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from text_line import fitted, unit

DIGITS = "0123456789"
SIZE = 64


def draw(text: str, size: int = SIZE, spacing: int = 4) -> Image.Image:
    """A line of text, black on white, with at least ``spacing`` pixels between any two glyphs."""
    font = ImageFont.load_default(size)
    page = Image.new("RGB", (size + len(text) * (size + spacing), 2 * size), "white")
    pen, at = ImageDraw.Draw(page), size // 2
    for letter in text:
        left, _, right, _ = pen.textbbox((0, 0), letter, font=font)
        pen.text((at - left, size // 4), letter, font=font, fill="black")
        at += int(right - left) + spacing
    return page


def make(path: Path) -> Path:
    """Write one row for each digit, cut out as the module cuts them out of pictures."""
    pixels = (torch.from_numpy(np.array(draw(digit))).float().mean(2) for digit in DIGITS)
    glyphs = [fitted(page[:, (page < 128).any(0)]) for page in pixels]
    save_file({"templates": unit(torch.stack(glyphs))}, path, {"alphabet": DIGITS})
    return path


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
