"""Drawn pictures as a client's might arrive, and sets of them, kept for the next run of the same code."""

from __future__ import annotations

import hashlib
import inspect
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TRAIN, VALIDATE, TEST = 1_000_000, 2_000_000, 3_000_000  # first seeds; the demo counts from 0, the tests from 5 million
SIZES = [(320, 240), (400, 400), (480, 640), (512, 512), (640, 426), (640, 480), (800, 600), (768, 1024), (1024, 768)]
RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.LANCZOS)

Sample = Callable[[int], Mapping[str, np.ndarray]]


def arrived(source: ModuleType, seed: int, side: int) -> tuple[np.ndarray, Any]:
    """What ``source.draw(seed)`` gives, and it as ``uint8 [side, side, 3]`` after what pictures go through.

    Sizes, JPEG qualities, scaled decoding and the method of resizing all vary, so that none of them matters later.
    """
    rng = np.random.default_rng([seed, 1])
    width, height = SIZES[rng.integers(len(SIZES))]
    divisor = rng.choice([1, 2, 3], p=[0.1, 0.6, 0.3])  # small ones are drawn several times as fast
    drawn = source.draw(seed, (max(side, width // divisor), max(side, height // divisor)))
    image = drawn.image
    if rng.random() < 0.8:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=int(rng.integers(35, 96)), subsampling=int(rng.integers(3)))
        image = Image.open(data)
        if rng.random() < 0.5:
            image.draft("RGB", (side, side))
    image = image.convert("RGB").resize((side, side), RESAMPLING[rng.integers(len(RESAMPLING))])
    return np.asarray(image), drawn


def dataset(source: ModuleType, sample: Sample, side: int, first: int, count: int) -> dict[str, Tensor]:
    """``sample(seed)`` for ``count`` seeds from ``first`` on, stacked by key; from a cache where it was made before.

    ``sample`` draws by ``source`` at ``side``: what is kept is used again only if all of these are as they were.
    """
    code = inspect.getsource(source) + inspect.getsource(arrived) + inspect.getsource(sample)
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    cache = Path(tempfile.gettempdir()) / "cvworker-train" / f"{sample.__name__}-{side}-{first}-{count}-{digest}.npz"
    if not cache.exists():
        begun = time.monotonic()
        with ProcessPoolExecutor() as pool:
            samples = list(pool.map(sample, range(first, first + count), chunksize=50))
        cache.parent.mkdir(exist_ok=True)
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, **{key: np.stack([each[key] for each in samples]) for key in samples[0]})
        partial.rename(cache)
        print(f"drew {count} pictures from seed {first} in {time.monotonic() - begun:.0f} s", flush=True)
    with np.load(cache) as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}
