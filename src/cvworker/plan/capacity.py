"""What one worker can do: the time a batch takes, decoding, the network, and which of them is the limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cvworker.tuning import LEAST_DOWNLOADS, MOST_DOWNLOADS, NUM_QUEUES, preprocess_workers, queue_limit

if TYPE_CHECKING:
    from cvworker.plan.traffic import Traffic

CALLBACKS = 64
"""``callback_concurrency``."""
DOWNLOADS_TAKEN = 2
"""Jobs in hand for each download under way."""
RECEIVE_THREADS, RECEIVE_BATCH = 3, 10
RECEIVE_S = 0.015
"""A ReceiveMessage call in the same region; for the limit only."""
STAGED_AHEAD = 2
"""Batches ready for a CUDA device while another computes: one waits in its queue, one is being handed over."""
IO_CPU_S = 0.0016
"""CPU seconds of the I/O process for an image (docs/performance.md)."""
MODEL_CPU_S = 0.0003
"""CPU seconds of the model process for an image beside the network (docs/performance.md)."""
ONE_PROCESS = 0.85
"""Share of a core that one Python process can use: its threads take turns."""


@dataclass(frozen=True)
class BatchCurve:
    """Seconds that batches take on the device: straight lines between what was measured.

    Below the smallest size that was measured a batch takes as long as that one; above the largest, time grows as
    between the last two, or in proportion where there is one only.
    """

    points: tuple[tuple[int, float], ...]
    """Batch sizes, ascending, and seconds."""

    @classmethod
    def line(cls, fixed_s: float, each_s: float, largest: int = 1024) -> BatchCurve:
        """``fixed_s + each_s x size``."""
        return cls(((1, fixed_s + each_s), (largest, fixed_s + each_s * largest)))

    def table(self, largest: int) -> list[float]:
        """Seconds for batches of 0 (which is 0), 1, … ``largest``."""
        sizes, seconds = [float(size) for size, _ in self.points], [each for _, each in self.points]
        if len(sizes) == 1:
            slope = seconds[0] / sizes[0]
        else:
            slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        wanted = np.arange(1, largest + 1, dtype=np.float64)
        found = np.interp(wanted, sizes, seconds) + slope * np.maximum(0.0, wanted - sizes[-1])
        return [0.0, *found.tolist()]

    def seconds(self, size: int) -> float:
        return self.table(size)[size]


@dataclass(frozen=True)
class Worker:
    """One task on its share of a machine: the device, the cores and the network that it has for itself."""

    curve: BatchCurve
    batch_size: int = 8
    max_wait_s: float = 0.02
    on_gpu: bool = True
    ahead: int = STAGED_AHEAD
    """Batches that are formed while another computes; 0 on the CPU."""
    vcpus: float = 4.0
    decode_s: float = 0.003
    """CPU seconds to decode and preprocess an image of ``decode_megapixels``; other sizes in proportion."""
    decode_megapixels: float = 0.7
    io_cpu_s: float = IO_CPU_S
    model_cpu_s: float = MODEL_CPU_S
    network_bytes_s: float = 0.6e9
    overhead_s: float = 0.015
    """What is not modelled by itself: SQS's own time, hand-overs between processes, sending the answer."""
    max_queue_size: int | None = None
    """None: as ``auto`` sets it."""
    visibility_s: float = 60.0
    measured: float | None = None
    """Images a second that a load test has seen at most, all bounds together."""
    label: str = ""
    """How it was measured: precision and format."""

    @cached_property
    def batch_table(self) -> list[float]:
        """Seconds of a batch of so many images, as the device is busy with it."""
        shared = 0.0 if self.on_gpu else (self.decode_s + self.io_cpu_s + self.model_cpu_s) / self.vcpus
        return [seconds + shared * size for size, seconds in enumerate(self.curve.table(self.batch_size))]

    @property
    def preprocess_servers(self) -> int:
        """DataLoader processes that run at the same time."""
        return max(1, min(preprocess_workers(max(1, int(self.vcpus)), self.processes), int(self.vcpus))) * (
            self.processes
        )

    @cached_property
    def processes(self) -> int:
        """Pipelines (``processes``), so that no Python process is the limit before the cores are."""
        device = self.batch_size / self.batch_table[-1]
        cores = self.vcpus / self.cpu_s(self.decode_megapixels)
        wanted = min(device, cores) * self.io_cpu_s / ONE_PROCESS
        return max(1, min(int(np.ceil(wanted - 0.1)), int(self.vcpus // 2)))

    def cpu_s(self, megapixels: float) -> float:
        """CPU seconds of an image, all processes together, but for a network that runs on the CPU."""
        return self.decode_s * megapixels / self.decode_megapixels + self.io_cpu_s + self.model_cpu_s

    def decode_seconds(self, megapixels: float) -> float:
        """How long a DataLoader process has an image, so that all of them together leave the others their cores."""
        alone = self.decode_s * megapixels / self.decode_megapixels
        return max(alone, self.preprocess_servers * self.cpu_s(megapixels) / self.vcpus) if self.on_gpu else alone

    def bounds(self, traffic: Traffic) -> dict[str, float]:
        """Images a second that each part could do by itself."""
        megapixels = traffic.mean_megapixels
        found = {"pace as measured": self.measured} if self.measured else {}
        found |= {
            "GPU" if self.on_gpu else "CPU: network and decoding": self.batch_size / self.batch_table[-1],
            "vCPU: decoding": self.preprocess_servers / self.decode_seconds(megapixels),
            "vCPU: one Python process": self.processes * ONE_PROCESS / self.io_cpu_s,
            "network": self.network_bytes_s / max(traffic.mean_bytes, 1.0),
            "downloads at once": MOST_DOWNLOADS * self.processes / max(self.download_s(traffic), 1e-9),
            "callbacks at once": CALLBACKS * self.processes / max(traffic.callback.mean_s, 1e-9),
            "SQS receive calls": RECEIVE_THREADS * RECEIVE_BATCH * self.processes / RECEIVE_S,
        }
        if self.max_queue_size is not None:
            found["max_queue_size"] = self.held(traffic) / self.lone_s(traffic)
        return found

    def pace(self, traffic: Traffic) -> float:
        """Images a second with full batches."""
        return min(self.bounds(traffic).values())

    def bound(self, traffic: Traffic) -> str:
        """What the pace hangs on."""
        bounds = self.bounds(traffic)
        return min(bounds, key=lambda name: bounds[name])

    def paced(self, traffic: Traffic) -> Worker:
        """The same worker, no faster than a load test saw it: its batches take so much longer."""
        rest = min(rate for name, rate in self.bounds(traffic).items() if name != "pace as measured")
        if not self.measured or self.measured >= rest:
            return self
        device = self.batch_size / self.batch_table[-1]
        longer = device / self.measured
        points = tuple((size, seconds * longer) for size, seconds in self.curve.points)
        return replace(self, curve=BatchCurve(points))

    def download_s(self, traffic: Traffic) -> float:
        return traffic.host.mean_s + traffic.mean_bytes / self.network_bytes_s

    def lone_s(self, traffic: Traffic) -> float:
        """Seconds from sent to answered for an image that is alone, with a full batch's time on the device."""
        decode = self.decode_seconds(traffic.mean_megapixels)
        steps = self.download_s(traffic) + decode + self.batch_table[-1] + traffic.callback.mean_s
        return self.overhead_s + steps

    def least_s(self, traffic: Traffic) -> float:
        """The shortest time that any image could take: nothing waits, and the batch is one image."""
        decode = self.decode_s * min(each.megapixels for each in traffic.images) / self.decode_megapixels
        return self.overhead_s + decode + min(self.batch_table[1:])

    def queue_size(self, traffic: Traffic) -> int:
        """``max_queue_size``: as given, or what ``auto`` comes to at full pace."""
        if self.max_queue_size is not None:
            return self.max_queue_size
        pace = min(rate for name, rate in self.bounds(traffic).items())
        return queue_limit(
            pace / self.processes,
            visibility=self.visibility_s,
            batch_size=self.batch_size,
            downloads=self._downloads(pace, traffic),
        )

    def held(self, traffic: Traffic) -> int:
        """Messages that one task holds at most: three queues, downloads in hand, and what the model process has."""
        chunk = min(self.batch_size, 8)
        window = 3 * self.batch_size + 2 * chunk * self.preprocess_servers // self.processes
        if self.max_queue_size is not None:
            queues, downloads = self.max_queue_size * NUM_QUEUES, LEAST_DOWNLOADS
        else:
            queues = self.queue_size(traffic) * NUM_QUEUES
            downloads = self._downloads(self.pace(traffic), traffic)
        return self.processes * (queues + DOWNLOADS_TAKEN * downloads + window)

    def _downloads(self, pace: float, traffic: Traffic) -> int:
        wanted = pace / self.processes * self.download_s(traffic)
        return int(min(MOST_DOWNLOADS, max(LEAST_DOWNLOADS, np.ceil(wanted))))
