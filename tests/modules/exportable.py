"""Modules that keep a network in self.model, some of which no exporter can follow."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn

from cvworker import Module

SIDE = 32


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.conv(images).relu())

    def classify(self, maps: Tensor) -> Tensor:
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class Branches(Small):
    def classify(self, maps: Tensor) -> Tensor:
        if maps.mean() > 0.5:
            maps = -maps
        return super().classify(maps)


class Numpy(Small):
    def classify(self, maps: Tensor) -> Tensor:
        spectrum = numpy.fft.fft(maps.detach().numpy())
        return super().classify(torch.from_numpy(spectrum.real).float())


class Loops(Small):
    def classify(self, maps: Tensor) -> Tensor:
        return torch.stack([super(Loops, self).classify(each[None])[0] for each in maps])


class Rare(Small):
    def forward(self, images: Tensor) -> Tensor:
        values = torch.linalg.eigvals(images[:, :, :8, :8])
        return super().forward(images) + values.real.mean((1, 2))[:, None]


class Keeps(Module):
    """A user's module: its network takes normalised floats and gives four logits."""

    name = "keeps"
    network: ClassVar[type[nn.Module]] = Small

    def setup(self, device: torch.device) -> None:
        self.model: Any = self.network().eval().to(device)

    def preprocess(self, image: Tensor) -> Tensor:
        return nn.functional.interpolate(image[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]

    def process(self, batch: Tensor) -> list[dict[str, Any]]:
        return [{"scores": row} for row in self.model(batch.float() / 255 - 0.5).tolist()]


class KeepsBranches(Keeps):
    network = Branches


class KeepsNumpy(Keeps):
    network = Numpy


class KeepsLoops(Keeps):
    network = Loops


class KeepsRare(Keeps):
    network = Rare


class KeepsNothing(Keeps):
    def setup(self, device: torch.device) -> None:
        self.secret = self.network().eval()

    def process(self, batch: Tensor) -> list[dict[str, Any]]:
        return [{"scores": row} for row in self.secret(batch.float()).tolist()]


class OneByOne(Keeps):
    def process(self, batch: Tensor) -> list[dict[str, Any]]:
        return [{"scores": self.model(each[None].float() / 255)[0].tolist()} for each in batch]


class Loads(Keeps):
    """As docs/export.md has it: the exported network in place of the one that was trained."""

    def setup(self, device: torch.device) -> None:
        from cvworker.modules.networks import load_network

        if self.weights is None:
            super().setup(device)
        else:
            self.model = load_network(self.weights, device)
