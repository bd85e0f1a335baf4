"""A classifier as an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cvworker import Module, StartupError

SIDE = 64


class OnnxClassifier(Module):
    """A score for each class. The file takes bytes, ``uint8 [N, 3, 64, 64]``: the normalisation is in its graph."""

    name = "onnx_classifier"
    min_side = SIDE

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        if weights is None:
            raise StartupError("weights: make some with 'python make_weights.py tiny.onnx', and give --weights")

    def setup(self, device: torch.device) -> None:
        """Open the session: on a GPU with onnxruntime-gpu installed, else on the CPU."""
        cuda = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if device.type == "cuda" else []
        self.session = onnxruntime.InferenceSession(self.weights, providers=[*cuda, "CPUExecutionProvider"])
        self.input, self.output = self.session.get_inputs()[0].name, self.session.get_outputs()[0].name
        self.classes: list[str] = json.loads(self.session.get_modelmeta().custom_metadata_map["classes"])

    def preprocess(self, image: Tensor) -> Tensor:
        return interpolate(image[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]

    def process(self, batch: Tensor) -> Sequence[Mapping[str, Any]]:
        """Bind the batch's memory where it is: nothing is copied on the way in or out, on a GPU neither."""
        if batch.is_cuda:  # ONNX Runtime has a stream of its own
            torch.cuda.current_stream().synchronize()
        batch = batch.contiguous()
        scores = torch.empty(len(batch), len(self.classes), device=batch.device)
        binding = self.session.io_binding()
        place = (batch.device.type, batch.device.index or 0)
        binding.bind_input(self.input, *place, np.uint8, tuple(batch.shape), batch.data_ptr())
        binding.bind_output(self.output, *place, np.float32, tuple(scores.shape), scores.data_ptr())
        self.session.run_with_iobinding(binding)
        rows = [[round(score, 4) for score in row] for row in scores.tolist()]
        return [{"scores": dict(zip(self.classes, row, strict=True))} for row in rows]
