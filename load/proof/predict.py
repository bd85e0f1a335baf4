"""What the planner says of the proof's workers, from what one of them was measured to do with single messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from load.proof.module import EACH_S, FIXED_S
from load.proof.world import HEIGHT, WIDTH
from numpy.typing import NDArray

from cvworker.plan.autoscaler import Scaling
from cvworker.plan.capacity import BatchCurve, Worker
from cvworker.plan.simulate import Outcome, Simulation
from cvworker.plan.traffic import Images, Latency, Traffic

BATCH_SIZE, MAX_WAIT_S = 8, 0.02
"""The worker's defaults."""
MEGAPIXELS = WIDTH * HEIGHT / 1e6
REPEATS = 20
"""Simulations, each with another chance of who receives what; the prediction is their median."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """From single messages with one worker: what is not the device's, seconds."""

    lone_s: float
    """Median from intended to answered."""
    preprocess_s: float
    download_s: float

    @property
    def overhead_s(self) -> float:
        """Sending, SQS, hand-overs and the callback: what is left of a lone message's time."""
        return max(0.0, self.lone_s - MAX_WAIT_S - FIXED_S - EACH_S - self.preprocess_s - self.download_s)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Images a second, and percentiles in seconds."""

    images_s: float
    p50_s: float
    p95_s: float


def the_worker(found: Calibration) -> tuple[Traffic, Worker]:
    """The proof's worker and its pictures, in the planner's terms."""
    worker = Worker(
        BatchCurve.line(FIXED_S, EACH_S),
        batch_size=BATCH_SIZE,
        max_wait_s=MAX_WAIT_S,
        ahead=0,
        vcpus=1.0,
        decode_s=found.preprocess_s,
        decode_megapixels=MEGAPIXELS,
        io_cpu_s=1e-4,
        model_cpu_s=1e-4,
        network_bytes_s=1e9,
        overhead_s=found.overhead_s,
    )
    traffic = Traffic(1.0, images=(Images(20_000, MEGAPIXELS),), host=Latency(found.download_s), callback=Latency(0.0))
    return traffic, worker


def predict(found: Calibration, workers: int, arrivals: Floats, seconds: float) -> Prediction:
    """What so many workers make of exactly these arrivals."""
    traffic, worker = the_worker(found)
    runs: list[Outcome] = [
        Simulation(traffic, worker, Scaling(workers, workers), seed=seed, seconds=seconds, arrivals=arrivals).run()
        for seed in range(REPEATS)
    ]
    return Prediction(
        images_s=float(np.median([run.achieved for run in runs])),
        p50_s=float(np.median([run.percentile(0.5) for run in runs])),
        p95_s=float(np.median([run.percentile(0.95) for run in runs])),
    )


def pace(found: Calibration) -> float:
    """Images a second of one worker at most, as the planner sees it."""
    traffic, worker = the_worker(found)
    return worker.pace(traffic)
