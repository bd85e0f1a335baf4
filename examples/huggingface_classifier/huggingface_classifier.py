"""An image classifier of Hugging Face's ``transformers``, from a local folder as ``save_pretrained`` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from cvworker import Module, StartupError


class HuggingFaceClassifier(Module):
    """The most likely label of a picture. ``--weights`` is the folder's model.safetensors; the rest lies beside it."""

    name = "huggingface_classifier"

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        if weights is None:
            raise StartupError("weights: give the model.safetensors in the folder of the model with --weights")
        self.folder = weights.parent
        self.processor = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
        size = self.processor.size
        self.min_side = size.get("shortest_edge") or min(size["height"], size["width"])

    def setup(self, device: torch.device) -> None:
        self.model = AutoModelForImageClassification.from_pretrained(self.folder, local_files_only=True)
        self.model.eval().to(device)
        p = self.processor
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (p.image_mean, p.image_std))
        self.scale, self.shift = p.rescale_factor / std, -mean / std

    def preprocess(self, image: Tensor) -> Tensor:
        """The model's own processor, but for the normalisation: bytes travel, the device makes floats of them."""
        found = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return found["pixel_values"][0]

    def process(self, batch: Tensor) -> Sequence[Mapping[str, Any]]:
        logits = self.model(pixel_values=batch * self.scale + self.shift).logits
        scores, labels = logits.float().softmax(1).max(1)
        names = self.model.config.id2label
        return [
            {"label": names[label], "score": round(score, 4)}
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
