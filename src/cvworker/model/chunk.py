"""Several samples that cross the process border together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cvworker.model.slabs import Place, Slabs


@dataclass(slots=True)
class Chunk:
    """Samples of one DataLoader process, and what failed there.

    Samples of one shape travel stacked, leaf by leaf, in a slab. Others travel as torch sends tensors.
    """

    numbers: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)
    slab: int | None = None
    places: list[Place] = field(default_factory=list)
    tree: Any = None
    failures: list[tuple[int, str, str]] = field(default_factory=list)

    def pack(self, slabs: Slabs, worker: int) -> Chunk:
        """Put the samples into a slab of ``worker``, where every leaf is a tensor of one shape and type."""
        if not self.samples:
            return self
        flat = [pytree.tree_flatten(sample) for sample in self.samples]
        tree = flat[0][1]
        leaves = [list(leaf) for leaf in zip(*(each for each, _ in flat), strict=False)]
        if not leaves or any(other != tree for _, other in flat) or not all(map(_alike, leaves)):
            return self
        written = slabs.write(worker, leaves)
        if written is not None:
            (self.slab, self.places), self.tree, self.samples = written, tree, []
        return self

    def unpack(self, slabs: Slabs | None, *, pin: bool) -> list[Any]:
        """The samples, in memory of their own; their slab is free again."""
        if self.slab is None or slabs is None:
            return self.samples
        leaves = slabs.read(self.slab, self.places, pin=pin)
        return [pytree.tree_unflatten([leaf[i] for leaf in leaves], self.tree) for i in range(len(self.numbers))]

    def pin_memory(self) -> Chunk:
        """Called by the DataLoader's pinning thread when the device is CUDA; a slab's samples are pinned when read."""
        self.samples = [
            pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.pin_memory(), sample) for sample in self.samples
        ]
        return self


def _alike(leaf: list[Any]) -> bool:
    """Whether these can be stacked byte by byte."""
    first = leaf[0]
    return all(
        isinstance(each, torch.Tensor)
        and each.layout is torch.strided
        and not each.is_quantized
        and (each.shape, each.dtype) == (first.shape, first.dtype)
        for each in leaf
    )
