"""A module that waits, as for a device of its own: its pace does not hang on the cores of the machine."""

from __future__ import annotations

import time

from cvworker import Module


class Waiting(Module):
    """Takes 0.4 s for each batch."""

    name = "waiting"

    def preprocess(self, image):
        return image.float().mean((1, 2))

    def process(self, batch):
        time.sleep(0.4)
        return [{}] * len(batch)
