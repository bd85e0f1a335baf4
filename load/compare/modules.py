"""The same work as cvworker's modules: at full size, or naming the side that it needs; with a model or without."""

from __future__ import annotations

import os

import torch
from load.compare.task import MEAN, SEED, SIDE, STD, Results, classify, make_model, mean, preprocess, resnet

from cvworker import Module


class FullSize(Module):
    """Sees every picture at its own size."""

    name = "compare"

    def setup(self, device: torch.device) -> None:
        make_model("cpu")  # as the reference workers do: a mean is not shared out over threads

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        return preprocess(image)

    def process(self, batch: torch.Tensor) -> Results:
        return mean(batch)


class MinSide(FullSize):
    """Lets decoders skip pixels that the resize would drop."""

    name = "compare"
    min_side = SIDE


class ResNet(FullSize):
    """ResNet-50, every picture at its own size."""

    name = "compare"

    def setup(self, device: torch.device) -> None:
        self.model = resnet().to(device)

    def process(self, batch: torch.Tensor) -> Results:
        return classify(self.model, batch)


class ResNetMinSide(ResNet):
    """ResNet-50, decoders may skip pixels."""

    name = "compare"
    min_side = SIDE


class Small(FullSize):
    """ResNet-18 on the CPU: what start and memory are told of."""

    name = "compare"

    def setup(self, device: torch.device) -> None:
        from torchvision.models import resnet18

        self.model = resnet18().eval().to(device)

    def process(self, batch: torch.Tensor) -> Results:
        return classify(self.model, batch)


class Network(FullSize):
    """A torchvision classifier with seeded weights, its name in ``LOAD_NETWORK``: what ``load.device`` measures.

    One copy brings the results back, and nothing else waits for the device.
    """

    name = "compare"
    min_side = SIDE

    def setup(self, device: torch.device) -> None:
        from torchvision.models import get_model

        torch.manual_seed(SEED)
        self.model = get_model(os.environ["LOAD_NETWORK"]).eval().to(device)
        self._mean, self._std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def process(self, batch: torch.Tensor) -> Results:
        best = self.model((batch.float() - self._mean) / self._std).float().softmax(1).max(1)
        rows = torch.stack([best.values, best.indices.float()], 1).tolist()
        return [{"class": int(index), "score": score} for score, index in rows]


class NetworkDecodingOnDevice(Network):
    """The same, and the device decodes as well."""

    name = "compare"
    decode_on_device = True
