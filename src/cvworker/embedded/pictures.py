"""Pictures of known content, drawn from a seed: the demo serves them, and its weights are trained on them.

Each shows up to three objects, some of them threats, the others harmless look-alikes (a hair dryer for a gun, a
bowling ball for a bomb). The same seed gives the same picture wherever numpy and Pillow are the same.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]]
Box = tuple[int, int, int, int]

THREATS = ("bomb", "fire", "gun", "knife")
HARMLESS = ("ball", "flower", "hair dryer", "spoon")

SIZES = [(320, 240), (400, 400), (480, 640), (512, 512), (640, 426), (640, 480), (800, 600), (768, 1024), (1024, 768)]
_COUNTS = [0.08, 0.36, 0.34, 0.22]  # how often a picture holds 0, 1, 2, 3 objects
_THREAT_SHARE = 0.4  # of the objects; about half of the pictures then hold a threat
_SIDE = {1: (0.45, 0.8), 2: (0.42, 0.62), 3: (0.4, 0.54)}  # an object's side in parts of the picture's smaller one


@dataclass(frozen=True)
class Object:
    """One drawn object; ``box`` is left, top, right, bottom in pixels, right and bottom just outside it."""

    label: str
    box: Box


@dataclass(frozen=True, eq=False)
class Picture:
    """An RGB image and what it shows: its labels (here the threats; a scene's kind), and every object with its box."""

    image: Image.Image
    labels: frozenset[str]
    objects: tuple[Object, ...]


def draw(seed: int, size: tuple[int, int] | None = None) -> Picture:
    """Draw the picture of this seed, ``size`` (width, height) pixels large, or as large as the seed says."""
    rng = np.random.default_rng(seed)
    width, height = size or SIZES[rng.integers(len(SIZES))]
    image = _background(rng, width, height)
    objects: list[Object] = []
    count = int(rng.choice(4, p=_COUNTS))
    for _ in range(count):
        label = str(rng.choice(THREATS if rng.random() < _THREAT_SHARE else HARMLESS))
        layer = _layer(rng, label, min(width, height) * rng.uniform(*_SIDE[count]))
        layer.thumbnail((int(width * 0.94), int(height * 0.94)))
        if box := _place(rng, layer.size, image.size, [other.box for other in objects]):
            _paste(image, layer, box)
            objects.append(Object(label, box))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.75, 1.15))
    return Picture(image, frozenset(THREATS) & {item.label for item in objects}, tuple(objects))


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A ground of one of six patterns in two colours, with a few faint shapes on it and some grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / min(width, height)
    kind, angle, step, cells = rng.integers(6), rng.uniform(0, math.pi), rng.uniform(0.06, 0.25), rng.integers(3, 24)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == 0:  # stripes, hard or soft
        mix = 0.5 + np.clip(np.sin(u * math.pi / step) * rng.choice([0.5, 4]), -0.5, 0.5)
    elif kind == 1:  # tiles
        mix = (np.floor(u / step) + np.floor(v / step)) % 2
    elif kind == 2:  # dots
        mix = np.clip((np.hypot(u % step / step - 0.5, v % step / step - 0.5) - 0.3) * 60 * step, 0, 1)
    elif kind in (3, 4):  # wood, whose grain is far longer than wide, or clouds, coarse or fine
        rough = Image.fromarray(rng.random((cells * 4, 4) if kind == 3 else (cells, cells), dtype=np.float32))
        mix = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC))
    else:  # an even slope of light
        mix = (u - u.min()) / (u.max() - u.min())
    first = color_near(rng, None, rng.uniform(0.05, 0.7), rng.uniform(0.2, 0.95))
    second = shade(first, rng.uniform(0.6, 2.0)) if rng.random() < 0.7 else color_near(rng, None, 0.4)
    pixels = np.add(first, mix[..., None] * np.subtract(second, first), dtype=np.float32)
    pixels += np.float32(rng.uniform(0.5, 7)) * rng.standard_normal((height, width, 1), dtype=np.float32)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    for _ in range(rng.integers(0, 5)):
        pen = _Pen(min(width, height) * rng.uniform(0.2, 0.7), np.diag(rng.uniform(0.3, 1, 2)))
        (pen.area if rng.random() < 0.5 else pen.smooth)(
            rng.uniform(0, 100, (3, 2)).tolist(), color_near(rng, None, 0.5)
        )
        shape = pen.image.reduce(2)
        at = int(rng.uniform(-0.2, 0.9) * width), int(rng.uniform(-0.2, 0.9) * height)
        image.paste(shape, at, shape.getchannel("A").point(lambda level: level * 2 // 5))
    return image


def _layer(rng: np.random.Generator, label: str, side: float) -> Image.Image:
    """The object alone, turned, stretched and mirrored, as an RGBA image without empty edges."""
    paint, turn = _PAINTERS[label]
    angle = math.radians(rng.uniform(-turn, turn))
    mirrored = np.diag([rng.choice([-1, 1]) * rng.uniform(0.9, 1.06), rng.uniform(0.9, 1.06)])
    pen = _Pen(side, mirrored @ [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    paint(pen, rng)
    layer = pen.image.crop(pen.image.getbbox()).reduce(2)
    light = Image.linear_gradient("L").resize(layer.size).point(lambda level: 190 - level * 130 // 255)  # a lamp above
    lit = ImageChops.soft_light(layer.convert("RGB"), Image.merge("RGB", (light, light, light)))
    lit.putalpha(layer.getchannel("A"))
    return lit


def _place(rng: np.random.Generator, size: tuple[int, int], room: tuple[int, int], taken: list[Box]) -> Box | None:
    """A box of this size inside the picture and beside the others, or None where no room was found."""
    for _ in range(40):
        left, top = (int(rng.integers(0, free - side + 1)) for free, side in zip(room, size, strict=True))
        box = left, top, left + size[0], top + size[1]
        if all(box[0] >= b[2] or b[0] >= box[2] or box[1] >= b[3] or b[1] >= box[3] for b in taken):
            return box
    return None


def _paste(image: Image.Image, layer: Image.Image, box: Box) -> None:
    """Paste with a soft shadow, light where the ground is dark: a black bomb at night still has an outline."""
    radius = max(2, max(layer.size) // 28)
    alpha = ImageOps.expand(layer.getchannel("A"), 3 * radius)
    halo = alpha.filter(ImageFilter.GaussianBlur(radius)).point(lambda level: level * 3 // 4)
    shadow = (10, 10, 16) if np.asarray(image.crop(box).convert("L")).mean() > 100 else (225, 228, 235)
    image.paste(shadow, (box[0] - 3 * radius, box[1] - 3 * radius), halo)
    image.paste(layer, box[:2], layer)


class _Pen:
    """Draws in percent of the object's side, turned by a matrix, at twice the size for smooth edges."""

    def __init__(self, side: float, matrix: np.ndarray) -> None:
        self._centre = 2 * int(side * 0.8 + 2)  # the turned square's half diagonal is 0.71 of its side
        self._unit = side / 50
        self._matrix = matrix * self._unit
        self.image = Image.new("RGBA", (2 * self._centre, 2 * self._centre))
        self._draw = ImageDraw.Draw(self.image)

    def _map(self, points: Points) -> list[tuple[float, float]]:
        mapped = (np.asarray(points, dtype=float) - 50) @ self._matrix + self._centre
        return [(x, y) for x, y in mapped.tolist()]

    def area(self, points: Points, fill: Color) -> None:
        self._draw.polygon(self._map(points), fill)

    def smooth(self, points: Points, fill: Color) -> None:
        """The area inside a closed curve through the points (a Catmull-Rom spline)."""
        p1 = np.asarray(points, dtype=float)[:, None]
        p0, p2, p3 = (np.roll(p1, shift, axis=0) for shift in (1, -1, -2))
        t = np.linspace(0, 1, 10, endpoint=False)[None, :, None]
        curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
        self.area(curve.reshape(-1, 2).tolist(), fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Color, turn: float = 0) -> None:
        """An ellipse around (x, y), turned by ``turn`` degrees."""
        a, b = np.linspace(0, math.tau, 48, endpoint=False), math.radians(turn)
        u, v = rx * np.cos(a), ry * np.sin(a)
        xs, ys = x + u * math.cos(b) - v * math.sin(b), y + u * math.sin(b) + v * math.cos(b)
        self.area(np.stack([xs, ys], axis=1).tolist(), fill)

    def line(self, points: Points, width: float, fill: Color) -> None:
        mapped, radius = self._map(points), width * self._unit / 2
        self._draw.line(mapped, fill, max(1, round(2 * radius)), joint="curve")
        for x, y in (mapped[0], mapped[-1]):
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)


def color_near(rng: np.random.Generator, hue: float | None, saturation: float = 0.75, value: float = 0.85) -> Color:
    """A colour near the given one; of any hue where ``hue`` is None."""
    h = rng.random() if hue is None else hue + rng.uniform(-0.03, 0.03)
    s, v = np.clip(np.array([saturation, value]) + rng.uniform(-0.12, 0.12, 2), 0, 1)
    red, green, blue = (int(part * 255) for part in colorsys.hsv_to_rgb(h % 1, float(s), float(v)))
    return red, green, blue


def shade(color: Color, factor: float) -> Color:
    """Darker below 1, lighter above."""
    red, green, blue = (round(255 - (255 - part * min(factor, 1)) / max(factor, 1)) for part in color)
    return red, green, blue


def _gun(pen: _Pen, rng: np.random.Generator) -> None:
    metal = color_near(rng, 0.6, 0.1, rng.choice([0.2, 0.35, 0.7]))
    grip = shade(metal, 0.6) if rng.random() < 0.5 else color_near(rng, 0.07, 0.6, 0.35)
    pen.line([(36, 46), (37, 60), (44, 64), (56, 62), (60, 46)], 4, shade(metal, 0.7))  # trigger guard
    pen.line([(47, 46), (48, 53), (45, 58)], 3.5, shade(metal, 1.3))
    pen.smooth([(10, 40), (40, 42), (36, 58), (31, 90), (20, 94), (5, 90), (9, 70), (13, 56)], grip)
    pen.area([(8, 38), (88, 38), (88, 46), (62, 49), (12, 48)], shade(metal, 0.75))
    pen.area([(5, 24), (8, 20), (86, 20), (89, 15), (93, 20), (96, 24), (96, 39), (5, 39)], metal)
    pen.area([(6, 23), (9, 15), (15, 20), (94, 20), (96, 24)], shade(metal, 1.5))
    for x in (*range(12, 30, 4), 50, 54, 58):
        pen.line([(x, 27), (x, 35)], 2, shade(metal, 0.55))


def _hair_dryer(pen: _Pen, rng: np.random.Generator) -> None:
    body = color_near(rng, None, rng.choice([0.12, 0.6]), rng.choice([0.35, 0.85]))
    pen.line([(28, 86), (24, 95), (12, 96), (6, 88)], 3, (40, 40, 44))  # the cable
    pen.smooth([(22, 50), (44, 50), (38, 72), (36, 90), (22, 90), (20, 70)], shade(body, 0.8))
    pen.smooth([(30, 12), (60, 20), (84, 22), (84, 50), (60, 54), (32, 62), (10, 54), (4, 37), (11, 19)], body)
    pen.area([(82, 23), (96, 17), (96, 56), (82, 50)], shade(body, 0.5))
    for radius, factor in ((15, 0.5), (11, 1.4), (6, 0.5)):
        pen.oval(25, 37, radius, radius, shade(body, factor))


def _knife(pen: _Pen, rng: np.random.Generator) -> None:
    steel, handle = color_near(rng, 0.6, 0.08, 0.8), color_near(rng, 0.07, 0.55, rng.choice([0.15, 0.45]))
    if rng.random() < 0.4:  # a dagger, else a kitchen knife
        pen.smooth([(34, 41), (70, 42), (84, 45), (99, 50), (84, 55), (70, 58), (34, 59)], steel)
        pen.area([(34, 50), (96, 50), (84, 55), (70, 58), (34, 59)], shade(steel, 0.75))
        pen.line([(34, 32), (34, 68)], 6, shade(steel, 0.5))
    else:
        pen.smooth([(34, 38), (60, 37), (80, 39), (92, 46), (99, 56), (80, 62), (56, 65), (34, 64)], steel)
        pen.smooth([(34, 57), (60, 58), (84, 55), (98, 56), (80, 62), (56, 65), (34, 64)], shade(steel, 1.8))
        pen.line([(34, 40), (34, 62)], 4, shade(steel, 0.6))
    pen.smooth([(2, 44), (16, 42), (33, 42), (33, 57), (16, 56), (3, 59)], handle)
    for x in (9, 18, 27):
        pen.oval(x, 50, 2, 2, shade(steel, 1.2))


def _spoon(pen: _Pen, rng: np.random.Generator) -> None:
    metal = color_near(rng, 0.6, 0.08, 0.75) if rng.random() < 0.7 else color_near(rng, 0.08, 0.55, 0.65)
    pen.smooth([(0, 50), (5, 42), (30, 46), (66, 45), (66, 55), (30, 54), (5, 58)], shade(metal, 0.85))
    for x, rx, ry, factor in ((79, 21, 16, 1.0), (80, 17, 12, 0.65), (84, 8, 5, 1.5)):
        pen.oval(x, 50 + (x - 79) * 0.7, rx, ry, shade(metal, factor))


def _bomb(pen: _Pen, rng: np.random.Generator) -> None:
    pen.line([(60, 34), (70, 18), (82, 20), (88, 12)], 3.5, (150, 120, 90))  # the fuse
    if rng.random() < 0.4:  # sticks of dynamite, else a round one
        paper = color_near(rng, 0.0, 0.85, 0.75)
        for x, factor in ((28, 0.8), (47, 1.15), (66, 0.95)):
            pen.line([(x, 38), (x, 86)], 18, shade(paper, factor))
            pen.oval(x, 34, 8, 4, shade(paper, 1.7))
        for y in (52, 78):
            pen.line([(22, y), (72, y)], 7, (45, 42, 40))
    else:
        iron = color_near(rng, 0.65, 0.1, 0.16)
        pen.area([(55, 28), (66, 17), (82, 33), (71, 44)], shade(iron, 1.25))
        for inset, factor in ((0, 0.8), (4, 1.0), (11, 1.12)):
            pen.oval(46 - inset / 2, 60 - inset / 2, 37 - inset, 37 - inset, shade(iron, factor))
        pen.oval(31, 43, 9, 5, shade(iron, 4), -45)
    rays = [(r * math.sin(i * math.pi / 6), r * math.cos(i * math.pi / 6)) for i, r in enumerate([12, 6] * 6)]
    pen.area([(88 + x, 12 + y) for x, y in rays], color_near(rng, 0.08, 0.9, 1.0))
    pen.oval(88, 12, 4, 4, (255, 250, 200))


def _ball(pen: _Pen, rng: np.random.Generator) -> None:
    kind = rng.integers(3)  # a basketball, a football, a bowling ball
    base = (color_near(rng, 0.06, 0.8), (238, 238, 240), color_near(rng, None, 0.6, rng.choice([0.2, 0.6])))[kind]
    ink = shade(base, 0.25)
    for radius, color in ((47, ink), (45.5, base)):
        pen.oval(50, 50, radius, radius, color)
    if kind == 0:
        arc = [(50 + 42 * math.sin(a), 96 - 34 * math.cos(a)) for a in np.linspace(-0.9, 0.9, 9)]
        for points in ([(6, 50), (94, 50)], [(50, 6), (50, 94)], arc, [(x, 100 - y) for x, y in arc]):
            pen.line(points, 2.5, ink)
    elif kind == 1:
        for x, y in [(math.sin(turn), -math.cos(turn)) for turn in np.arange(5) * math.tau / 5]:
            pen.line([(50, 50), (50 + 36 * x, 50 + 36 * y)], 2, ink)
            pen.oval(50 + 36 * x, 50 + 36 * y, 6, 11, ink, math.degrees(math.atan2(y, x)))
        pen.oval(50, 50, 13, 13, ink)
    else:
        for x, y in ((42, 26), (59, 25), (52, 40)):
            pen.oval(x, y, 5, 5, ink)
        pen.oval(27, 36, 9, 5, shade(base, 1.6), -45)


def _fire(pen: _Pen, rng: np.random.Generator) -> None:
    wood, lean = color_near(rng, 0.07, 0.6, 0.4), rng.uniform(-6, 6, 11)
    edge = [(16, 74), (20, 52), (12, 34), (30, 44), (38, 22), (50, 2), (58, 24), (68, 38), (82, 26), (82, 52), (84, 74)]
    for size, hue in ((1.0, 0.01), (0.74, 0.07), (0.46, 0.13)):  # one flame in another, from red to yellow
        flame = [(50 + (x - 50 + bent) * size, 90 + (y - 90) * size) for (x, y), bent in zip(edge, lean, strict=True)]
        pen.smooth(flame, color_near(rng, hue, 0.9, 0.97))
    for points in ([(14, 80), (86, 95)], [(14, 95), (86, 80)]):
        pen.line(points, 8, wood)
        pen.oval(*points[1], 3, 4, shade(wood, 1.8))


def _flower(pen: _Pen, rng: np.random.Generator) -> None:
    petal, leaf = color_near(rng, rng.choice([0.0, 0.08, 0.15, 0.8, 0.92]), 0.8, 0.95), color_near(rng, 0.33, 0.6, 0.5)
    pen.line([(50, 40), (52, 70), (49, 97)], 4, leaf)
    pen.smooth([(50, 92), (56, 76), (76, 66), (70, 84)], shade(leaf, 1.3))
    pen.smooth([(50, 94), (42, 80), (24, 72), (32, 88)], leaf)
    if rng.random() < 0.4:  # a tulip, which a hurried eye takes for a flame
        pen.smooth([(50, 8), (62, 24), (66, 52), (50, 62), (34, 52), (38, 24)], shade(petal, 0.75))
        pen.smooth([(28, 12), (44, 30), (52, 60), (36, 58), (27, 40)], petal)
        pen.smooth([(72, 12), (56, 30), (48, 60), (64, 58), (73, 40)], shade(petal, 1.2))
    else:
        count = int(rng.integers(5, 10))
        for turn in np.arange(count) * math.tau / count:
            x, y = 50 + 20 * math.sin(turn), 34 - 20 * math.cos(turn)
            pen.oval(x, y, 13, 52 / count, shade(petal, 1.0 + 0.2 * math.cos(turn)), math.degrees(turn) - 90)
        pen.oval(50, 34, 10, 10, color_near(rng, 0.12, 0.8))


_PAINTERS = {  # how to paint each object, and how far it is turned either way, in degrees
    "ball": (_ball, 180), "bomb": (_bomb, 40), "fire": (_fire, 15), "flower": (_flower, 50),
    "gun": (_gun, 70), "hair dryer": (_hair_dryer, 70), "knife": (_knife, 180), "spoon": (_spoon, 180),
}  # fmt: skip
