"""The pictures that exported networks are compared and calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cvworker import images
from cvworker.embedded.subjects import SUBJECTS
from cvworker.errors import JobError, StartupError
from cvworker.model.precision import variations
from cvworker.module import Module

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
FIRST_SEED = 777_000
"""Drawn pictures that neither the demo shows nor its weights were trained on."""
SIZES = ((320, 240), (400, 400), (480, 360), (360, 480), (640, 480))
NOISE_SIDE = 256


def real(module: Module, folder: Path | None, count: int) -> list[Any]:
    """``count`` pictures or fewer, of the module's ``image_type``: the folder's, else drawn ones and the example's.

    Of a folder with more of them some are taken at even distances, in the order of their names.

    Raises:
        StartupError: there is no such folder, or no picture in it, or one that the worker would not accept.
    """
    if folder is not None:
        return [_decoded(path, module) for path in _evenly(_files(folder), count)]
    subject = SUBJECTS.get(module.name, SUBJECTS["threat"])
    drawn = [subject.draw(FIRST_SEED + n, SIZES[n % len(SIZES)]).image for n in range(count - count // 4)]
    return [*(_typed(image, module) for image in drawn), *variations(module.example(), count // 4)]


def noise(module: Module, count: int) -> list[Any]:
    """``count`` pictures of random pixels, half of them coarse: what no picture of a camera would show."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        cell = 32 if number % 2 else 1
        cells = torch.randint(
            0, 256, (3, NOISE_SIDE // cell, NOISE_SIDE // cell), dtype=torch.uint8, generator=generator
        )
        made.append(_typed(cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2), module))
    return made


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise StartupError(f"images: {folder} is not a folder; give one with pictures like those of production")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise StartupError(f"images: there is no picture in {folder} ({', '.join(SUFFIXES)})")
    return found


def _evenly(files: Sequence[Path], count: int) -> list[Path]:
    count = min(count, len(files))
    return [files[n * len(files) // count] for n in range(count)]


def _decoded(path: Path, module: Module) -> Any:
    try:
        return images.decode(path.read_bytes(), image_type=module.image_type, min_side=module.min_side)
    except OSError as error:
        raise StartupError(f"images: {path} cannot be read ({error.strerror or error})") from None
    except JobError as error:
        raise StartupError(f"images: {path}: {error}; take it out of the folder") from None


def _typed(image: Any, module: Module) -> Any:
    """A drawn picture (PIL) or pixels (a tensor) as the module wants its images."""
    import numpy
    from PIL import Image

    if module.image_type == "pil":
        return image if isinstance(image, Image.Image) else Image.fromarray(image.permute(1, 2, 0).numpy())
    if isinstance(image, torch.Tensor):
        return image
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()
