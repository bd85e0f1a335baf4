"""Batch norms that follow a convolution, folded into its weights: one pass over the activations fewer for each pair."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, slots=True)
class Pair:
    """A convolution and the batch norm that alone takes its output."""

    convolution: _ConvNd
    norm: _BatchNorm

    def folded(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Weight and bias of the convolution that gives what both give now.

        With the norm's ``scale = weight / sqrt(running_var + eps)``: ``w' = w * scale`` for each output channel, and
        ``b' = (b - running_mean) * scale + bias``. https://arxiv.org/abs/1502.03167, algorithm 2.
        """
        weight, norm = self.convolution.weight.detach(), self.norm
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = torch.rsqrt(variance + norm.eps) * (1 if norm.weight is None else norm.weight.detach())
        bias = 0 if self.convolution.bias is None else self.convolution.bias.detach()
        shift = (bias - mean) * scale + (0 if norm.bias is None else norm.bias.detach())
        shape = (-1, *[1] * (weight.dim() - 1))
        return nn.Parameter(weight * scale.reshape(shape), False), nn.Parameter(shift, False)


def pairs_of(model: nn.Module) -> list[Pair]:
    """The pairs in ``model`` that can be folded: in evaluation mode, each called once, and watched by no hook.

    Found by tracing the network's own code, so that an output that goes elsewhere as well is seen; where a part cannot
    be traced (its way depends on the data), the parts within it are.
    """
    if not _has_norms(model):
        return []
    tensors = (*model.parameters(), *model.buffers())
    try:  # what a forward leaves in its module while it is traced is left in a copy, which shares all tensors
        traced = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception:  # a module may hold anything
        return []
    found = ((model.get_submodule(first), model.get_submodule(second)) for first, second in _names(traced, ""))
    return [pair for convolution, norm in found if (pair := _foldable(convolution, norm))]


def _names(model: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Of convolution and batch norm, for each pair."""
    from torch.fx import Node, symbolic_trace

    if not _has_norms(model):
        return
    try:
        nodes = list(symbolic_trace(model).graph.nodes)
    except Exception:  # whatever the network's code makes of a stand-in for a tensor
        for name, child in model.named_children():
            yield from _names(child, f"{prefix}{name}.")
        return
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    for node in nodes:
        if node.op != "call_module" or type(model.get_submodule(str(node.target))) not in NORMS:
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        first, second = str(before.target), str(node.target)
        if calls[first] == calls[second] == 1:
            yield prefix + first, prefix + second


def _foldable(convolution: nn.Module, norm: nn.Module) -> Pair | None:
    # A subclass may do anything with its weights, and a parametrized layer is one.
    if type(convolution) not in CONVOLUTIONS or type(norm) not in NORMS or watched(convolution) or watched(norm):
        return None
    assert isinstance(convolution, _ConvNd)
    assert isinstance(norm, _BatchNorm)
    if norm.training or norm.running_mean is None or convolution.weight.dtype is not torch.float32:
        return None
    return Pair(convolution, norm)


def _has_norms(model: nn.Module) -> bool:
    return any(type(part) in NORMS for part in model.modules())


def watched(layer: nn.Module) -> bool:
    """Whether hooks or another ``forward`` see what goes in and comes out."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
