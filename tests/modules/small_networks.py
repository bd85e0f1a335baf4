"""Modules around networks, for what profiles them: small, with random weights."""

from __future__ import annotations

import torch
import torchvision.models
from torch import nn

from cvworker import Module

SIDE = 32


class ResNet(Module):
    """ResNet-18 at 32 pixels."""

    name = "resnet"
    architecture = "resnet18"

    def setup(self, device):
        torch.manual_seed(0)
        self.model = torchvision.models.get_model(self.architecture, weights=None, num_classes=3).eval().to(device)

    def preprocess(self, image):
        return torch.nn.functional.interpolate(image[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]

    def process(self, batch):
        return [{"scores": row} for row in self.model(batch.float() / 255).float().softmax(1).tolist()]


class MobileNet(ResNet):
    """MobileNet v3 at 32 pixels."""

    name = "mobilenet"
    architecture = "mobilenet_v3_small"


class Sharper(Module):
    """Image to image: one convolution over a picture of any size, of which the result is the mean."""

    name = "sharper"

    def setup(self, device):
        torch.manual_seed(0)
        self.model = nn.Conv2d(3, 3, 3).eval().to(device)

    def preprocess(self, image):
        return image.float() / 255

    def process(self, batch):
        return [{"mean": image.mean().item()} for image in self.model(batch)]


class Parts(Sharper):
    """Keeps two networks in one, and calls one of them."""

    name = "parts"

    def setup(self, device):
        super().setup(device)
        self.model = nn.ModuleDict({"sharper": self.model, "other": nn.Linear(1, 1)})

    def process(self, batch):
        return [{"mean": image.mean().item()} for image in self.model["sharper"](batch)]


class Greedy(Sharper):
    """Takes 64 MiB for each image, for as long as its batch runs."""

    name = "greedy"

    def preprocess(self, image):
        return torch.zeros(1)

    def setup(self, device):
        self.model = Taker()

    def process(self, batch):
        return [{"sum": each} for each in self.model(batch).tolist()]


class Taker(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return torch.ones(len(batch), 16 * 2**20).sum(1)
