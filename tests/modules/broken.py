"""Modules of which one hook is wrong, each in a way that people get wrong."""

from __future__ import annotations

import torch

from modules.mean import Mean


class BadExample(Mean):
    def example(self):
        return "example.jpg"


class BadPreprocess(Mean):
    def preprocess(self, image):
        return image.permute(1, 2, 0).resize(64, 64)


class BadCollate(Mean):
    def collate(self, samples):
        return torch.stack(samples, 5)


class BadProcess(Mean):
    def process(self, batch):
        return [{"mean": row} for row in batch]


class ManySizes(Mean):
    """Batches of the example go well, and those of pictures of different sizes would not."""

    def preprocess(self, image):
        return image.float()

    def process(self, batch):
        return super().process(batch.mean((2, 3)))


class DislikesNoise(Mean):
    """Its own example is no picture of what it is for."""

    def preprocess(self, image):
        if image[0, 0, 0] != image[0, -1, -1]:
            raise ValueError("there is nothing in this picture")
        return super().preprocess(image)
