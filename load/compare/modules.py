"""The same work as cvworker's modules: at full size, or naming the side that it needs; with a model or without."""

from __future__ import annotations

import torch
from load.compare.task import SIDE, Results, classify, make_model, mean, preprocess, resnet

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
