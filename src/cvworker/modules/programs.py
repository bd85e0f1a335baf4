"""Networks that were exported, in place of the one that a built-in module would build; tried before they are used.

Each takes ``float32 [N, 3, S, S]``, normalised, for any N. A classifier gives ``float32 [N, classes]``; a detector
boxes ``float32 [N, K, 4]`` in pixels of its input, scores ``float32 [N, K]`` and labels ``int64 [N, K]``, where K may
depend on the pictures and places without an object have the score 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvworker.errors import StartupError
from cvworker.modules.metadata import first_line
from cvworker.modules.networks import load_network
from cvworker.modules.spec import Spec
from cvworker.modules.weighted import normalisation

BATCHES = (1, 3)
"""Tried at start: an export with a fixed batch would fail at the first batch of another size."""


def load_classifier(spec: Spec, device: torch.device) -> nn.Module:
    """The exported network, on ``device``, tried with batches of several sizes.

    Raises:
        StartupError: it cannot be loaded, or does not take and give what its metadata says.
    """
    network = load_network(spec.path, device)
    for count, outputs in _tried(network, spec, device):
        if _shapes(outputs) != [[count, len(spec.classes)]]:
            wanted = f"[[{count}, {len(spec.classes)}]] for {len(spec.classes)} classes"
            raise _other_outputs(spec, outputs, wanted)
    return network


def load_detector(spec: Spec, device: torch.device, score_threshold: float) -> nn.Module:
    """The same for a detector, called like one of torchvision's, but with ``uint8 [3, S, S]`` in the list."""
    network = load_network(spec.path, device)
    for count, outputs in _tried(network, spec, device):
        shapes = _shapes(outputs)
        most = shapes[1][1] if len(shapes) == 3 and len(shapes[1]) == 2 else 0
        if shapes != [[count, most, 4], [count, most], [count, most]]:
            raise _other_outputs(spec, outputs, f"boxes [{count}, K, 4], scores [{count}, K] and labels [{count}, K]")
    return _Detector(network, spec, device, score_threshold)


class _Detector(nn.Module):
    def __init__(self, network: nn.Module, spec: Spec, device: torch.device, score_threshold: float) -> None:
        super().__init__()
        self._network = network
        self._scale, self._shift = normalisation(spec, device)
        self._threshold = score_threshold

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        found = self._network(self._shift + torch.stack(list(images)).float() * self._scale)
        kept = (found[1] >= self._threshold) & (found[1] > 0)
        return [
            {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
            for boxes, scores, labels, keep in zip(*found, kept, strict=True)
        ]


def _tried(network: nn.Module, spec: Spec, device: torch.device) -> Iterator[tuple[int, Sequence[Any]]]:
    """Batch sizes, and what the network gives for batches of zeros."""
    side = spec.input_size
    for count in BATCHES:
        try:
            with torch.inference_mode():
                outputs = network(torch.zeros(count, 3, side, side, device=device))
        except Exception as error:
            way_out = "export it with a dynamic batch dimension and the input_size of its metadata"
            shape = [count, 3, side, side]
            raise spec.refuse(f"does not run on {shape} ({first_line(error)[:160]}); {way_out}") from error
        yield count, outputs if isinstance(outputs, tuple | list) else (outputs,)


def _shapes(outputs: Sequence[Any]) -> list[Any]:
    return [list(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in outputs]


def _other_outputs(spec: Spec, outputs: Sequence[Any], wanted: str) -> StartupError:
    return spec.refuse(f"gives {_shapes(outputs)} where its metadata means {wanted}; export it again with those")
