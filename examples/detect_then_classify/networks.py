"""Two small networks for the example: one finds things on a dark ground, the other tells what colour they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CELL = 8
"""Pixels: the side of the squares that the detector looks at."""


class Detector(nn.Module):
    """Like torchvision's: from images ``float [3, H, W]`` of any size to ``boxes [n, 4]`` and ``scores [n]`` for each.

    One convolution scores each cell; neighbours that score above 0 are one thing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(3, 1, CELL, stride=CELL)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [self._found(self.score(image[None])[0, 0].float()) for image in images]

    def _found(self, scores: Tensor) -> dict[str, Tensor]:
        boxes, best = [], []
        for thing in _groups(scores > 0):
            ys, xs = zip(*thing, strict=True)
            boxes.append([min(xs), min(ys), max(xs) + 1, max(ys) + 1])
            best.append(scores[ys, xs].max())
        return {
            "boxes": CELL * torch.tensor(boxes, dtype=torch.float32, device=scores.device).reshape(-1, 4),
            "scores": torch.stack(best).sigmoid() if best else scores.new_zeros(0),
        }


class Classifier(nn.Sequential):
    """From crops ``float [n, 3, S, S]`` to logits ``[n, classes]``."""

    def __init__(self, classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))


def _groups(cells: Tensor) -> list[list[tuple[int, int]]]:
    """The cells (y, x) that are True, as groups of neighbours, from the top left to the bottom right."""
    left = {(y, x) for y, x in cells.nonzero().tolist()}
    groups = []
    while left:
        group = [min(left)]
        left.remove(group[0])
        for y, x in group:  # which grows meanwhile
            near = left & {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)}
            group += near
            left -= near
        groups.append(group)
    return groups
