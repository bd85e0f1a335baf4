"""A module whose answers are exact: each is a print of every pixel that it was given."""

from __future__ import annotations

import os
import time
import zlib

import torch

from cvworker import Module


class Prints(Module):
    """The checksum of the pixels and their size; a tree as sample, decoded to a ``min_side``.

    The green of the first pixel: 1 raises in ``preprocess``, 2 ends its process there, 3 raises in ``process``.
    ``PRINTS_S`` in the environment is how many seconds each image takes in ``process``.
    """

    name = "prints"
    min_side = 32

    def preprocess(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        green = int(image[1, 0, 0])
        if green == 1:
            raise ValueError("this picture is too green")
        if green == 2:
            os.abort()
        return {"pixels": image[:, :24, :24], "size": torch.tensor(image.shape[1:]), "green": torch.tensor(green)}

    def process(self, batch: dict[str, torch.Tensor]) -> list[dict[str, object]]:
        time.sleep(float(os.environ.get("PRINTS_S", "0")) * len(batch["size"]))
        if 3 in batch["green"].tolist():
            raise ValueError("this batch is too green")
        rows = zip(batch["pixels"], batch["size"].tolist(), strict=True)
        return [{"print": zlib.crc32(pixels.contiguous().numpy()), "size": size} for pixels, size in rows]
