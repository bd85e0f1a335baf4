"""One measurement: what is around a worker, the worker of a rung, warm-up, a window, and the end of every message."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvworker.bench import tree
from cvworker.bench.gpu import Gpu
from cvworker.bench.results import Sample
from cvworker.bench.rungs import Rung
from cvworker.bench.world import QUEUE, SECRET
from cvworker.embedded.demo_worker import DemoWorker, environment
from cvworker.errors import WorkerFailed
from cvworker.settings import Settings

START_S = 300.0
"""To the first answer: models may be large, and ``optimize: full`` takes minutes."""
WARM_S, WARM_MOST_S, WARM_ANSWERS = 3.0, 10.0, 100
"""After the first answer: at least, and at most where answers are too few to wait for."""
END_S = 60.0
"""For the answers to what was given out, after the window."""
LOOK_S = 0.2
GRACE_S = 5

Tell = Callable[[str], object]
Counts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is the same for every rung; times in milliseconds and seconds."""

    settings: Settings
    images: Path
    host_latency_ms: float
    callback_latency_ms: float
    seconds: float
    logs: Path


class Peer:
    """The process around the worker, as the runner sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise WorkerFailed("the queue and image host of the bench did not start; see the lines above")
        self._connection = http.client.HTTPConnection("127.0.0.1", int(line), timeout=30)
        self.base = f"http://127.0.0.1:{int(line)}"

    def counts(self) -> Counts:
        """What happened so far, see :meth:`cvworker.bench.world.World.counts`."""
        counts: Counts = json.loads(self._get("/counts"))
        return counts

    def close_queue(self) -> None:
        """No new messages from now on."""
        self._get("/close")

    def close(self) -> None:
        self._connection.close()

    def _get(self, path: str) -> bytes:
        self._connection.request("GET", path)
        with self._connection.getresponse() as response:
            return response.read()


@contextmanager
def world(plan: Plan) -> Iterator[Peer]:
    """Queue, image host and receiver of their own for each measurement: none begins with what another left."""
    command = [sys.executable, "-P", "-m", "cvworker.bench.world", "--images", str(plan.images)]
    command += ["--image-ms", str(plan.host_latency_ms), "--callback-ms", str(plan.callback_latency_ms)]
    # In a group of its own: Ctrl-C goes to the runner, which ends it after the worker.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    try:
        with closing(Peer(process)) as peer:
            yield peer
    finally:
        process.terminate()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def worker(plan: Plan, rung: Rung, base: str) -> Iterator[DemoWorker]:
    """The worker of a rung; when the block ends nothing of it is left."""
    forced = {
        "queue_url": base + QUEUE,
        "callback_url": f"{base}/callback",
        "callback_secret": SECRET,
        "allowed_hosts": base.removeprefix("http://"),
        "allow_private_networks": "false",
        "egress_proxy": "",
        "http_host": "127.0.0.1",
        "http_port": "0",
        "shutdown_grace": str(GRACE_S),
    }
    variables = {name: value for name, value in environment(plan.settings, forced).items() if not _of_aws(name)}
    process = DemoWorker(variables | _aws(base), log=plan.logs / f"{rung.name}.log", command=rung.command)
    try:
        yield process
    finally:
        tree.end(process.pid)
        process.close()


def measure(rung: Rung, plan: Plan, number: int, gpu: Gpu, tell: Tell, check: Callable[[], None]) -> Sample:
    """Run one rung once, as round ``number``. ``check`` is called now and then, and may raise to end it.

    Raises:
        WorkerFailed: it ended, or answered nothing; StartupError: as its worker does.
    """
    with world(plan) as peer, worker(plan, rung, peer.base) as process:

        def look() -> Counts:
            time.sleep(LOOK_S)
            check()
            process.check()
            return peer.counts()

        tell("starting")
        began = peer.counts()["at"]
        while not (now := look())["callbacks"]:
            if now["at"] - began > START_S:
                raise WorkerFailed(f"{rung.name} answered nothing in {START_S:.0f} s; its log: {plan.logs}")
        first = now["at"]
        tell("warming up")
        least = min(WARM_S, plan.seconds)
        while (warm := now["at"] - first) < least or (now["callbacks"] < WARM_ANSWERS and warm < WARM_MOST_S):
            now = look()
        tell(f"measuring for {plan.seconds:g} s")
        memory = tree.pss_bytes(process.pid)  # outside the window: with several processes a look takes 60 ms of CPU
        before, cpu = look(), tree.cpu_seconds(process.pid)
        now = before
        while now["at"] - before["at"] < plan.seconds:
            now = look()
        cpu_after, after = tree.cpu_seconds(process.pid), now
        memory = max(memory, tree.pss_bytes(process.pid))
        processes = len(tree.members(process.pid))
        share, taken = gpu.busy(before["at"], after["at"]), gpu.taken(before["at"], after["at"])
        taken_before = min(gpu.taken(began, first), default=0)
        tell("waiting for the last answers")
        peer.close_queue()
        ending = after["at"]
        while now["held"] and now["at"] - ending < END_S:
            now = look()
    took = {name: after[name] - before[name] for name in ("at", "cpu", "callbacks")}
    return Sample(
        rung=rung.name,
        round=number,
        seconds=took["at"],
        answers=took["callbacks"],
        cpu_s=sum(cpu_after.values()) - sum(cpu.get(pid, 0.0) for pid in cpu_after),
        around_cpu_s=took["cpu"],
        memory_bytes=memory,
        gpu_share=share,
        gpu_memory_bytes=max(0, max(taken) - taken_before) if taken else None,
        start_s=first - began,
        processes=processes,
        given=now["given"],
        unanswered=now["given"] - now["answered"],
        repeats=now["repeats"],
        unsigned=now["unsigned"],
        errors=now["errors"],
        first_error=now["first_error"],
    )


def _of_aws(name: str) -> bool:
    return name.startswith("AWS_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy")


def _aws(base: str) -> dict[str, str]:
    """With these any process's boto3 speaks to the queue at ``base``, and to nothing else."""
    return {
        "AWS_ENDPOINT_URL": base,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
