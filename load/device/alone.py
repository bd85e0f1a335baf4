"""The limits: the network alone on data that is on the device, and decoding alone, on the CPU's cores and the device.

Each is measured in a process of its own: ``python -m load.device.alone model cuda resnet50 32 auto auto 5`` prints
images a second as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from load.compare.contenders import ROOT
from load.compare.limit import measure_limit

TIME_LIMIT_S = 420.0
CPU_DECODE, DEVICE_DECODE, MODEL = "decode on the CPU", "decode on the device", "network"
DECODED_TOGETHER = 64


class NotMeasured(Exception):
    """A limit that this machine does not have; the message says why."""


@dataclass(frozen=True, slots=True)
class Alone:
    """What one part reaches by itself, and how."""

    name: str
    images_s: float
    batch: int | None = None
    optimize: str | None = None
    how: str = ""


def decode_on_cpu(seconds: float) -> Alone:
    """On all cores, to no less than 224 pixels a side, with the resize."""
    return Alone(CPU_DECODE, measure_limit("min-side", seconds).images_s, how="all cores, scaled decoding and resize")


def decode_on_device(device: str, seconds: float) -> Alone:
    """A batch at a time, with the resize of each picture. Raises NotMeasured."""
    return _measure("decode", device, str(seconds))


def network(device: str, name: str, batch: int, optimize: str, precision: str, seconds: float) -> Alone:
    """On a batch that is on the device, in the form that the worker would choose. Raises NotMeasured."""
    return _measure("model", device, name, str(batch), optimize, precision, str(seconds))


def _measure(*arguments: str) -> Alone:
    command = [sys.executable, "-m", "load.device.alone", *arguments]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"{arguments[0]}: not within {TIME_LIMIT_S:.0f} s") from None
    if found.returncode:
        raise NotMeasured(f"{arguments[0]}: {(found.stderr.strip().splitlines() or ['it ended'])[-1]}")
    return Alone(**json.loads(found.stdout.splitlines()[-1]))


def _pace(work: Callable[[], int], seconds: float) -> float:
    """Images/s of ``work``, which waits for the device and tells how many images it did."""
    for _ in range(2):
        work()
    began, images = time.monotonic(), 0
    while (elapsed := time.monotonic() - began) < seconds:
        images += work()
    return images / elapsed


def _model(device: str, name: str, batch: str, optimize: str, precision: str, seconds: str) -> Alone:
    import os

    os.environ["LOAD_NETWORK"] = name
    import torch
    from load.compare.modules import Network
    from load.compare.task import SIDE

    from cvworker.model.batcher import Sample
    from cvworker.model.optimize import network_of
    from cvworker.model.precision import PRECISIONS, tune
    from cvworker.model.runner import Runner

    size, where = int(batch), torch.device(device)
    module = Network()
    module.setup(where)
    pictures = torch.randint(0, 256, (size, 3, SIDE, SIDE), dtype=torch.uint8)
    samples = [Sample(n, picture, 0.0) for n, picture in enumerate(pictures)]
    runner = Runner(module, where, "fp32", size)
    setup, _ = tune(runner, samples, network_of(module), where, precision=precision, optimize=optimize)
    resident, dtype = pictures.to(where), PRECISIONS[runner.precision]

    def work() -> int:
        with torch.inference_mode(), torch.autocast(where.type, dtype=dtype, enabled=dtype is not None):
            return len(module.process(resident))

    return Alone(MODEL, _pace(work, float(seconds)), size, optimize, str(setup))


def _decode(device: str, seconds: str) -> Alone:
    import torch
    from load.compare.pictures import pictures
    from load.compare.task import preprocess

    from cvworker.model.decoding import decoder_for

    where = torch.device(device)
    decode = decoder_for(where)
    if decode is None:
        sys.exit(f"nothing decodes on {device}")
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in pictures(DECODED_TOGETHER)]

    def work() -> int:
        for image in decode(files):
            preprocess(image)
        torch.cuda.synchronize(where)
        return len(files)

    return Alone(DEVICE_DECODE, _pace(work, float(seconds)), len(files), how="with the resize of each picture")


if __name__ == "__main__":
    print(json.dumps(asdict({"model": _model, "decode": _decode}[sys.argv[1]](*sys.argv[2:]))))
