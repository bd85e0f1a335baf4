"""Modules that tests run: what each does to a picture is known beforehand."""

from __future__ import annotations

import os
import time

import torch

from cvworker import Module


class Mean(Module):
    """The mean of each channel: tells which picture it saw."""

    name = "mean"

    def preprocess(self, image):
        return image.float().mean((1, 2))

    def process(self, batch):
        return [{"mean": [round(value) for value in row.tolist()]} for row in batch]


class Slow(Mean):
    """Takes a tenth of a second for each batch."""

    name = "slow"

    def process(self, batch):
        time.sleep(0.1)
        return super().process(batch)


class Poisonous(Mean):
    """What red pictures do in ``process``: 250 raises, 251 ends the process, 252 hangs, 253 gives NaN, 254 too few."""

    name = "poisonous"

    def process(self, batch):
        results = super().process(batch)
        for result in results:
            red = result["mean"][0]
            if red == 250:
                raise ValueError("this picture is too red")
            if red == 251:
                os.abort()
            if red == 252:
                time.sleep(3600)
            if red == 253:
                result["mean"] = float("nan")
            if red == 254:
                return results[:-1]
        return results


class BadPreprocess(Mean):
    """What green pictures do in ``preprocess``: 1 raises, 2 ends the process, 3 hangs."""

    name = "badpreprocess"

    def preprocess(self, image):
        green = int(image[1, 0, 0])
        if green == 1:
            raise ValueError("this picture is too green")
        if green == 2:
            os.abort()
        if green == 3:
            time.sleep(3600)
        return super().preprocess(image)


class Mixed(Module):
    """Samples of many shapes, and a tree of them."""

    name = "mixed"
    image_type = "pil"

    def preprocess(self, image):
        width, height = image.size
        return {"pixel": torch.tensor(image.getpixel((0, 0))), "size": (width, height), "row": torch.zeros(width)}

    def collate(self, samples):
        return samples

    def process(self, batch):
        return [{"pixel": s["pixel"].tolist(), "size": list(s["size"]), "row": len(s["row"])} for s in batch]


class TooFew(Mean):
    """Returns one result less than it should."""

    def process(self, batch):
        return super().process(batch)[:-1]


class NoProcess(Module):
    """Lacks ``process``."""

    def preprocess(self, image):
        return image


class NotAModule:
    """Does not extend Module."""
