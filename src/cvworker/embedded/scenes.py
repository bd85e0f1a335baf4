"""Scenes of known kind, drawn from a seed as :mod:`cvworker.embedded.pictures` draws objects.

Kinds are told apart by what lies where, not by a colour of their own: beach, desert and sea share sand, water and sky,
a city may stand under stars, and any of them may be seen at dusk, in haze or turned a little.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from cvworker.embedded.pictures import SIZES, Color, Picture, color_near, shade

LINE_POINTS = 48


def draw(seed: int, size: tuple[int, int] | None = None) -> Picture:
    """Draw the scene of this seed, ``size`` (width, height) pixels large, or as large as the seed says."""
    rng = np.random.default_rng([seed, 2])
    width, height = size or SIZES[rng.integers(len(SIZES))]
    label = SCENES[rng.integers(len(SCENES))]
    canvas = _Canvas(rng, width, height)
    _PAINTERS[label](canvas, rng)
    return Picture(_seen(canvas.image, rng), frozenset({label}), ())


def _seen(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The scene as a camera saw it: turned, tinted, brighter or darker, with grain."""
    angle = rng.uniform(-4, 4)
    zoom = 1.0 + abs(math.sin(math.radians(angle))) * max(image.width / image.height, image.height / image.width)
    image = image.rotate(angle, Image.Resampling.BILINEAR)
    crop = [side * (1 - 1 / zoom) / 2 for side in image.size]
    box = (crop[0], crop[1], image.width - crop[0], image.height - crop[1])
    image = image.resize(image.size, Image.Resampling.BILINEAR, box)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.004) * min(image.size)))
    pixels = np.asarray(image, dtype=np.float32) * rng.uniform(0.8, 1.15, 3).astype(np.float32)
    pixels += np.float32(rng.uniform(1, 9)) * rng.standard_normal((image.height, image.width, 1), dtype=np.float32)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.35, 1.2))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.1))
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.65, 1.15))


class _Canvas:
    """Draws in parts of the picture's width and height, from the upper left corner."""

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self._rng = rng
        self.size = np.array([width, height], dtype=float)
        self.image = Image.new("RGB", (width, height))

    def texture(self, top: float, bottom: float, first: Color, second: Color, cells: tuple[int, int]) -> None:
        """A band of full width, from one colour above to the other below, with ``cells`` patches across and down."""
        width, height = self.image.width, max(2, int((bottom - top) * self.image.height) + 1)
        rough = Image.fromarray(self._rng.random((cells[1], cells[0]), dtype=np.float32))
        mix = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)) * 0.7 - 0.35
        mix = np.clip(mix + np.linspace(0, 1, height, dtype=np.float32)[:, None], 0, 1)[..., None]
        pixels = np.asarray(first) * (1 - mix) + np.asarray(second) * mix
        self.image.paste(Image.fromarray(pixels.astype(np.uint8)), (0, int(top * self.image.height)))

    def area(self, points: list[tuple[float, float]], fill: Color) -> None:
        ImageDraw.Draw(self.image).polygon([(x, y) for x, y in (np.array(points) * self.size).tolist()], fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Color) -> None:
        self.area([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def disc(self, x: float, y: float, radius: float, fill: Color) -> None:
        """A circle whose radius is in parts of the picture's smaller side."""
        (x, y), r = np.array([x, y]) * self.size, radius * self.size.min()
        ImageDraw.Draw(self.image).ellipse((x - r, y - r, x + r, y + r), fill)

    def ridge(self, base: float, height: float, fill: Color, *, peaks: float, sharp: bool = False) -> np.ndarray:
        """All below a line of hills around ``base``; the line is returned, as points ``[n, 2]``."""
        x = np.linspace(0, 1, LINE_POINTS)
        phase, share = self._rng.uniform(0, math.tau, 4), self._rng.uniform(0.4, 1, 4) / [1, 2, 4, 8]
        turns = x[:, None] * peaks * [1, 2.1, 4.3, 8.9] + phase
        waves = 1 - 2 * np.abs(np.sin(turns / 2)) if sharp else np.sin(turns)
        y = base + height * (waves[:, : 4 if sharp else 2] @ share[: 4 if sharp else 2]) / share.sum()
        line = np.stack([x, y], 1)
        self.area([*map(tuple, line.tolist()), (1, 1), (0, 1)], fill)
        return line

    def sky(self, bottom: float, *, night: bool = False) -> None:
        """Day, dusk or night down to ``bottom``, with clouds, a sun or stars."""
        rng = self._rng
        if night:
            top = color_near(rng, rng.uniform(0.58, 0.75), 0.6, rng.uniform(0.08, 0.2))
            self.texture(0, bottom, top, shade(top, rng.uniform(1.0, 1.7)), (3, 3))
            self.stars(bottom)
            return
        dusk = rng.random() < 0.3
        top = color_near(rng, rng.choice([0.6, 0.72]) if dusk else 0.57, rng.uniform(0.15, 0.7), rng.uniform(0.5, 0.95))
        low = color_near(rng, rng.uniform(0.0, 0.12), 0.5, 0.9) if dusk else shade(top, rng.uniform(1.3, 2.6))
        self.texture(0, bottom, top, low, (int(rng.integers(2, 9)), int(rng.integers(2, 6))))
        if rng.random() < 0.4:
            self.disc(rng.uniform(0.1, 0.9), bottom * rng.uniform(0.15, 0.9), rng.uniform(0.03, 0.09), (255, 240, 200))

    def stars(self, bottom: float) -> None:
        rng = self._rng
        for _ in range(rng.integers(50, 160)):
            level = int(rng.integers(120, 255))
            self.disc(rng.random(), rng.random() * bottom, rng.uniform(0.002, 0.006), (level, level, level))

    def waves(self, top: float, bottom: float, water: Color) -> None:
        """Water, with crests that grow towards the viewer."""
        rng = self._rng
        self.texture(top, bottom, shade(water, 0.8), shade(water, 1.25), (3, 12))
        for depth in np.sort(rng.random(int(rng.integers(25, 70)))) ** 1.5:
            x, y = rng.uniform(-0.1, 1), top + (bottom - top) * depth
            length, thick = rng.uniform(0.05, 0.3) * (0.3 + depth), 0.002 + 0.012 * depth * rng.random()
            crest = shade(water, rng.choice([0.7, 1.5, 2.2]))
            self.area([(x, y), (x + length / 2, y - thick), (x + length, y), (x + length / 2, y + thick / 2)], crest)


def _beach(canvas: _Canvas, rng: np.random.Generator) -> None:
    horizon, shore = rng.uniform(0.2, 0.5), rng.uniform(0.55, 0.8)
    canvas.sky(horizon)
    canvas.waves(horizon, 1, color_near(rng, rng.uniform(0.48, 0.6), 0.6, rng.uniform(0.5, 0.85)))
    sand, slope = color_near(rng, 0.11, rng.uniform(0.2, 0.45), rng.uniform(0.7, 0.95)), rng.uniform(-0.18, 0.18)
    curve = [(x, shore + slope * (2 * x - 1) + 0.03 * math.sin(7 * x + 9 * slope)) for x in np.linspace(0, 1, 20)]
    canvas.area([(x, y - 0.025) for x, y in curve] + [(1, 1), (0, 1)], (245, 248, 250))  # foam
    canvas.area([*curve, (1, 1), (0, 1)], shade(sand, 0.8))
    canvas.area([(x, y + 0.04) for x, y in curve] + [(1, 1), (0, 1)], sand)
    for _ in range(rng.integers(0, 4)):  # parasols
        x, y, side = rng.uniform(0.05, 0.95), rng.uniform(shore + 0.05, 0.95), rng.uniform(0.04, 0.1)
        canvas.box(x - 0.004, y - 1.6 * side, x + 0.004, y, (120, 90, 60))
        canvas.area(
            [(x - side, y - 1.4 * side), (x, y - 2.3 * side), (x + side, y - 1.4 * side)], color_near(rng, None)
        )


def _sea(canvas: _Canvas, rng: np.random.Generator) -> None:
    horizon = rng.uniform(0.2, 0.65)
    canvas.sky(horizon)
    canvas.waves(horizon, 1, color_near(rng, rng.uniform(0.48, 0.63), 0.6, rng.uniform(0.3, 0.8)))
    for _ in range(rng.integers(0, 3)):  # sails
        x, y, side = rng.uniform(0.1, 0.9), horizon + rng.uniform(0.0, 0.12), rng.uniform(0.03, 0.09)
        canvas.area([(x, y - 2 * side), (x + side, y - 0.2 * side), (x, y - 0.2 * side)], (240, 240, 238))
        canvas.area(
            [(x - side, y - 0.1 * side), (x + side, y - 0.1 * side), (x, y + 0.3 * side)], color_near(rng, None)
        )


def _city(canvas: _Canvas, rng: np.random.Generator) -> None:
    ground, night = rng.uniform(0.75, 1.0), rng.random() < 0.35
    canvas.sky(1, night=night)
    for row in range(int(rng.integers(1, 4))):
        x = rng.uniform(-0.1, 0)
        while x < 1:
            wide, top = rng.uniform(0.08, 0.24), ground - rng.uniform(0.2, 0.75) / (1 + 0.25 * row)
            wall = color_near(
                rng, None, rng.uniform(0.05, 0.4), rng.uniform(0.08, 0.3) if night else rng.uniform(0.3, 0.85)
            )
            canvas.box(x, top, x + wide, 1, wall)
            lit = (250, 220, 140) if night else shade(wall, rng.choice([0.5, 1.8]))
            across, down = int(rng.integers(2, 6)), int(rng.integers(4, 13))
            for i in range(across * down):
                left, above = x + wide * (i % across + 0.25) / across, top + (ground - top) * (i // across + 0.3) / down
                if not night or rng.random() < 0.5:
                    canvas.box(left, above, left + 0.5 * wide / across, above + 0.45 * (ground - top) / down, lit)
            x += wide * rng.uniform(0.9, 1.3)
    canvas.texture(ground, 1, shade((90, 90, 95), rng.uniform(0.4, 1)), (70, 70, 74), (5, 3))
    for left in np.arange(0, 1, 0.16) if rng.random() < 0.6 else ():
        canvas.box(left, (1 + ground) / 2, left + 0.08, (1 + ground) / 2 + 0.01, (230, 225, 200))


def _desert(canvas: _Canvas, rng: np.random.Generator) -> None:
    horizon = rng.uniform(0.25, 0.6)
    canvas.sky(1)
    sand = color_near(rng, rng.uniform(0.05, 0.12), rng.uniform(0.3, 0.6), rng.uniform(0.6, 0.9))
    for depth in np.linspace(0, 1, int(rng.integers(3, 6))):
        dune = shade(sand, rng.uniform(0.7, 1.3))
        line = canvas.ridge(horizon + 0.45 * depth, 0.05 + 0.07 * depth, dune, peaks=rng.uniform(2, 7))
        dark = [*line[::2].tolist(), *[[x, y + 0.06 * (1 + math.sin(9 * x))] for x, y in line[::-2].tolist()]]
        canvas.area([(x, y) for x, y in dark], shade(dune, 0.82))  # the side away from the sun
    for _ in range(rng.integers(0, 4)):  # cacti
        x, y, side = rng.uniform(0.05, 0.95), rng.uniform(horizon + 0.1, 0.95), rng.uniform(0.02, 0.06)
        green = color_near(rng, 0.33, 0.5, 0.4)
        canvas.box(x - side / 4, y - 4 * side, x + side / 4, y, green)
        canvas.box(x - side, y - 2.2 * side, x + side, y - 1.8 * side, green)
        canvas.box(x + 0.7 * side, y - 3.2 * side, x + side, y - 1.8 * side, green)


def _forest(canvas: _Canvas, rng: np.random.Generator) -> None:
    green, ground = color_near(rng, rng.uniform(0.22, 0.4), 0.55, rng.uniform(0.25, 0.6)), rng.uniform(0.6, 0.9)
    canvas.sky(0.5)
    canvas.texture(rng.uniform(0, 0.2), 1, shade(green, 1.3), shade(green, 0.5), (30, 24))
    canvas.texture(ground, 1, color_near(rng, 0.12, 0.5, 0.35), shade(green, 0.6), (12, 4))
    conifers = rng.random() < 0.5
    for depth in np.sort(rng.random(int(rng.integers(10, 26)))):
        x, foot, wide = rng.random(), ground + 0.2 * (depth - 0.4), 0.008 + 0.03 * depth
        leaf = shade(green, rng.uniform(0.5, 1.5))
        top = foot - rng.uniform(0.5, 0.9)
        canvas.box(x - wide / 2, top + 0.1, x + wide / 2, foot, color_near(rng, 0.07, 0.45, rng.uniform(0.15, 0.5)))
        for step in range(5):
            y = top + (foot - top) * 0.16 * step
            if conifers:
                reach = wide * (1.5 + step)
                canvas.area([(x - reach, y + 0.16), (x, y), (x + reach, y + 0.16)], shade(leaf, 1 - 0.06 * step))
            else:
                canvas.disc(
                    x + rng.uniform(-2, 2) * wide, y * 0.7, rng.uniform(0.04, 0.1), shade(leaf, rng.uniform(0.8, 1.3))
                )


def _mountains(canvas: _Canvas, rng: np.random.Generator) -> None:
    canvas.sky(1)
    rock, snow = (
        color_near(rng, rng.choice([0.08, 0.6]), rng.uniform(0.1, 0.35), rng.uniform(0.3, 0.6)),
        rng.random() < 0.6,
    )
    base = rng.uniform(0.4, 0.6)
    for depth in (1.7, 1.3, 1.0)[int(rng.integers(0, 2)) :]:
        line = canvas.ridge(base, 0.4 / depth, shade(rock, depth), peaks=rng.uniform(5, 9), sharp=True)
        if snow:
            top = line[:, 1].min()
            caps = [(x, min(y + 0.1 * (1.3 - y + top), max(y, base - 0.1))) for x, y in line.tolist()]
            canvas.area([(x, y) for x, y in line.tolist()] + caps[::-1], (238, 241, 246))
        base += 0.12
    meadow = color_near(rng, rng.uniform(0.12, 0.36), 0.45, rng.uniform(0.3, 0.6))
    if rng.random() < 0.4:
        canvas.waves(rng.uniform(0.75, 0.88), 1, color_near(rng, 0.57, 0.4, 0.6))
    else:
        canvas.ridge(rng.uniform(0.75, 0.9), 0.06, meadow, peaks=3)


def _night_sky(canvas: _Canvas, rng: np.random.Generator) -> None:
    canvas.sky(1, night=True)
    canvas.stars(1)
    if rng.random() < 0.5:
        x, y, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.6), rng.uniform(0.03, 0.1)
        canvas.disc(x, y, radius, (235, 232, 215))
        if rng.random() < 0.5:  # a crescent
            canvas.disc(x + rng.uniform(-0.5, 0.5) * radius, y - radius / 4, radius, (22, 24, 48))
    if rng.random() < 0.7:
        canvas.ridge(rng.uniform(0.8, 0.98), 0.06, (8, 9, 14), peaks=rng.uniform(3, 12), sharp=rng.random() < 0.5)


def _room(canvas: _Canvas, rng: np.random.Generator) -> None:
    wall, floor = color_near(rng, None, rng.uniform(0.05, 0.45), rng.uniform(0.5, 0.9)), rng.uniform(0.6, 0.8)
    canvas.texture(0, 1, wall, shade(wall, 0.85), (2, 2))
    wood = color_near(rng, 0.08, rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.7))
    canvas.texture(floor, 1, shade(wood, 0.8), wood, (30, 3))
    canvas.box(0, floor - 0.02, 1, floor, shade(wall, 1.6))
    left, top, wide, high = (
        rng.uniform(0.05, 0.6),
        rng.uniform(0.06, 0.2),
        rng.uniform(0.18, 0.32),
        rng.uniform(0.22, 0.36),
    )
    canvas.box(left, top, left + wide, top + high, (240, 240, 236))  # a window, or a picture
    pane = color_near(rng, rng.choice([0.57, 0.3, 0.08]), 0.4, 0.85)
    for i in range(4):
        x, y = left + wide * (0.05 + 0.48 * (i % 2)), top + high * (0.05 + 0.48 * (i // 2))
        canvas.box(x, y, x + 0.42 * wide, y + 0.42 * high, pane)
    x, seat, cloth = (
        rng.uniform(0.05, 0.5),
        floor + rng.uniform(-0.05, 0.08),
        color_near(rng, None, 0.5, rng.uniform(0.3, 0.8)),
    )
    length = rng.uniform(0.3, 0.48)
    canvas.box(x, seat - 0.2, x + length, seat + 0.02, shade(cloth, 0.8))  # a sofa
    canvas.box(x - 0.03, seat - 0.04, x + length + 0.03, seat + 0.1, cloth)
    for at in (x, x + length - 0.02):
        canvas.box(at, seat + 0.1, at + 0.02, seat + 0.14, (50, 40, 35))
    if rng.random() < 0.7:  # a lamp
        x = rng.uniform(0.05, 0.95)
        canvas.box(x - 0.005, 0.4, x + 0.005, floor + 0.1, (60, 55, 50))
        canvas.area([(x - 0.07, 0.42), (x - 0.04, 0.27), (x + 0.04, 0.27), (x + 0.07, 0.42)], (250, 235, 190))


_PAINTERS = {
    "beach": _beach, "city": _city, "desert": _desert, "forest": _forest,
    "mountains": _mountains, "night sky": _night_sky, "room": _room, "sea": _sea,
}  # fmt: skip
SCENES = tuple(_PAINTERS)
