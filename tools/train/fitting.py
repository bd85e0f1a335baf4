"""The loop that all networks are trained by, and the file that they end in."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which everyone's weights use
OPTIONS = ("seed", "pictures", "epochs", "batch_size", "lr", "threads")  # what the weights follow from

Loss = Callable[[Tensor, int], Tensor]
"""The loss of the training pictures of these numbers, scaled to squares of this side."""


def fit(
    network: nn.Module, loss: Loss, args: argparse.Namespace, generator: torch.Generator, sides: tuple[int, int]
) -> None:
    """Train in place; ``sides`` are those of pictures before and after 60 % of the epochs.

    Most of the way on smaller pictures, at half the cost: the layers work at any size.
    """
    steps = args.pictures // args.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, epochs=args.epochs, steps_per_epoch=steps)
    begun = time.monotonic()
    for epoch in range(args.epochs):
        network.train()
        total = 0.0
        side = sides[0] if epoch < args.epochs * 0.6 else sides[1]
        order = torch.randperm(args.pictures, generator=generator)
        for step in range(steps):
            value = loss(order[step * args.batch_size : (step + 1) * args.batch_size], side)
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            schedule.step()
            total += value.item()
            if (step + 1) % max(1, steps // 10) == 0:
                _tell(epoch + (step + 1) / steps, args.epochs, total / (step + 1), time.monotonic() - begun)
    network.eval()


def _tell(done: float, epochs: int, loss: float, seconds: float) -> None:
    left = seconds / done * (epochs - done)
    print(f"epoch {done:5.1f} of {epochs}: loss {loss:.4f}, {seconds:.0f} s, about {left:.0f} s left", flush=True)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], notes: Mapping[str, str]) -> None:
    """Write a weights file; values of ``metadata`` that are no strings become JSON."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(stored, partial, {**texts, **notes})
    partial.chmod(0o644)  # safetensors makes files that only their owner can read, and containers run as someone else
    partial.rename(path)


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float16; what batch norms hold stays as it is, since a variance may leave its range."""
    return {
        name: tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }


def notes(args: argparse.Namespace) -> dict[str, str]:
    """How the weights were made."""
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in OPTIONS)
    return {"seed": str(args.seed), "command": f"python tools/train {args.module} {options}"}


def report(path: Path, accuracy: Mapping[str, float]) -> None:
    print(f"test: {json.dumps(accuracy)}; {path} has {path.stat().st_size:,} bytes", flush=True)
