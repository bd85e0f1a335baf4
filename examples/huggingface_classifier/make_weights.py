"""A model folder for the example: a tiny vision transformer, untrained. ``python make_weights.py tiny-vit``"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

LABELS = ["cat", "dog", "horse"]
SIDE = 64


def make(folder: Path) -> Path:
    """Write the folder as ``save_pretrained`` does, without a download; the path of its weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=dict(enumerate(LABELS)),
        label2id={label: n for n, label in enumerate(LABELS)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder / "model.safetensors"


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
