"""Shared memory in which samples leave the DataLoader's processes: written once, used again and again.

torch would make a shared file for every chunk, pass its descriptor over a socket and fault in each of its pages: a
third of a millisecond an image. A slab is there already; only its number travels.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

SLAB_BYTES = 16 * 2**20
"""Room for one chunk. The file is sparse: only what is written takes memory. A larger chunk goes torch's own way."""
SLABS_EACH = 4
"""For each process: two chunks that the loader asked for, one being made and one being taken."""
ALIGNMENT = 64

Place = tuple[int, tuple[int, ...], torch.dtype]
"""Where a stacked leaf lies in its slab: offset, shape and type."""


class Slabs:
    """Slabs for ``workers`` processes, each of which writes to its own; the reader frees them.

    A slab's flag is one byte: its writer sets it, its reader clears it, and neither touches the slab when it is not
    its turn. Pickles only to a process being started.
    """

    def __init__(self, workers: int, fd: int | None = None) -> None:
        self._workers = workers
        self._count = workers * SLABS_EACH
        self.fd = os.memfd_create("cvworker-samples") if fd is None else fd
        size = self._count * SLAB_BYTES + mmap.PAGESIZE
        if fd is None:
            os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._taken = self._bytes[self._count * SLAB_BYTES :]

    def __getstate__(self) -> dict[str, Any]:
        return {"workers": self._workers, "fd": reduction.DupFd(self.fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["workers"], state["fd"].detach())  # type: ignore[misc]

    def __del__(self) -> None:
        os.close(self.fd)  # the mapping stays for as long as something is seen through it

    def write(self, worker: int, leaves: list[list[torch.Tensor]]) -> tuple[int, list[Place]] | None:
        """Stack each leaf, given sample by sample, into a free slab of ``worker``; None where there is no room."""
        places, end = [], 0
        for samples in leaves:
            shape = (len(samples), *samples[0].shape)
            places.append((end, shape, samples[0].dtype))
            end += -(-samples[0].nbytes * len(samples) // ALIGNMENT) * ALIGNMENT
        own = range(worker * SLABS_EACH, (worker + 1) * SLABS_EACH)
        slab = next((n for n in own if not self._taken[n]), None)
        if end > SLAB_BYTES or slab is None:
            return None
        for samples, place in zip(leaves, places, strict=True):
            for to, sample in zip(self._view(slab, place), samples, strict=True):
                _copy(to, sample)
        self._taken[slab] = 1
        return slab, places

    def read(self, slab: int, places: list[Place], *, pin: bool) -> list[torch.Tensor]:
        """The stacked leaves, in memory of their own (pinned where ``pin``); the slab is free again."""
        leaves = [self._copy_of(slab, place, pin=pin) for place in places]
        self._taken[slab] = 0
        return leaves

    def _copy_of(self, slab: int, place: Place, *, pin: bool) -> torch.Tensor:
        view = self._view(slab, place)
        if pin:
            return torch.empty_like(view, pin_memory=True).copy_(view)
        if not view.nbytes:
            return view
        # By numpy, whatever the type: torch would do this with threads, on the cores that compute.
        at = slab * SLAB_BYTES + place[0]
        return torch.from_numpy(self._bytes[at : at + view.nbytes].copy()).view(view.dtype).view(view.shape)

    def _view(self, slab: int, place: Place) -> torch.Tensor:
        offset, shape, dtype = place
        count = 1
        for side in shape:
            count *= side
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=slab * SLAB_BYTES + offset).view(shape)


def _copy(to: torch.Tensor, sample: torch.Tensor) -> None:
    """numpy copies turned images, which most samples are, twice as fast as torch, but does not know all types."""
    try:
        np.copyto(to.numpy(), sample.numpy())
    except (TypeError, RuntimeError):
        to.copy_(sample)
