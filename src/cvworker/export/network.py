"""The network inside a module, as exporters want it: tensors in, tensors out, and what varies with the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cvworker.errors import StartupError
from cvworker.model.precision import PRECISIONS
from cvworker.model.preprocess import describe
from cvworker.module import Module
from cvworker.modules.detect import Detect
from cvworker.modules.weighted import normalisation

PAIR = (2, 3)
"""Batch sizes whose inputs are compared: what differs between them is the batch dimension."""


class Source(Protocol):
    """A network, and what it gets for pictures."""

    network: nn.Module

    def inputs(self, images: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the network is called with for these images, of the module's ``image_type``, on its device."""


def source_of(module: Module, device: torch.device) -> Source:
    """The network of a module after its ``setup``.

    Raises:
        StartupError: there is none in ``self.model``, or its detector is of another kind than torchvision's.
    """
    network = getattr(module, "model", None)
    if not isinstance(network, nn.Module):
        raise StartupError(
            f"module: {module.name!r} has no network in self.model after setup; keep the torch.nn.Module there, and "
            "call it from process with tensors"
        )
    if isinstance(module, Detect):
        return _Boxes(module, device)
    return _Called(module)


class _Called:
    """Any module: ``process`` is run, and what it calls its network with is kept."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self.network: nn.Module = module.model  # type: ignore[attr-defined]

    def inputs(self, images: Sequence[Any]) -> tuple[Tensor, ...]:
        seen: list[tuple[Any, dict[str, Any]]] = []

        def see(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Seen

        hook = self.network.register_forward_pre_hook(see, with_kwargs=True)
        try:
            batch = self._module.collate([self._module.preprocess(image) for image in images])
            with torch.inference_mode():
                self._module.process(batch)
        except _Seen:
            pass
        except Exception as error:
            raise StartupError(
                f"module: {self._module.name!r} fails on a picture before it calls self.model: {describe(error)}"
            ) from error
        finally:
            hook.remove()
        if not seen:
            raise StartupError(
                f"module: {self._module.name}.process does not call self.model; only what it calls is exported"
            )
        args, kwargs = seen[0]
        if kwargs or not args or not all(isinstance(each, Tensor) for each in args):
            given = ", ".join(type(each).__name__ for each in (*args, *kwargs.values()))
            raise StartupError(
                f"module: {self._module.name}.process calls self.model with ({given}); it must be called "
                "with tensors by position, a batch in each, to be exported"
            )
        return tuple(each.clone() for each in args)  # outside inference mode they are ordinary tensors


class _Boxes:
    """``detect``: a batch in place of the list of pictures that torchvision's detectors take."""

    def __init__(self, module: Detect, device: torch.device) -> None:
        from cvworker.export.detectors import exportable

        self._module = module
        self._scale, self._shift = normalisation(module.spec, device)
        try:
            self.network = exportable(module.model, module.spec.input_size)
        except TypeError as error:
            raise module.spec.refuse(f"cannot be exported: {error}") from None

    def inputs(self, images: Sequence[Any]) -> tuple[Tensor, ...]:
        batch = torch.stack([self._module.preprocess(image)["image"] for image in images])
        return (self._shift + batch.to(self._shift.device).float() * self._scale,)


class _Seen(BaseException):
    """Ends a ``process`` that has called its network; no handler of the module's own catches it."""


class Precise(nn.Module):
    """A network that computes in another precision, as the worker's ``--precision`` has it; floats come out."""

    def __init__(self, network: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self._dtype, self._device = PRECISIONS[precision], device.type

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(self._device, self._dtype):
            outputs = self.network(*inputs)
        return torch.utils._pytree.tree_map_only(Tensor, _in_full, outputs)


def _in_full(output: Tensor) -> Tensor:
    return output.float() if output.is_floating_point() else output


@dataclass(frozen=True)
class Shapes:
    """Example inputs for a batch of two, and how each dimension that is not fixed follows the batch."""

    inputs: tuple[Tensor, ...]
    dynamic: tuple[dict[int, Any], ...]
    factors: tuple[dict[int, int], ...]


def shapes_of(source: Source, image: Any, name: str) -> Shapes:
    """What the network gets for two pictures, and which dimensions follow the number of pictures.

    Raises:
        StartupError: none does, or it does so in another way than as a multiple.
    """
    two, three = (source.inputs([image] * count) for count in PAIR)
    batch = torch.export.Dim("batch", min=1)
    factors: list[dict[int, int]] = []
    for small, large in zip(two, three, strict=True):
        grown = {at: b - a for at, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b}
        if any(small.shape[at] != 2 * by for at, by in grown.items()):
            raise StartupError(
                f"module: self.model of {name!r} gets {list(small.shape)} for two pictures and {list(large.shape)} for "
                "three; to be exported its batch dimension must be a multiple of the pictures"
            )
        factors.append(grown)
    if not any(factors):
        raise StartupError(
            f"module: self.model of {name!r} gets {[list(each.shape) for each in two]} however many pictures come; "
            "to be exported it must be called with the whole batch"
        )
    dynamic = tuple({at: batch if by == 1 else by * batch for at, by in each.items()} for each in factors)
    return Shapes(two, dynamic, tuple(factors))
