"""Which of torchvision's networks a state dict is of: told by the names and shapes of its tensors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models
import torchvision.models.detection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cvworker.modules.detectors import ASSEMBLED, FAMILIES
from cvworker.modules.weighted import COUNTER

DETECTION = torchvision.models.detection
COCO_OUTPUTS = 91
"""Of torchvision's own detectors."""
PROBE = 1237
"""A number of outputs that no other size of a network happens to be: it shows which tensors have one row for each."""


@dataclass(frozen=True)
class Usual:
    """What torchvision's own weights of an architecture were made with: sides in pixels, mean and std for 0 to 1.

    ``max_size`` is of detectors that keep the picture's shape: its longer side at most.
    """

    categories: tuple[str, ...]
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_size: int | None = None


def recognise(tensors: Mapping[str, Tensor], classes: int | None) -> str | None:
    """The architecture whose names and shapes these are, or None; takes seconds.

    ``classes`` is the number of outputs: without it a classifier's are counted, and a detector's are COCO's.
    """
    parts = {name.partition(".")[0] for name in tensors}
    for _, family in itertools.groupby(names(), key=_family):
        for number, name in enumerate(family):
            if number == 0 and {each.partition(".")[0] for each in _shapes(name)} != parts:
                break  # those of one family have the same parts, and there are five times fewer families
            if _fits(name, classes or outputs_of(name, tensors) or COCO_OUTPUTS, tensors):
                return name
    return None


def outputs_of(name: str, tensors: Mapping[str, Tensor]) -> int | None:
    """How many outputs the tensors of a classifier are for; a detector's do not say."""
    if is_detector(name):
        return None
    head = next((each for each, shape in _shapes(name).items() if shape[:1] == (PROBE,)), "")
    return tensors[head].shape[0] if head in tensors and tensors[head].dim() else None


def names() -> list[str]:
    """Every architecture that the built-in modules load."""
    detectors = (name for name in torchvision.models.list_models(module=DETECTION) if name.startswith(FAMILIES))
    return [*torchvision.models.list_models(module=torchvision.models), *detectors, *ASSEMBLED]


def is_detector(name: str) -> bool:
    """Whether it finds boxes rather than one label for a picture."""
    return name in ASSEMBLED or name in torchvision.models.list_models(module=DETECTION)


def usual(name: str) -> Usual | None:
    """What torchvision's own weights were made with; None where it has none."""
    try:
        weights: Any = torchvision.models.get_model_weights(name)["DEFAULT"]
    except (ValueError, KeyError):
        return None
    categories = tuple(weights.meta.get("categories", ()))
    if is_detector(name):
        own: Any = _model(name, len(categories)).transform
        stretched = getattr(own, "fixed_size", None)
        size = stretched[0] if stretched else min(own.min_size)
        return Usual(categories, size, tuple(own.image_mean), tuple(own.image_std), None if stretched else own.max_size)
    transforms: Any = weights.transforms()
    return Usual(categories, transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def _model(name: str, classes: int) -> nn.Module:
    if name in ASSEMBLED:
        return ASSEMBLED[name](classes)
    options = {"weights_backbone": None} if is_detector(name) else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    return network


class _WithoutMemory(TorchFunctionMode):
    """Parameters are made on the meta device, which has shapes and no values: nothing is filled, nothing is copied."""

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


@functools.cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of an architecture, where it has :data:`PROBE` outputs."""
    # Detectors run their backbone once to see what comes out of it: they need values.
    mode = contextlib.nullcontext() if is_detector(name) else _WithoutMemory()
    with warnings.catch_warnings(), mode:
        warnings.simplefilter("ignore")  # some speak of initial values
        return {each: tuple(tensor.shape) for each, tensor in _model(name, PROBE).state_dict().items()}


def _family(name: str) -> str:
    return re.sub(r"[\d_].*", "", name)


def _fits(name: str, outputs: int, tensors: Mapping[str, Tensor]) -> bool:
    found = {each: tuple(tensor.shape) for each, tensor in tensors.items() if not each.endswith(COUNTER)}
    shapes = {each: shape for each, shape in _shapes(name).items() if not each.endswith(COUNTER)}
    return shapes.keys() == found.keys() and all(
        found[each] == tuple(size // PROBE * outputs if size % PROBE == 0 else size for size in shape)  # RetinaNet: 9 n
        for each, shape in shapes.items()
    )
