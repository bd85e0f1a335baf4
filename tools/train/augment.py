"""Small changes to pictures, other ones each time that they are trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def augment(
    images: Tensor, side: int, generator: torch.Generator, *, scale: float = 0.1, shift: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Mirror half; move, scale and recolour all a little: ``uint8 [N, 3, S, S]`` to ``float32 [N, 3, side, side]``.

    Values are from 0 to 1 then. The second tensor, ``[N, 2, 3]``, leads from places in the result to places in the
    source, both from -1 to 1.
    """
    count = len(images)

    def around(middle: float, by: float, *shape: int) -> Tensor:
        return middle + by * (2 * torch.rand(count, *shape, generator=generator) - 1)

    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = around(1, scale) * around(0, 1).sign()
    matrix[:, 1, 1] = around(1, scale)
    matrix[:, :, 2] = around(0, shift, 2)
    grid = functional.affine_grid(matrix, [count, 3, side, side], align_corners=False)
    moved = functional.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)
    middle = moved.mean(dim=(1, 2, 3), keepdim=True)
    coloured = ((moved - middle) * around(1, 0.25, 1, 1, 1) + middle).mul(around(1, 0.15, 3, 1, 1)).clamp(0, 1)
    return coloured, matrix
