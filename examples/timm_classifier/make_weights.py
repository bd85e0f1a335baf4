"""Weights for the example: timm's smallest ResNet, untrained. ``python make_weights.py timm.safetensors``"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

ARCHITECTURE = "test_resnet"
CLASSES = ["bicycle", "bus", "car", "tram"]


def make(path: Path) -> Path:
    """Write the file that the module reads: for weights of your own, load a state dict after ``create_model``."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES))
    data = timm.data.resolve_model_data_config(model)
    metadata = {"architecture": ARCHITECTURE, "classes": json.dumps(CLASSES), "data": json.dumps(data)}
    save_file(model.state_dict(), path, metadata)
    return path


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
