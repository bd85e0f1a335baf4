"""One run of the whole worker: what it reaches, how busy the device is, and where the time goes by its own metrics."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from load.compare.contenders import Contender
from load.compare.measure import Failed, Tell, worker, world
from load.compare.task import LOADS
from load.scenarios.watch import fetch, scrape

from cvworker.bench import tree
from cvworker.bench.world import pace
from cvworker.embedded.demo_worker import free_port

WARM_S, WARM_AT_MOST_S, WARM_BATCHES = 3.0, 15.0, 20
"""After the first answer: at least, at most, and the answers to wait for in between."""
MORE_AT_MOST_S = 60.0
"""For a window in which not even one batch was answered."""
START_S = {"off": 120.0, "auto": 120.0, "full": 300.0}
"""From its start to its first answer, at most; compiling takes minutes."""
LOOK_S = 0.2
ON_DEVICE = "baseline JPEGs are decoded on the device"
TUNED = "tuned"
STAGES = ("receive", "download", "preprocess", "process", "callback")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run is of."""

    device: str
    network: str
    decode: str
    """``cpu`` or ``device``."""
    optimize: str
    precision: str
    batch: int
    processes: int

    @property
    def title(self) -> str:
        return f"decode {self.decode}, optimize {self.optimize}, batch {self.batch}, processes {self.processes}"

    def contender(self, port: int) -> Contender:
        settings = {
            "DEVICE": self.device,
            "OPTIMIZE": self.optimize,
            "PRECISION": self.precision,
            "BATCH_SIZE": str(self.batch),
            "PROCESSES": str(self.processes),
            "HTTP_PORT": str(port),
        }
        module = "NetworkDecodingOnDevice" if self.decode == "device" else "Network"
        return Contender("cvworker", self.title, module=module, settings=settings)


@dataclass(slots=True)
class Sample:
    """One window of one run."""

    plan: Plan
    seconds: float
    answers: int
    images_s: float
    cpu_ms: float
    """CPU time of the worker's process tree per answer."""
    device_busy: list[int] | None
    """Percent, as the driver told it twice a second; None without one."""
    stage_ms: dict[str, float]
    """Mean duration per image or call, by stage."""
    to_device_ms: float
    """A batch's copy to the device, which runs while the batch before it computes."""
    stage_busy: dict[str, float]
    batch_mean: float
    precision: str
    tuned: str
    decoded_on: str
    preprocess_workers: int
    start_s: float
    pss_mb: float
    errors: int
    repeats: int
    expired: int
    restarts: int
    world_cpu_ms: float
    limits: dict[str, float] = field(default_factory=dict)
    """Images/s of the parts alone that this run cannot exceed, by name."""

    @property
    def busy(self) -> float | None:
        return sum(self.device_busy) / len(self.device_busy) if self.device_busy else None

    @property
    def ratio(self) -> float | None:
        """To the smallest of the limits."""
        return self.images_s / min(self.limits.values()) if self.limits else None


def measure(plan: Plan, seconds: float, tell: Tell) -> Sample:
    """Run the worker in a world of its own. Raises Failed where it does not work."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    load = LOADS["cpu"]  # no latencies: what is looked for is the machine's limit
    with world(load) as peer, worker(plan.contender(port), load, peer.base) as (process, log):

        def look() -> dict[str, float]:
            time.sleep(LOOK_S)
            if process.poll() is not None:
                raise Failed(f"it ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            try:
                return peer.counts()
            except (OSError, http.client.HTTPException) as error:
                ended = peer.process.poll()
                raise Failed(f"the world (queue, host, receiver) is silent, exit code {ended}: {error}") from None

        began = peer.counts()["at"]
        while not (now := look())["callbacks"]:
            tell(f"starting, {now['at'] - began:.0f} s")
            if now["at"] - began > START_S[plan.optimize]:
                raise Failed(f"it answered nothing in {START_S[plan.optimize]:.0f} s:\n{log.read_text()[-2000:]}")
        first, enough = now["at"], WARM_BATCHES * plan.batch * plan.processes
        while (warm := now["at"] - first) < WARM_S or (now["callbacks"] < enough and warm < WARM_AT_MOST_S):
            tell("warming up")
            now = look()
        with _device_busy(plan.device) as busy:
            before, metrics, cpu = now, scrape(url), sum(tree.cpu_seconds(process.pid).values())
            while (elapsed := now["at"] - before["at"]) < seconds or (
                now["callbacks"] - before["callbacks"] < plan.batch and elapsed < seconds + MORE_AT_MOST_S
            ):
                tell(f"{elapsed:.0f} of {seconds:.0f} s")
                now = look()
            cpu = sum(tree.cpu_seconds(process.pid).values()) - cpu
        after, text = scrape(url), log.read_text()
        model = json.loads(fetch(f"{url}status.json"))["model"]
        took = {name: value - before[name] for name, value in now.items() if not isinstance(value, str)}
        images_s = pace(before, now)
        answers = max(1.0, images_s * took["at"])
        return Sample(
            plan=plan,
            seconds=took["at"],
            answers=int(took["callbacks"]),
            images_s=images_s,
            cpu_ms=1000 * cpu / answers,
            device_busy=busy,
            stage_ms={name: 1000 * _mean(f"cvworker_stage_duration_seconds {name}", metrics, after) for name in STAGES},
            to_device_ms=1000 * _mean("cvworker_to_device_seconds", metrics, after),
            stage_busy={name: after.get(f"cvworker_stage_busy_ratio {name}", 0.0) for name in STAGES},
            batch_mean=_mean("cvworker_batch_size", metrics, after),
            precision=model["precision"],
            tuned=_chosen(text),
            decoded_on="device" if ON_DEVICE in text else "cpu",
            preprocess_workers=model["preprocess_workers"],
            start_s=first - began,
            pss_mb=tree.pss_bytes(process.pid) / 2**20,
            errors=int(now["errors"]),
            repeats=int(now["repeats"]),
            expired=int(now["expired"]),
            restarts=int(after.get("cvworker_model_restarts_total", 0)),
            world_cpu_ms=1000 * took["cpu"] / answers,
        )


@contextmanager
def _device_busy(device: str) -> Iterator[list[int] | None]:
    """The share of time in which the device ran a kernel, as nvidia-smi tells it while the block runs."""
    program = shutil.which("nvidia-smi")
    if device == "cpu" or program is None:
        yield None
        return
    index = device.partition(":")[2] or "0"
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500", "-i", index]
    process = subprocess.Popen([program, *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: list[int] = []
    assert process.stdout is not None
    lines = process.stdout
    reader = threading.Thread(target=lambda: found.extend(int(line) for line in lines if line.strip().isdigit()))
    reader.start()
    try:
        yield found
    finally:
        process.terminate()
        process.wait()
        reader.join()


def _mean(name: str, before: dict[str, float], after: dict[str, float]) -> float:
    """Of a histogram, between the two."""
    name, space, label = name.partition(" ")
    keys = (f"{name}_sum{space}{label}", f"{name}_count{space}{label}")
    total, count = (after.get(key, 0.0) - before.get(key, 0.0) for key in keys)
    return total / count if count else 0.0


def _chosen(log: str) -> str:
    """The form of the network that the worker chose at its start; nothing where there was no choice."""
    lines = (json.loads(line) for line in log.splitlines() if line.startswith("{") and TUNED in line)
    return next((line["chosen"] for line in lines if line["event"] == TUNED), "")
