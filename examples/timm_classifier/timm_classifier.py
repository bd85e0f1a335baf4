"""Any classifier of the timm library, from one safetensors file that says what is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from cvworker import Module, StartupError


class TimmClassifier(Module):
    """The classes of a picture with the highest scores, by a softmax."""

    name = "timm_classifier"
    top = 3

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        if weights is None:
            raise StartupError("weights: make some with 'python make_weights.py timm.safetensors', and give --weights")
        with safe_open(weights, framework="numpy") as file:  # without torch, and without the tensors
            metadata = file.metadata()
        self.architecture = metadata["architecture"]
        self.classes: list[str] = json.loads(metadata["classes"])
        self.data: dict[str, Any] = json.loads(metadata["data"])  # as timm.data.resolve_model_data_config gives it
        self.side = self.data["input_size"][-1]
        self.scaled = round(self.side / self.data["crop_pct"])
        self.min_side = self.scaled

    def setup(self, device: torch.device) -> None:
        self.model = timm.create_model(self.architecture, num_classes=len(self.classes))
        self.model.load_state_dict(load_file(self.weights))
        self.model.eval().to(device)
        self.mean, self.std = (
            255 * torch.tensor(self.data[key], device=device).view(3, 1, 1) for key in ("mean", "std")
        )

    def preprocess(self, image: Tensor) -> Tensor:
        """timm's own evaluation transform, on bytes: the shorter side to ``scaled``, then the middle square."""
        height, width = image.shape[1:]
        scale = self.scaled / min(height, width)
        size = (max(self.side, round(height * scale)), max(self.side, round(width * scale)))
        image = interpolate(image[None], size=size, mode=self.data["interpolation"], antialias=True)[0]
        top, left = ((length - self.side) // 2 for length in size)
        return image[:, top : top + self.side, left : left + self.side]

    def process(self, batch: Tensor) -> Sequence[Mapping[str, Any]]:
        scores, labels = self.model((batch - self.mean) / self.std).float().softmax(1).topk(self.top)
        return [
            {"labels": [{"label": self.classes[n], "score": round(s, 4)} for n, s in zip(*row, strict=True)]}
            for row in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
