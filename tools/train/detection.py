"""The detector: SSDLite on the threat classifier's features, for the same objects and their harmless look-alikes.

What the classifier has learned to tell apart need only be found: that takes a fraction of what training from nothing
does. Its first layers stay as they are, which saves the costliest part of each step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drawn
import fitting
import numpy as np
import torch
from augment import augment
from average_precision import Found, mean_average_precision
from classification import begin_with_threat
from torch import Tensor, nn

from cvworker.embedded import pictures
from cvworker.modules.detect import BACKGROUND, Detect
from cvworker.modules.detectors import build
from cvworker.modules.spec import Spec

ARCHITECTURE = "ssdlite_shufflenet_v2_x0_5"
INPUT_SIZE = 128
DRAWN_SIZE = 192  # so that what is enlarged in training stays sharp
CLASSES = (BACKGROUND, *sorted((*pictures.THREATS, *pictures.HARMLESS)))
MOST = 3  # objects in a picture
LEFT_VISIBLE = 0.5  # of an object that is moved over the edge; with less in sight it is not asked for
LOWEST_SCORE = 0.01
DEFAULTS = {"pictures": 16_000, "epochs": 3, "batch_size": 16, "lr": 2e-3, "threads": 1}


def shown(seed: int) -> dict[str, np.ndarray]:
    """One picture, its objects' boxes in parts of its sides, and their classes, with zeros for absent ones."""
    image, picture = drawn.arrived(pictures, seed, DRAWN_SIZE)
    boxes, labels = np.zeros((MOST, 4), np.float32), np.zeros(MOST, np.int64)
    for i, item in enumerate(picture.objects):
        boxes[i] = np.divide(item.box, picture.image.size * 2)
        labels[i] = CLASSES.index(item.label)
    return {"images": image.transpose(2, 0, 1), "boxes": boxes, "labels": labels}


def targets_after(matrix: Tensor, boxes: Tensor, labels: Tensor, side: int) -> list[dict[str, Tensor]]:
    """Where objects are, in pixels, once their pictures were moved by ``matrix`` and scaled to ``side``."""
    count = len(boxes)
    scale, shift = matrix.diagonal(dim1=1, dim2=2)[:, None, None], matrix[:, None, None, :, 2]
    corners = (boxes.view(count, MOST, 2, 2) * 2 - 1 - shift) / scale
    ordered = torch.stack([corners.amin(2), corners.amax(2)], 2)
    visible = ordered.clamp(-1, 1)
    share = _areas(visible) / _areas(ordered).clamp(min=1e-9)
    kept = (labels > 0) & (share >= LEFT_VISIBLE)
    pixels = ((visible + 1) / 2 * side).view(count, MOST, 4)
    return [{"boxes": pixels[i][kept[i]], "labels": labels[i][kept[i]]} for i in range(count)]


def _areas(corners: Tensor) -> Tensor:
    return (corners[:, :, 1] - corners[:, :, 0]).prod(-1)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train, choose the score threshold, write the file, measure it and write that into it too."""
    data = drawn.dataset(pictures, shown, DRAWN_SIZE, drawn.TRAIN, args.pictures)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    network = _network().to(device).to(memory_format=torch.channels_last)

    def loss(chosen: Tensor, side: int) -> Tensor:
        images, matrix = augment(data["images"][chosen], side, generator, scale=0.2, shift=0.15)
        targets = targets_after(matrix, data["boxes"][chosen], data["labels"][chosen], side)
        there = [{key: value.to(device) for key, value in target.items()} for target in targets]
        return torch.stack(list(network(list(images.to(device) * 255), there).values())).sum()

    fitting.fit(network, loss, args, generator, (INPUT_SIZE, INPUT_SIZE))

    tensors, notes = fitting.halved(network.state_dict()), fitting.notes(args)
    fitting.save(args.output, tensors, metadata(0.5), notes)
    threshold = choose_threshold(args.output, 200)
    print(f"validation: score threshold {threshold}", flush=True)
    fitting.save(args.output, tensors, metadata(threshold), notes)
    accuracy = evaluate(args.output, 300, args.module)
    fitting.save(args.output, tensors, metadata(threshold) | {"accuracy": accuracy}, notes)
    fitting.report(args.output, accuracy)


def metadata(threshold: float) -> dict[str, object]:
    return {
        "architecture": ARCHITECTURE,
        "classes": CLASSES,
        "input_size": INPUT_SIZE,
        "mean": fitting.MEAN,
        "std": fitting.STD,
        "score_threshold": threshold,
    }


def _network() -> nn.Module:
    spec = Spec(Path(), ARCHITECTURE, CLASSES, INPUT_SIZE, tuple(fitting.MEAN), tuple(fitting.STD), {})
    network: Any = build(spec, LOWEST_SCORE)
    begin_with_threat(network.backbone.base)
    built: nn.Module = network
    return built


Pair = tuple[list[Found], list[Found]]


def found_and_there(weights: Path, first: int, count: int) -> list[Pair]:
    """What the module itself finds in pictures at full size, as a worker would run it, and what is there."""
    module = Detect(weights)
    module.score_threshold = LOWEST_SCORE
    module.setup(torch.device("cpu"))
    pairs: list[Pair] = []
    for start in range(first, first + count, 20):
        shown_ones = [pictures.draw(seed) for seed in range(start, min(start + 20, first + count))]
        tensors = [torch.from_numpy(np.array(one.image)).permute(2, 0, 1) for one in shown_ones]
        with torch.inference_mode():
            results = module.process(module.collate([module.preprocess(tensor) for tensor in tensors]))
        for one, result in zip(shown_ones, results, strict=True):
            there = [Found(item.label, item.box) for item in one.objects]
            pairs.append(([Found(item["label"], item["box"], item["score"]) for item in result["objects"]], there))
    return pairs


def choose_threshold(weights: Path, count: int) -> float:
    """The score from which on most pictures have exactly the labels that are there, as often as they are there."""
    pairs = found_and_there(weights, drawn.VALIDATE, count)
    candidates = sorted((number / 20 for number in range(4, 19)), key=lambda number: abs(number - 0.5))
    return max(candidates, key=lambda number: exact(pairs, number))


def exact(pairs: Sequence[Pair], threshold: float) -> float:
    """The share of pictures whose labels over the threshold are those that are there, one for each object."""
    right = 0
    for found, there in pairs:
        right += sorted(f.label for f in found if f.score >= threshold) == sorted(each.label for each in there)
    return right / len(pairs)


def evaluate(weights: Path, count: int, _: str = "detect", first: int = drawn.TEST) -> dict[str, float]:
    """Mean average precision over all scores, and the share of pictures that are exactly right at the threshold."""
    pairs = found_and_there(weights, first, count)
    threshold = Detect(weights).score_threshold
    mean = mean_average_precision(pairs)["mean"]
    return {"map50": round(mean, 4), "label_lists": round(exact(pairs, threshold), 4), "pictures": count}
