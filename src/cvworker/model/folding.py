"""What alone takes a convolution's output, and can be computed with it: one pass over the data fewer for each."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from torch.fx import Node

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
}
"""Those that oneDNN computes with a convolution, by its names for them, with their arguments."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A convolution, and what alone takes its output: a batch norm, an activation, or the one and then the other."""

    convolution: _ConvNd
    norm: _BatchNorm | None
    activation: nn.Module | None
    """It may be called elsewhere, too."""

    def folded(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Weight and bias of the convolution that gives what convolution and norm give now.

        With the norm's ``scale = weight / sqrt(running_var + eps)``: ``w' = w * scale`` for each output channel, and
        ``b' = (b - running_mean) * scale + bias``. https://arxiv.org/abs/1502.03167, algorithm 2.
        """
        weight, norm = self.convolution.weight.detach(), self.norm
        assert norm is not None
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = torch.rsqrt(variance + norm.eps) * (1 if norm.weight is None else norm.weight.detach())
        bias = 0 if self.convolution.bias is None else self.convolution.bias.detach()
        shift = (bias - mean) * scale + (0 if norm.bias is None else norm.bias.detach())
        shape = (-1, *[1] * (weight.dim() - 1))
        return nn.Parameter(weight * scale.reshape(shape), False), nn.Parameter(shift, False)


def chains_of(model: nn.Module) -> list[Chain]:
    """Those in ``model``: norms in evaluation mode, convolutions and norms called once, nothing watched by a hook.

    Found by tracing the network's own code, so that an output that goes elsewhere as well is seen; where a part cannot
    be traced (its way depends on the data), the parts within it are.
    """
    if not _has_convolutions(model):
        return []
    tensors = (*model.parameters(), *model.buffers())
    try:  # what a forward leaves in its module while it is traced is left in a copy, which shares all tensors
        traced = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception:  # a module may hold anything
        return []
    found = ([model.get_submodule(name) for name in names] for names in _names(traced, ""))
    return [chain for layers in found if (chain := _usable(*layers)) is not None]


def _names(model: nn.Module, prefix: str) -> Iterator[list[str]]:
    """Of a convolution and what follows it, for each chain."""
    from torch.fx import symbolic_trace

    if not _has_convolutions(model):
        return
    try:
        nodes = list(symbolic_trace(model).graph.nodes)
    except Exception:  # whatever the network's code makes of a stand-in for a tensor
        for name, child in model.named_children():
            yield from _names(child, f"{prefix}{name}.")
        return
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    for node in nodes:
        if node.op != "call_module" or type(model.get_submodule(str(node.target))) not in CONVOLUTIONS:
            continue
        names, after = [str(node.target)], _next(node)
        if calls[names[0]] > 1:
            continue
        if after is not None and type(model.get_submodule(str(after.target))) in NORMS:
            if calls[str(after.target)] > 1:
                continue
            names.append(str(after.target))
            after = _next(after)
        if after is not None and type(model.get_submodule(str(after.target))) in ACTIVATIONS:
            names.append(str(after.target))
        if len(names) > 1:
            yield [prefix + name for name in names]


def _next(node: Node) -> Node | None:
    """The call of a layer that alone takes this one's output."""
    user = next(iter(node.users), None)
    alone = user is not None and len(node.users) == 1 and user.op == "call_module" and user.args == (node,)
    return user if alone else None


def _usable(convolution: nn.Module, *after: nn.Module) -> Chain | None:
    """Of the layers of a chain those that are as they are expected to be, up to the first that is not."""
    # A subclass may do anything with its weights, and a parametrized layer is one.
    if type(convolution) not in CONVOLUTIONS or watched(convolution):
        return None
    assert isinstance(convolution, _ConvNd)
    if convolution.weight.dtype is not torch.float32:
        return None
    norm = activation = None
    for layer in after:
        if watched(layer):
            break
        if isinstance(layer, _BatchNorm):
            if layer.training or layer.running_mean is None:
                break
            norm = layer
        else:
            activation = layer
    return Chain(convolution, norm, activation) if norm is not None or activation is not None else None


def _has_convolutions(model: nn.Module) -> bool:
    return any(type(part) in CONVOLUTIONS for part in model.modules())


def watched(layer: nn.Module) -> bool:
    """Whether hooks or another ``forward`` see what goes in and comes out."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
