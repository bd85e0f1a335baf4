"""What the model process is told at its start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Settings of the model process: no address, credential or secret is among them."""

    module: str
    weights: str | None
    device: str
    precision: str
    batch_size: int
    max_wait_ms: float
    preprocess_workers: int
    max_image_pixels: int
    stall_timeout: float
    arena_size: int
    log_format: str
    log_level: str
    optimize: str = "off"
    with_example: bool = False
    """Whether ``ready`` brings a report on every hook, for ``cvworker check``."""
    auto_batch: bool = False
    """Whether the process is to find the best batch size; ``batch_size`` is only what it begins with."""
    picture: str | None = None
    """The image file for that report; the module's example without one."""

    @property
    def chunk(self) -> int:
        """Images that cross the DataLoader's border together, at most."""
        return min(self.batch_size, 8)

    @property
    def window(self) -> int:
        """Images the model process holds at most: one batch computing, one on its way to the device, one forming,
        and a chunk in the making on each DataLoader process with one more to take up."""
        return 3 * self.batch_size + 2 * self.chunk * max(1, self.preprocess_workers)

    @property
    def plenty(self) -> int:
        """Images with which the process has work for some time: a batch, and four for each DataLoader process."""
        return self.batch_size + 4 * max(1, self.preprocess_workers)

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def load(cls, data: bytes) -> ModelConfig:
        return cls(**json.loads(data))
