"""A module that decodes on the device, in a process where a stand-in for nvJPEG takes the CPU for a device.

The stand-in decodes as devices do: chroma is not smoothed, and the transform is a fast one. By the colour of a
picture it fails as they may: red is refused, blue ends the process.
"""

from __future__ import annotations

import os

import simplejpeg
import torch

from cvworker import Module
from cvworker.model import decoding


def decode(files: list[torch.Tensor]) -> list[torch.Tensor]:
    images = [
        torch.from_numpy(simplejpeg.decode_jpeg(file.numpy(), fastdct=True, fastupsample=True)).permute(2, 0, 1)
        for file in files
    ]
    for image in images:
        red, green, blue = image.float().mean((1, 2)).tolist()
        if red > 200 and green < 50 and blue < 50:
            raise ValueError("this picture is too red")
        if blue > 200 and red < 50 and green < 50:
            os.abort()
    return images


class OnDevice(Module):
    """Tells the mean of each channel, and whether the picture was prepared in the process that runs ``process``."""

    decode_on_device = True

    def setup(self, device):
        decoding.decoder_for = lambda _device: decode

    def preprocess(self, image):
        if int(image[1, 0, 0]) > 250 and int(image[0, 0, 0]) < 50:
            raise ValueError("this picture is too green")
        return {"mean": image.float().mean((1, 2)), "corner": image[:, 0, 0].clone(), "process": os.getpid()}

    def process(self, batch):
        rows = zip(batch["mean"].tolist(), batch["corner"].tolist(), batch["process"].tolist(), strict=True)
        return [
            {"mean": [round(value) for value in mean], "corner": corner, "on_device": process == os.getpid()}
            for mean, corner, process in rows
        ]
