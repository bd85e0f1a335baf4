"""Everything that a load test needs on this machine: world, queue and workers; and one offer after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from load.scenarios import arrivals, images, latency, watch
from load.scenarios.broker import Broker, broker
from load.scenarios.ceiling import Ceiling
from load.scenarios.ceiling import measure as measure_ceiling
from load.scenarios.images import Pictures
from load.scenarios.world import ROOT, Peer, world
from pydantic import ValidationError

from cvworker.bench import tree
from cvworker.bench.gpu import Gpu
from cvworker.embedded.demo_worker import DemoWorker, environment, free_port
from cvworker.errors import StartupError, WorkerFailed
from cvworker.settings import Settings

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
READY_S = 300.0
CEILING_S = 1.0
STOP_S = 30.0

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is the same for every offer of a run."""

    module: str = "threat"
    workers: int = 1
    """0: they run elsewhere already."""
    images: str | None = None
    queue: str = "ministack"
    queue_url: str | None = None
    image_latency: str = "0"
    image_errors: float = 0.0
    callback_latency: str = "0"
    callback_errors: float = 0.0
    bind: str = "127.0.0.1"
    port: int = 0
    shown: str = ""
    seed: int = 0
    give_up: float = 60.0

    def check(self) -> None:
        """Raises StartupError for what cannot be, before anything is started."""
        if find_spec("locust") is None:
            raise StartupError("the generator is locust, which is not installed: pip install 'cvworker[load]'")
        latency.draws(self.image_latency, 0, "image-latency")
        latency.draws(self.callback_latency, 0, "callback-latency")
        if not self.workers and self.queue_url is None:
            raise StartupError("workers: without any here, give the queue of those that run elsewhere: --queue-url URL")
        if not self.workers and self.bind == "127.0.0.1" and not self.shown:
            raise StartupError(
                "shown: workers elsewhere cannot reach 127.0.0.1: give --bind 0.0.0.0 and --shown http://THIS-HOST:PORT"
            )

    def of_the_world(self) -> list[str]:
        """As options of the world's process."""
        given = {
            "image-latency": self.image_latency,
            "image-errors": self.image_errors,
            "callback-latency": self.callback_latency,
            "callback-errors": self.callback_errors,
            "bind": self.bind,
            "port": self.port,
            "seed": self.seed,
        }
        return [f"--{name}={value}" for name, value in given.items()]


class Here:
    """A running world with its workers. :meth:`offer` may be called again and again."""

    def __init__(
        self, wishes: Wishes, peer: Peer, queue: Broker, pictures: Pictures, folder: Path, ceiling: Ceiling
    ) -> None:
        self.wishes, self.queue, self.pictures, self.ceiling = wishes, queue, pictures, ceiling
        self.workers: list[DemoWorker] = []
        self.model: dict[str, Any] = {}
        """What the first worker says of its model."""
        self._peer, self._folder = peer, folder
        (folder / "urls.txt").write_text("".join(f"{url}\n" for url in pictures.urls(peer.shown)))

    def start(self, settings: Settings, stack: ExitStack) -> None:
        """Start the workers; returns when all are ready. Raises StartupError or WorkerFailed, with the log's name."""
        hosts = [*settings.allowed_hosts, urlsplit(self._peer.shown).netloc]
        for number in range(self.wishes.workers):
            port = free_port()
            forced = {
                "queue_url": self.queue.url,
                "allowed_hosts": ",".join(hosts),
                "http_host": "127.0.0.1",
                "http_port": str(port),
                "log_format": "json",
            }
            variables = environment(settings, forced) | dict(self.queue.environment)
            log = self._folder / f"worker-{number}.log"
            worker = DemoWorker(variables, log=log, url=f"http://127.0.0.1:{port}/")
            stack.callback(worker.close, STOP_S)
            self.workers.append(worker)
        for model in [self._ready(worker) for worker in self.workers]:
            self.model = self.model or model

    def _ready(self, worker: DemoWorker) -> dict[str, Any]:
        until = time.monotonic() + READY_S
        while not (model := worker.ready()):
            worker.check()
            if time.monotonic() > until:
                raise WorkerFailed(f"a worker is not ready after {READY_S:.0f} s; logs: {self._folder}")
            time.sleep(0.1)
        return model

    def offer(self, traffic: str, seconds: float, seed: int, tell: Tell = lambda told: None) -> dict[str, Any]:
        """Offer so much traffic (see ``arrivals.py``) and wait for the answers: the raw data of one row.

        Raises WorkerFailed where the generator or a worker ends by itself.
        """
        samples = self._folder / "samples.json"
        samples.unlink(missing_ok=True)
        with Gpu(os.environ.get("CVWORKER_DEVICE", "auto")) as gpu, watch.Watch(self.workers) as looks:
            with self._generator(traffic, seconds, seed, samples) as process:
                began, before = 0.0, self._counts()
                assert process.stdout is not None
                for line in process.stdout:
                    if not line.startswith("{"):
                        continue
                    told = json.loads(line)
                    if "began" in told:
                        began, before = told["began"], self._counts()
                    for worker in self.workers:
                        worker.check()
                    tell(told)
                code = process.wait()
            after, ended = self._counts(), time.monotonic()
            if code or not samples.exists():
                said = (self._folder / "locust.log").read_text(errors="replace").strip().splitlines()
                raise WorkerFailed(f"the generator ended with {code}: {said[-1] if said else 'it said nothing'}")
            device = {"busy": gpu.busy(began, ended), "memory_bytes": max(gpu.taken(began, ended), default=None)}
        found = json.loads(samples.read_text())
        return {
            "traffic": traffic,
            "seconds": arrivals.length(traffic, seconds),
            "seed": seed,
            "samples": found,
            "counters": {name: round(value - before[name], 6) for name, value in after.items()},
            "gpu": device,
            **looks.found(began, ended),
        }

    def _counts(self) -> dict[str, float]:
        beside = self._peer.counts()
        queue = sum(tree.cpu_seconds(self.queue.pid).values()) if self.queue.pid else 0.0
        mine = watch.counters(self.workers)
        return {**mine, "at": time.monotonic(), "world_cpu_s": beside["cpu"], "queue_cpu_s": queue}

    @contextmanager
    def _generator(self, traffic: str, seconds: float, seed: int, samples: Path) -> Iterator[subprocess.Popen[str]]:
        """Locust, in a process of its own."""
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--users", "1"]
        command += ["--only-summary", "--loglevel", "WARNING", "--stop-timeout", "0"]
        command += ["--queue-url", self.queue.url, "--arrivals", traffic, "--seconds", str(seconds)]
        command += ["--seed", str(seed), "--images", str(self._folder / "urls.txt"), "--samples", str(samples)]
        command += ["--receiver", self._peer.base, "--shown", self._peer.shown, "--give-up", str(self.wishes.give_up)]
        own = os.environ | dict(self.queue.environment)
        path = os.pathsep.join(filter(None, (str(ROOT), own.get("PYTHONPATH"))))
        with (self._folder / "locust.log").open("w") as log:
            process = subprocess.Popen(
                command,
                env=own | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def worker_settings(module: str | None) -> Settings:
    """What workers run with: the user's own variables. Raises StartupError for what will not do."""
    try:
        return Settings() if module is None else Settings(module=module)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise StartupError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


@contextmanager
def here(wishes: Wishes, folder: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[Here]:
    """World, queue and workers, ready when the block begins and gone when it ends; logs stay in ``folder``."""
    wishes.check()
    settings = worker_settings(wishes.module)
    with ExitStack() as stack:
        say("pictures")
        pictures = stack.enter_context(images.served(wishes.images, settings))
        peer = stack.enter_context(world(pictures.folder, wishes.of_the_world(), wishes.shown))
        queue = stack.enter_context(broker(wishes.queue, wishes.queue_url, peer))
        say("ceilings of queue, image host and receiver")
        ceiling = measure_ceiling(queue, pictures.folder, CEILING_S)
        found = Here(wishes, peer, queue, pictures, folder, ceiling)
        say("workers start")
        found.start(settings, stack)
        yield found
