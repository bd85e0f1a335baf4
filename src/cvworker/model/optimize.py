"""Other forms of a module's network: the same weights, laid out, compiled or recorded to run faster.

A form changes ``module.model`` in place, so that the module's own code goes on as it was written, and can be taken off
again. Whether one is used is decided by measuring, in :mod:`cvworker.model.precision`.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cvworker.model.folding import chains_of
from cvworker.model.prepacking import Activated, Prepacked, packable

CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
"""Layers whose weights ``autocast`` converts in every batch, because it forgets them at its end."""
COMPILERS = ("c++", "g++", "clang++")


class Form(Protocol):
    """One way to run a network; ``on`` may raise, and then nothing is changed."""

    name: str

    def on(self) -> None: ...

    def off(self) -> None: ...


class ChannelsLast:
    """Convolution weights in channels-last order, and in ``dtype`` already where ``autocast`` would convert them.

    Batch norms are folded into the convolutions before them (:mod:`cvworker.model.folding`). On the CPU weights are
    packed as oneDNN wants them, and activations computed with them (:mod:`cvworker.model.prepacking`). Measured with
    ResNet-50 at batch 8 on two virtual cores with AVX512-BF16, beside fp32 as it is: in fp32 channels-last is 1.18
    times as fast and with folded norms 1.31 times, in bf16 with converted weights 2.4 and 2.6 times; packing and
    activations make that 1.15 times as fast once more.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.name = "channels-last"
        self._changes: list[tuple[nn.Module, str, nn.Parameter | None, nn.Parameter]] = []
        chains = chains_of(model)
        activations = {chain.convolution: chain.activation for chain in chains if chain.activation is not None}
        self._forwards: dict[nn.Module, Callable[..., torch.Tensor]] = {
            chain.norm: _unchanged for chain in chains if chain.norm is not None
        }
        for convolution in filter(packable, model.modules()):
            activation = activations.get(convolution)
            self._forwards[convolution] = Prepacked(convolution, activation)
            if activation is not None:
                self._forwards[activation] = Activated(activation)
        folded: dict[nn.Module, dict[str, nn.Parameter]] = {
            chain.convolution: dict(zip(("weight", "bias"), chain.folded(), strict=True))
            for chain in chains
            if chain.norm is not None
        }
        for layer in model.modules():
            # A subclass may do anything with its weights, and a parametrized layer is one.
            cast = dtype if dtype is not None and type(layer) in CAST else None
            for name, weight in (dict(layer.named_parameters(recurse=False)) | folded.get(layer, {})).items():
                if (new := _laid_out(weight, cast)) is not layer._parameters[name]:
                    self._changes.append((layer, name, layer._parameters[name], new))

    def on(self) -> None:
        for layer, name, _, new in self._changes:
            layer._parameters[name] = new
        for layer, forward in self._forwards.items():
            vars(layer)["forward"] = forward

    def off(self) -> None:
        for layer, name, old, _ in self._changes:
            layer._parameters[name] = old
        for layer in self._forwards:
            vars(layer).pop("forward", None)


class Forward(ABC):
    """A form that puts another function in the place of the network's ``forward``: attributes and hooks stay."""

    name = "forward"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = vars(model).get("forward")
        self._forward: Callable[..., Any] | None = None

    def on(self) -> None:
        if self._forward is None:
            self._forward = self.make(self._model.forward)
        self._model.forward = self._forward

    def off(self) -> None:
        if self._before is not None:
            self._model.forward = self._before
        else:
            vars(self._model).pop("forward", None)

    @abstractmethod
    def make(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What to run in place of ``forward``."""


class Compiled(Forward):
    """``torch.compile``, its first batches included when it is first run: tens of seconds for a large network."""

    name = "compiled"

    def make(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        device = next(self._model.parameters()).device
        if device.type == "cpu" and not has_compiler():
            raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}, or CXX) is installed")
        compiled: Callable[..., Any] = torch.compile(forward)
        return compiled


class Graphs(Forward):
    """CUDA graphs: one recording for each padded batch size, replayed without the CPU's part in each kernel.

    Written for CUDA and tested with a stand-in for the recording; not measured on a GPU yet.
    """

    name = "graphs"

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__(model)
        self._sizes = padded_sizes(batch_size)

    def make(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return PaddedForward(forward, self._sizes, record_graph)


class PaddedForward:
    """Calls with one tensor run a recording made for the next larger batch size, padded with the last sample.

    ``record(forward, batch)`` gives the recording: a function that takes a batch of that very shape and gives outputs
    that the next call may overwrite. Whatever cannot be replayed runs ``forward`` itself: other arguments, more samples
    than the largest size, shapes beyond :data:`MAX_RECORDINGS`, and outputs that are not one row for each sample.
    """

    MAX_RECORDINGS = 32
    """Each keeps the activations of its batch; a module whose samples differ in size would record without end."""

    def __init__(
        self, forward: Callable[..., Any], sizes: list[int], record: Callable[..., Callable[[torch.Tensor], Any]]
    ) -> None:
        self._forward = forward
        self._sizes = sizes
        self._record = record
        self._recordings: dict[Any, Callable[[torch.Tensor], Any] | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        size = self._size(args, kwargs)
        replay = self._recording(args[0], size) if size else None
        if replay is None:
            return self._forward(*args, **kwargs)
        count = len(args[0])
        outputs = replay(_padded(args[0], size))
        return pytree.tree_map_only(torch.Tensor, lambda output: output[:count].clone(), outputs)

    def _size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The size to pad to, or 0 for a call that cannot be replayed."""
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor) or not args[0].dim():
            return 0
        return next((size for size in self._sizes if size >= len(args[0]) > 0), 0)

    def _recording(self, batch: torch.Tensor, size: int) -> Callable[[torch.Tensor], Any] | None:
        half = torch.get_autocast_dtype(batch.device.type) if torch.is_autocast_enabled(batch.device.type) else None
        key = (size, batch.shape[1:], batch.dtype, half)
        if key not in self._recordings and len(self._recordings) < self.MAX_RECORDINGS:
            example = _padded(batch, size)
            rows = [leaf for leaf in pytree.tree_leaves(self._forward(example)) if isinstance(leaf, torch.Tensor)]
            fits = bool(rows) and all(leaf.dim() and len(leaf) == size for leaf in rows)
            self._recordings[key] = self._record(self._forward, example) if fits else None
        return self._recordings.get(key)


def record_graph(forward: Callable[..., Any], example: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """Record ``forward`` for batches like ``example``: outputs stay valid until the next replay."""
    static = example.clone()
    stream = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries choose their kernels, and allocate, before what is recorded
            forward(static)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # autocast's copies of the weights belong to the pool of the graph that made them, and must not outlive it
    torch.clear_autocast_cache()
    # other threads may copy to the device meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = forward(static)
    torch.clear_autocast_cache()

    def replay(batch: torch.Tensor) -> Any:
        static.copy_(batch)
        graph.replay()
        return outputs

    return replay


def _unchanged(activations: torch.Tensor) -> torch.Tensor:
    return activations


def network_of(module: Any) -> nn.Module | None:
    """The network that a module keeps in ``self.model``, if it does and it has weights."""
    model = getattr(module, "model", None)
    return model if isinstance(model, nn.Module) and any(True for _ in model.parameters()) else None


def has_images(model: nn.Module) -> bool:
    """Whether channels-last can mean anything to it: some weight has four dimensions."""
    return any(weight.dim() == 4 for weight in model.parameters())


def padded_sizes(batch_size: int) -> list[int]:
    """The powers of two below ``batch_size``, and itself."""
    return [*(1 << n for n in range((batch_size - 1).bit_length())), batch_size]


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)


def _laid_out(weight: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """The weight in channels-last order and ``dtype``, or itself where that is how it is."""
    new = weight.detach()
    if new.dtype is torch.float32 and dtype is not None:
        new = new.to(dtype)
    if new.dim() == 4:
        new = new.contiguous(memory_format=torch.channels_last)
    if new.dtype is weight.dtype and new.data_ptr() == weight.data_ptr():
        return weight
    return nn.Parameter(new, requires_grad=weight.requires_grad)


def _padded(batch: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(batch)
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch
