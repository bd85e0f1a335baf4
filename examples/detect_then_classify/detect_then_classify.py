"""Two models in one module: a detector finds things, a classifier looks at each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from networks import Classifier, Detector
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import roi_align

from cvworker import Module, StartupError

CROP = 32
"""Pixels: the side of what the classifier gets."""


class DetectThenClassify(Module):
    """Boxes in pixels of the picture, with a score from the detector and a label from the classifier."""

    name = "detect_then_classify"

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        if weights is None:
            raise StartupError("weights: make some with 'python make_weights.py two.safetensors', and give --weights")
        with safe_open(weights, framework="numpy") as file:
            self.classes: list[str] = json.loads(file.metadata()["classes"])

    def setup(self, device: torch.device) -> None:
        self.model = nn.ModuleDict({"detector": Detector(), "classifier": Classifier(len(self.classes))})
        self.model.load_state_dict(load_file(self.weights))
        self.model.eval().to(device)

    def preprocess(self, image: Tensor) -> Tensor:
        """The picture at its own size: boxes are then in its own pixels, and crops as sharp as can be."""
        return image.contiguous()

    def collate(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Pictures of many sizes stay a list; each is copied to the device by itself."""
        return list(samples)

    def process(self, batch: Sequence[Tensor]) -> Sequence[Mapping[str, Any]]:
        """All pictures through the detector, then the crops of all of them through the classifier at once."""
        images = [image.float() / 255 for image in batch]
        found = self.model["detector"](images)
        crops = [
            roi_align(image[None], [each["boxes"]], CROP, aligned=True)
            for image, each in zip(images, found, strict=True)
        ]
        scores, labels = self.model["classifier"](torch.cat(crops)).float().softmax(1).max(1)
        counts = [len(each["boxes"]) for each in found]
        parts = zip(found, scores.split(counts), labels.split(counts), strict=True)
        return [{"objects": [self._object(*row) for row in rows(each, *more)]} for each, *more in parts]

    def _object(self, box: list[float], found: float, sure: float, label: int) -> dict[str, Any]:
        return {
            "box": [round(side) for side in box],
            "score": round(found, 3),
            "label": self.classes[label],
            "label_score": round(sure, 3),
        }


def rows(found: Mapping[str, Tensor], scores: Tensor, labels: Tensor) -> Any:
    """What is known of each thing in one picture: box, score, label score and label."""
    return zip(found["boxes"].tolist(), found["scores"].tolist(), scores.tolist(), labels.tolist(), strict=True)
