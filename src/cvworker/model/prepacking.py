"""Convolutions as oneDNN likes them: weights in its own order, which every batch would put them into anew otherwise,
and the activation that follows computed before the result is written.

By operators that ``torch.compile`` uses for the same: https://docs.pytorch.org/docs/stable/torch.compiler.html
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from cvworker.model.folding import ACTIVATIONS, watched

_DONE = "_cvworker_activated"
TYPES = (torch.float32, torch.bfloat16)


class Prepacked:
    """A convolution's ``forward`` on the CPU, with packed weights where they are of the type that it computes in.

    They are packed at the first batch, whose size oneDNN chooses the order for; it is right for every other size, too.
    Calls that it is not meant for run the layer's own ``forward``.
    """

    def __init__(self, layer: nn.Conv2d, activation: nn.Module | None = None) -> None:
        """``activation`` alone takes the output, and has :class:`Activated` for its ``forward``."""
        self._layer = layer
        self._activation = activation
        self._of: torch.Tensor | None = None
        self._packed: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        weight = layer.weight
        wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        fits = images.dim() == 4 and weight.dtype is wanted and wanted in TYPES
        if not fits or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nn.Conv2d.forward(layer, images)
        if self._of is not weight:
            self._of, self._packed = weight, _packed(layer, images)
        if self._packed is None:
            return nn.Conv2d.forward(layer, images)
        place = layer.padding, layer.stride, layer.dilation, layer.groups
        name, arguments = ("none", []) if self._activation is None else ACTIVATIONS[type(self._activation)]
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            images.to(wanted), self._packed, layer.bias, *place, name, arguments, ""
        )
        if self._activation is not None:
            setattr(result, _DONE, True)
        return result


class Activated:
    """An activation's ``forward``, after convolutions some of which have computed it already."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and getattr(images, _DONE, False):
            delattr(images, _DONE)  # whatever is done with it from now on, an activation would be another one
            return images
        result: torch.Tensor = type(self._layer).forward(self._layer, images)
        return result


def packable(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution whose ``forward`` may be replaced so."""
    # A subclass may do anything with its weights, and a parametrized layer is one.
    return (
        type(layer) is nn.Conv2d
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in TYPES
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not watched(layer)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def _packed(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor | None:
    """The weight in oneDNN's order for batches of this size, or None where this build of PyTorch has none."""
    weight: Any = layer.weight.detach()
    place = layer.padding, layer.stride, layer.dilation, layer.groups
    try:
        found: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *place, list(images.shape))
    except (AttributeError, RuntimeError):  # NotImplementedError is one of the latter
        return None
    return found
