"""What the demo draws for each of cvworker's own modules, and how their results are told right from wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvworker.embedded import pictures, scenes
from cvworker.embedded.pictures import Object, Picture

OVERLAP = 0.5
"""What a found box and the object's own must share of their union, as detection is usually judged."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One kind of pictures.

    ``labels`` are all that a picture may be labelled with, and ``nothing`` the name for one without any.
    ``expected`` are a picture's labels and ``found`` a result's; ``fits`` judges a result where its labels are right.
    """

    draw: Callable[[int, tuple[int, int] | None], Picture]
    labels: tuple[str, ...]
    nothing: str
    expected: Callable[[Picture], tuple[str, ...]]
    found: Callable[[Mapping[str, Any]], frozenset[str]]
    fits: Callable[[Sequence[Object], Mapping[str, Any]], bool] = lambda objects, result: True


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """The area that two boxes (left, top, right, bottom) share, over that of both together."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def _boxes_fit(objects: Sequence[Object], result: Mapping[str, Any]) -> bool:
    """Whether each object was found once, where it is, and nothing else was."""
    left = list(objects)
    for found in result["objects"]:
        same = [each for each in left if each.label == found["label"] and overlap(each.box, found["box"]) >= OVERLAP]
        if not same:
            return False
        left.remove(max(same, key=lambda each: overlap(each.box, found["box"])))
    return not left


THREATS = Subject(
    draw=pictures.draw,
    labels=pictures.THREATS,
    nothing="safe",
    expected=lambda picture: tuple(sorted(picture.labels)),
    found=lambda result: frozenset(entry["label"] for entry in result["labels"]),
)
SUBJECTS = {
    "threat": THREATS,
    "scene": Subject(
        draw=scenes.draw,
        labels=scenes.SCENES,
        nothing="none",
        expected=lambda picture: tuple(picture.labels),
        found=lambda result: frozenset({result["label"]}),
    ),
    "detect": Subject(
        draw=pictures.draw,
        labels=tuple(sorted((*pictures.THREATS, *pictures.HARMLESS))),
        nothing="nothing",
        expected=lambda picture: tuple(sorted(item.label for item in picture.objects)),
        found=lambda result: frozenset(entry["label"] for entry in result["objects"]),
        fits=_boxes_fit,
    ),
}
