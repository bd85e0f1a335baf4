"""The work that every worker does for a picture: one preprocess, one model, and the loads made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from torchvision.transforms.v2 import functional as transforms

SIDE = 224
BATCH = 8
SEED = 7
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, in levels

Results = list[dict[str, Any]]
Model = Callable[[torch.Tensor], Results]


@dataclass(frozen=True, slots=True)
class Load:
    """What surrounds the work, and which model it has."""

    name: str
    summary: str
    image_ms: float = 0.0
    callback_ms: float = 0.0
    model: str = "none"
    warm_answers: int = 300
    """Answers before measuring begins."""


LOADS = {
    load.name: load
    for load in (
        Load("io", "image host 150 ms, callback 50 ms, no model", 150, 50),
        Load("cpu", "no waiting, no model"),
        Load("r50", "no waiting, ResNet-50 on the CPU", model="r50", warm_answers=30),
    )
}


def decode(data: bytes, min_side: int = 0) -> torch.Tensor:
    """A JPEG as ``uint8 [3, H, W]``, a view of ``[H, W, 3]``; with ``min_side`` scaled down by 2, 4 or 8 at most to it.

    Without any of cvworker's guards, whose cost is cvworker's own.
    """
    if not min_side:
        pixels = simplejpeg.decode_jpeg(data)
    else:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        scale = next((n for n in (8, 4, 2) if min_side * n <= min(width, height)), 1)
        pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    return torch.from_numpy(np.asarray(pixels)).permute(2, 0, 1)


def preprocess(image: torch.Tensor) -> torch.Tensor:
    """Smaller side to 224 with antialias, then the middle: ``uint8 [3, 224, 224]``.

    torch has a vector kernel for uint8 that is laid out as ``[H, W, 3]``, which the decoder's result is; it is several
    times as fast as resizing floats.
    """
    image = transforms.resize(image, [SIDE], antialias=True)
    top, left = (image.shape[1] - SIDE) // 2, (image.shape[2] - SIDE) // 2
    return image[:, top : top + SIDE, left : left + SIDE]


def mean(batch: torch.Tensor) -> Results:
    """No model: the mean of each sample, so that every pixel was there."""
    return [{"mean": value} for value in batch.float().mean((1, 2, 3)).tolist()]


def resnet() -> torch.nn.Module:
    """ResNet-50 with seeded weights: its answers mean nothing, its cost is that of a trained one.

    Channels last for everybody: on CPUs it is faster in fp32 already, and whoever knows torch knows that.
    """
    from torchvision.models import resnet50

    torch.manual_seed(SEED)
    network: torch.nn.Module = resnet50().eval()
    return network.to(memory_format=torch.channels_last)


def classify(network: torch.nn.Module, batch: torch.Tensor) -> Results:
    """The best class of each sample, and its score."""
    mean, std = (torch.tensor(values, device=batch.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    images = batch.contiguous(memory_format=torch.channels_last).float()
    best = network((images - mean) / std).float().softmax(1).max(1)
    scores, classes = best.values.tolist(), best.indices.tolist()
    return [{"class": each, "score": score} for each, score in zip(classes, scores, strict=True)]


def make_model(load: str) -> Model:
    """The model of a load, warm: torch picks its threads at the first run, and decoding threads change the default."""
    if LOADS[load].model == "none":
        torch.set_num_threads(1)  # a mean is too little to share out: the second thread would spin for nothing
        return mean
    network = resnet()

    def run(batch: torch.Tensor) -> Results:
        with torch.inference_mode():
            return classify(network, batch)

    run(torch.zeros((BATCH, 3, SIDE, SIDE), dtype=torch.uint8))
    return run
