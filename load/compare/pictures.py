"""The pictures: photo-like JPEGs of 0.7 megapixels and about 130 kB, the same on every machine by their seed.

Decoding costs by pixels and by coded bytes, so both are those of an ordinary photograph scaled for the web: soft
gradients, shapes with edges, and a grain that differs from picture to picture.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import simplejpeg

COUNT = 64
WIDTH, HEIGHT = 1024, 683
SEED = 20
QUALITY = 85
SHAPES = 40
GRAIN = (1.0, 8.2)
"""Standard deviation in levels, from the smoothest picture to the roughest; with it they average 130 kB."""
_VERSION = 1


def pictures(count: int = COUNT) -> list[bytes]:
    """The JPEGs, drawn once and kept in the temporary folder."""
    folder = Path(tempfile.gettempdir()) / f"cvworker-compare-pictures-{_VERSION}-{SEED}"
    folder.mkdir(exist_ok=True)
    found = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        if not path.exists():
            draft = path.with_suffix(".part")  # another run may be reading
            draft.write_bytes(draw(number))
            draft.replace(path)
        found.append(path.read_bytes())
    return found


def draw(number: int) -> bytes:
    """One picture."""
    random = np.random.default_rng((SEED, number))
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    image = np.empty((HEIGHT, WIDTH, 3), np.float32)
    for channel in range(3):
        across, down = random.uniform(80, 300, 2)
        phases = random.uniform(0, 6, 2)
        image[..., channel] = 128 + 60 * np.sin(x / across + phases[0]) + 50 * np.cos(y / down + phases[1])
    for _ in range(SHAPES):
        left, top, radius = random.uniform(0, WIDTH), random.uniform(0, HEIGHT), random.uniform(10, 120)
        flat = random.uniform(0.5, 2)
        inside = (x - left) ** 2 + flat * (y - top) ** 2 < radius**2
        image[inside] = 0.3 * image[inside] + 0.7 * random.uniform(0, 255, 3).astype(np.float32)
    grain = GRAIN[0] + (GRAIN[1] - GRAIN[0]) * (number % COUNT) / (COUNT - 1)
    image += random.normal(0, grain, (HEIGHT, WIDTH, 1)).astype(np.float32)
    image += random.normal(0, grain / 3, (HEIGHT, WIDTH, 3)).astype(np.float32)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420"))
