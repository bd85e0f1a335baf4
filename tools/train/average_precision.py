"""Mean average precision of a detector: what share of the objects it finds, and how far its scores can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cvworker.embedded.subjects import overlap

IOU = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """One detection or, with any score, one object that is there; ``box`` is left, top, right, bottom."""

    label: str
    box: Sequence[float]
    score: float = 1.0


def mean_average_precision(
    pictures: Sequence[tuple[Sequence[Found], Sequence[Found]]], iou: float = IOU
) -> dict[str, float]:
    """The average precision of each label that is there, and under ``mean`` their mean.

    Args:
        pictures: for each picture what was detected, and what is there.
        iou: how much of their union a detection and its object must share.

    As PASCAL VOC defines it since 2010: detections of a label are taken from the highest score down; each that overlaps
    an object of its picture not yet found is right, any other is wrong; the result is the area under precision over
    recall, where precision is the best at that recall or a higher one.
    """
    labels = sorted({each.label for _, there in pictures for each in there})
    values = {label: _average_precision(label, pictures, iou) for label in labels}
    return values | {"mean": float(np.mean(list(values.values()))) if values else 0.0}


def _average_precision(label: str, pictures: Sequence[tuple[Sequence[Found], Sequence[Found]]], iou: float) -> float:
    found = [(n, each) for n, (detected, _) in enumerate(pictures) for each in detected if each.label == label]
    there = [[each.box for each in objects if each.label == label] for _, objects in pictures]
    left = [list(range(len(boxes))) for boxes in there]
    right = []
    for n, each in sorted(found, key=lambda pair: -pair[1].score):
        best = max(left[n], key=lambda i: overlap(each.box, there[n][i]), default=None)
        hit = best is not None and overlap(each.box, there[n][best]) >= iou
        right.append(hit)
        if hit:
            left[n].remove(best)
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    best_onwards = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best_onwards[np.array(right, dtype=bool)].sum() / sum(map(len, there)))
