"""How much two answers differ, and how much they may: what a network gives, and the results made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cvworker.embedded.subjects import overlap
from cvworker.model.precision import difference

TOP = 5
"""Classes that the second agreement looks at."""
TIE = 1e-3
"""Of the outputs' root mean square: classes closer than that are a tie, and either may come first."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What one precision may change."""

    relative: float
    """The largest error of an output, in parts of its value or, where that is smaller, of the outputs' root mean
    square: next to zero every error is large beside the value."""
    rms: float
    """The root mean square of all errors, in parts of that of the outputs."""
    top1: float
    """The least share of pictures with the same first class."""
    answers: float
    """The least share of pictures whose results agree: the same labels, numbers within 0.01 + 2 %."""
    objects: float
    """The least share of objects that are found again: same label, the overlap and a score that differs no more than
    here. Those within ``score`` of the threshold may come and go."""
    overlap: float
    score: float


TOLERANCES = {
    "fp32": Tolerance(relative=1e-3, rms=1e-4, top1=1.0, answers=1.0, objects=1.0, overlap=0.98, score=1e-3),
    "tf32": Tolerance(relative=2e-2, rms=3e-3, top1=1.0, answers=0.98, objects=0.98, overlap=0.95, score=1e-2),
    "fp16": Tolerance(relative=3e-2, rms=5e-3, top1=0.98, answers=0.97, objects=0.98, overlap=0.95, score=2e-2),
    "bf16": Tolerance(relative=2e-1, rms=4e-2, top1=0.95, answers=0.85, objects=0.95, overlap=0.85, score=5e-2),
    "int8": Tolerance(relative=1.0, rms=0.15, top1=0.9, answers=0.6, objects=0.85, overlap=0.75, score=0.15),
}
"""By precision; ``docs/export.md`` repeats it. Float ones are several times what the arithmetic itself costs a deep
network; a wrong weight or normalisation costs far more."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One picture's: what the network gave (a tensor for each output, without the batch), and the result."""

    outputs: tuple[Tensor, ...]
    result: Any


@dataclass(slots=True)
class Differences:
    """Of a group of pictures. A number that does not apply is None; ``problems`` are what is wrong, in words."""

    group: str
    pictures: int
    batch: int
    max_abs: float | None = None
    max_rel: float | None = None
    rms: float | None = None
    top1: float | None = None
    top5: float | None = None
    objects: float | None = None
    overlap: float | None = None
    answers: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def compare(
    group: str, batch: int, expected: Sequence[Answer], found: Sequence[Answer], tolerance: Tolerance, threshold: float
) -> Differences:
    """What ``found`` differs from ``expected``, picture by picture, and where that is more than ``tolerance``.

    ``threshold`` is the score from which a detector reports objects.
    """
    report = Differences(group, len(found), batch)
    objects = [_objects(each.result) for each in expected]
    if all(each is not None for each in objects):
        _match(report, expected, found, tolerance, threshold)
    else:
        _numbers(report, expected, found, tolerance)
        agree = [difference(one.result, other.result) for one, other in zip(expected, found, strict=True)]
        report.answers = agree.count(None) / len(agree)
        if _too_few(report.answers, tolerance.answers, len(agree)):
            first = next(each for each in agree if each is not None)
            report.problems.append(f"answers of {agree.count(None)} of {len(agree)} pictures agree ({first})")
    return report


def _numbers(report: Differences, expected: Sequence[Answer], found: Sequence[Answer], tolerance: Tolerance) -> None:
    columns = []
    for one, other in zip(expected, found, strict=True):
        shapes = [[list(each.shape) for each in answer.outputs] for answer in (one, other)]
        if shapes[0] != shapes[1]:
            report.problems.append(f"outputs have the shape {shapes[1]}, not {shapes[0]}")
            return
        columns.append(list(zip(one.outputs, other.outputs, strict=True)))
    errors: list[tuple[float, float, float]] = []
    for pairs in zip(*columns, strict=True):
        truth, mine = (torch.stack([each.double() for each in side]) for side in zip(*pairs, strict=True))
        if not truth.isfinite().all() or not mine.isfinite().all():
            which = "the reference" if not truth.isfinite().all() else "it"
            report.problems.append(f"{which} gives numbers that are not finite (NaN or infinity)")
            return
        errors.append(_errors(truth, mine))
        if truth.dim() == 2 and truth.shape[1] > 1 and report.top1 is None:
            report.top1, report.top5 = _agreement(truth, mine)
    if errors:
        report.max_abs, report.max_rel, report.rms = (max(each) for each in zip(*errors, strict=True))
        for value, limit, what in (
            (report.max_rel, tolerance.relative, "largest relative error"),
            (report.rms, tolerance.rms, "root mean square error"),
        ):
            if value > limit:
                report.problems.append(f"{what} {value:.2g}, at most {limit:g}")
    if report.top1 is not None and _too_few(report.top1, tolerance.top1, len(found)):
        report.problems.append(f"first class agrees for {report.top1:.1%} of pictures, at least {tolerance.top1:.0%}")


def _too_few(share: float, least: float, count: int) -> bool:
    """Whether more than ``1 - least`` of ``count`` differ; of a few, one may, unless none may at all."""
    allowed = 0.0 if least == 1 else max(1.0, (1 - least) * count)
    return (1 - share) * count > allowed + 1e-6


def _errors(truth: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Largest absolute error, largest relative one, and their root mean square in parts of the values'."""
    error = (other - truth).abs()
    size = float(truth.square().mean().sqrt())
    if not error.numel() or not float(error.max()):
        return 0.0, 0.0, 0.0
    relative = error / truth.abs().clamp(min=size or math.inf)
    rms = float(error.square().mean().sqrt()) / size if size else math.inf
    return float(error.max()), float(relative.max()) if size else math.inf, rms


def _agreement(truth: Tensor, other: Tensor) -> tuple[float, float]:
    """The share of rows with the same largest value, and how many of the largest five they share."""
    tie = TIE * truth.square().mean().sqrt()
    chosen = truth.gather(1, other.argmax(1, keepdim=True))[:, 0]
    same = (truth.max(1).values - chosen <= tie).double().mean()
    count = min(TOP, truth.shape[1])
    pairs = zip(truth.topk(count, 1).indices.tolist(), other.topk(count, 1).indices.tolist(), strict=True)
    shared = [len(set(one) & set(two)) / count for one, two in pairs]
    return float(same), sum(shared) / len(shared)


def _match(
    report: Differences, expected: Sequence[Answer], found: Sequence[Answer], tolerance: Tolerance, threshold: float
) -> None:
    """Objects of both, paired by label and overlap, each with the best that is left."""
    pairs: list[tuple[float, float]] = []
    missing = sure = 0
    for one, other in zip(expected, found, strict=True):
        truth, left = _objects(one.result) or [], _objects(other.result)
        if left is None:
            report.problems.append("results have no objects with label, score and box")
            return
        if not all(math.isfinite(value) for each in left for value in (each["score"], *each["box"])):
            report.problems.append("it gives numbers that are not finite (NaN or infinity)")
            return
        left = list(left)
        for each in truth:
            same = [(overlap(each["box"], o["box"]), o) for o in left if o["label"] == each["label"]]
            share, best = max(same, key=lambda pair: pair[0], default=(0.0, None))
            certain = each["score"] >= threshold + tolerance.score
            sure += certain
            if best is None or share < tolerance.overlap or abs(best["score"] - each["score"]) > tolerance.score:
                missing += certain
            if best is not None and share >= tolerance.overlap / 2:
                left.remove(best)
                pairs.append((share, abs(best["score"] - each["score"])))
        extra = sum(each["score"] >= threshold + tolerance.score for each in left)
        sure, missing = sure + extra, missing + extra
    report.objects = 1 - missing / sure if sure else None
    report.overlap = min((share for share, _ in pairs), default=None)
    report.max_abs = max((score for _, score in pairs), default=None)
    if report.objects is not None and _too_few(report.objects, tolerance.objects, sure):
        report.problems.append(
            f"{sure - missing} of {sure} objects agree (overlap {tolerance.overlap:g}, score within "
            f"{tolerance.score:g}), at least {tolerance.objects:.0%}"
        )


def _objects(result: Any) -> list[Mapping[str, Any]] | None:
    """The objects of a detector's result, or None where it is another kind of result."""
    objects = result.get("objects") if isinstance(result, Mapping) else None
    if not isinstance(objects, list):
        return None
    whole = all(isinstance(each, Mapping) and {"label", "score", "box"} <= each.keys() for each in objects)
    return objects if whole else None
