"""The model process: the module, the DataLoader and the inference threads, told what to do over one connection.

It holds no credentials, no secrets and no sockets to the outside. It ends when the connection does.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvworker import heap
from cvworker.errors import JobError, StartupError
from cvworker.model.config import ModelConfig

if TYPE_CHECKING:
    from cvworker.model.decoding import DeviceDecoder
    from cvworker.model.runner import Done, Staged
    from cvworker.module import Module

START_TIMEOUT_S = 120.0
FIRST_PICTURES = 8
"""Different pictures in the batches that ``batch_size: auto`` is measured with."""


class ModelProcess:
    """Composes feeder → batcher → stage → run, and speaks with the worker."""

    def __init__(self, connection: Connection, config: ModelConfig, arena_fd: int) -> None:
        self._connection = connection
        self._config = config
        self._arena_fd = arena_fd
        self._sending = threading.Lock()
        self._decoder: DeviceDecoder | None = None

    def run(self) -> None:
        """Start, say ready, and serve until told to stop."""
        import torch

        from cvworker.loading import load, make
        from cvworker.model.batcher import Batcher
        from cvworker.model.feeder import Feeder
        from cvworker.model.runner import Runner
        from cvworker.weights import sha256_of

        config = self._config
        module = make(load(config.module), config.weights)
        device = device_named(config.device)
        pin = device.type == "cuda"
        self._batcher = Batcher(config.batch_size, config.max_wait_ms / 1000, time.monotonic)
        self._feeder = Feeder(config, self._arena_fd, module, pin=pin, deliver=self._batcher.add, failed=self._refuse)
        feeding = _thread(self._feed, "feeder")
        self._device = device
        try:
            module.setup(device)
        except StartupError:
            raise
        except Exception as error:
            raise StartupError(f"module: {module.name}.setup raised {type(error).__name__}: {error}") from error
        first = "fp32" if config.precision == "auto" else config.precision
        self._runner = Runner(module, device, first, config.batch_size)
        self._decoder = self._device_decoder(module)
        warm = self._warm_up(module)
        if not self._feeder.wait_until_started(START_TIMEOUT_S):
            raise StartupError("the DataLoader's processes did not start; see the log above")
        if config.with_example:
            warm["hooks"] = self._hooks(module)
        heap.settle()
        self.send(
            {
                "ready": {
                    "name": module.name,
                    "device": str(device),
                    "device_name": torch.cuda.get_device_name(device) if pin else "cpu",
                    "precision": self._runner.precision,
                    "batch_size": self._config.batch_size,
                    "weights": sha256_of(module.weights) if module.weights else None,
                    "min_side": module.min_side,
                    **warm,
                }
            }
        )
        _thread(self._serve, "serve")
        self._compute()
        feeding.join()

    def send(self, frame: dict[str, Any]) -> None:
        self.send_text(json.dumps(frame))

    def send_text(self, text: str) -> None:
        with self._sending:
            self._connection.send_bytes(text.encode())

    def _serve(self) -> None:
        while True:
            try:
                frame = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the worker is gone; nobody is left to answer to
            if "stop" in frame:
                self._feeder.close()
                return
            self._feeder.submit([(number, at, length, bool(alone)) for number, at, length, alone in frame["jobs"]])

    def _feed(self) -> None:
        self._feeder.run()
        self._batcher.close()

    def _compute(self) -> None:
        """Run batches until there will be no more, on the thread that has set up the module and warmed it up.

        OpenMP keeps a team of threads for each thread that computes, and with more of them than cores each wait within
        an operation becomes a sleep: on two cores that costs ResNet-50 a fifth.
        """
        for staged in self._staged_ahead() if self._device.type == "cuda" else self._staged_in_turn():
            self.send({"started": [sample.number for sample in staged.samples]})
            began = time.monotonic()
            done = self._runner.run(staged)
            self._batcher.batch_size = self._runner.batch_size
            busy = time.monotonic() - began
            self.send_text(_done_frame(done, busy, None if staged.copy is None else staged.copy.seconds()))

    def _staged_in_turn(self) -> Iterator[Staged]:
        """Where batches compute on the same cores, there is nothing to overlap."""
        while samples := self._batcher.take():
            if self._decoder is not None:
                samples = self._decoder.prepare(samples)
            if samples:
                yield self._runner.stage(samples)

    def _staged_ahead(self) -> Iterator[Staged]:
        """While one batch computes on the device, the next is collated and copied there."""
        staged: queue.Queue[Staged | None] = queue.Queue(maxsize=1)

        def stage() -> None:
            for each in self._staged_in_turn():
                staged.put(each)
            staged.put(None)

        _thread(stage, "stage")
        while (each := staged.get()) is not None:
            yield each

    def _device_decoder(self, module: Module) -> DeviceDecoder | None:
        """For a module that asks for it, where something decodes on the device."""
        from cvworker.model import decoding

        decode = decoding.decoder_for(self._device) if module.decode_on_device else None
        if decode is None or not decoding.takes_device_images(module, self._device):
            return None
        self._feeder.on_device = True
        return decoding.DeviceDecoder(
            module,
            self._device,
            decode,
            mmap.mmap(self._arena_fd, self._config.arena_size, access=mmap.ACCESS_READ),
            self._runner.stream,
            done=self._feeder.settle,
            refused=self._feeder.decode_here,
            failed=self._refuse,
            busy=lambda numbers: self.send({"decoding": numbers}),
        )

    def _sample(self, module: Module, image: Any) -> Any:
        """What ``preprocess`` makes of an image where most of this module's images are: here, or on the device."""
        return module.preprocess(image if self._decoder is None else image.to(self._device))

    def _refuse(self, number: int, error: JobError) -> None:
        self.send({"failed": [number, type(error).__name__, error.message]})

    def _warm_up(self, module: Module) -> dict[str, Any]:
        """Run the example through every hook, alone and as a full batch: what is slow the first time is done."""
        from cvworker.model.batcher import Sample
        from cvworker.model.preprocess import describe

        hook = "preprocess"
        try:
            value = self._sample(module, module.example())
            hook = "process"
            if self._config.auto_batch:
                self._choose_batch(module)
            samples = [Sample(0, value, 0.0) for _ in range(self._config.batch_size)]
            self._runner.trial(samples)
            self._tune(module)
            for size in (len(samples), 1):
                self._runner.trial(samples[:size])
        except JobError as error:
            return {"warning": f"{hook}: {error}"}
        except Exception as error:
            return {"warning": f"{hook}: {describe(error)}"}
        return {}

    def _choose_batch(self, module: Module) -> None:
        """Find the batch size that is best for this module here; one line in the log says which, and why."""
        import structlog

        from cvworker.model import batch_size
        from cvworker.model.batcher import Sample
        from cvworker.model.precision import variations

        self._feeder.wait_until_started(START_TIMEOUT_S)  # which takes the cores that are to be measured
        values = [self._sample(module, image) for image in variations(module.example(), FIRST_PICTURES)]
        room = batch_size.Room(on_device=self._device.type == "cuda")
        chosen, rates = batch_size.measure(
            lambda count: self._runner.trial([Sample(0, values[n % len(values)], 0.0) for n in range(count)]),
            time.monotonic,
            fits=room.fits,
        )
        if self._device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        self._config = replace(self._config, batch_size=chosen, auto_batch=False)
        self._runner.limit_to(chosen)
        self._batcher.batch_size = chosen
        measured = ", ".join(f"{size}: {rate:.1f}" for size, rate in rates.items())
        structlog.get_logger(__name__).info("batch size", chosen=chosen, images_a_second=measured)

    def _hooks(self, module: Module) -> dict[str, Any]:
        from cvworker.model.hooks import report

        picture = Path(self._config.picture).read_bytes() if self._config.picture else None
        return report(module, self._runner, picture, self._config.max_image_pixels)

    def _tune(self, module: Module) -> None:
        """Choose the precision and the form of the network; one line in the log says what was chosen, and why."""
        import structlog

        from cvworker.model.batcher import Sample
        from cvworker.model.optimize import network_of
        from cvworker.model.precision import tune, variations
        from cvworker.model.preprocess import describe

        config = self._config
        self._feeder.wait_until_started(START_TIMEOUT_S)  # which takes the cores that are to be measured
        log = structlog.get_logger(__name__)
        first = self._runner.precision
        try:
            images = variations(module.example(), config.batch_size)
            samples = [Sample(0, self._sample(module, image), 0.0) for image in images]
            setup, trials = tune(
                self._runner,
                samples,
                network_of(module),
                self._device,
                precision=config.precision,
                optimize=config.optimize,
            )
        except Exception as error:
            self._runner.precision = first
            log.warning("not tuned: the module dislikes the warm-up images", precision=first, error=describe(error))
            return
        if trials:
            log.info("tuned", chosen=str(setup), tried="; ".join(str(trial) for trial in trials))


def main() -> None:
    """Entry point: ``python -m cvworker.model CONNECTION_FD ARENA_FD``, the configuration as the first frame."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # stops are told over the connection
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))  # a descriptor for each chunk
    connection, arena_fd = Connection(int(sys.argv[1])), int(sys.argv[2])
    config = ModelConfig.load(connection.recv_bytes())
    start_fork_server(config)

    from cvworker.observe.logs import configure

    configure(config.log_format, config.log_level)
    process = ModelProcess(connection, config, arena_fd)
    try:
        try:
            process.run()
        except StartupError as error:
            process.send({"unusable": str(error)})
            os._exit(2)
    except ConnectionError:
        os._exit(0)  # the worker is gone; nobody is left to answer to
    except BaseException:  # an ordinary exit would wait for the DataLoader's processes, which wait for work
        traceback.print_exc()
        os._exit(70)


def start_fork_server(config: ModelConfig) -> None:
    """Begin at once: the server imports torch while this process does."""
    if config.preprocess_workers == 0:
        return
    os.environ["CVWORKER_PRELOAD"] = json.dumps({"module": config.module, "path": sys.path})
    multiprocessing.set_forkserver_preload(["cvworker.model.preload"])
    from multiprocessing.forkserver import ensure_running

    ensure_running()


def device_named(wanted: str) -> Any:
    """The ``torch.device`` that the setting means. Raises StartupError where it is not there."""
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartupError(
            f"device: {wanted} is not there ({torch.cuda.device_count()} CUDA devices found); use cpu or auto"
        )
    return device


def _thread(target: Any, name: str) -> threading.Thread:
    """A thread whose failure ends the process: the worker sees that, and a dead thread would go unseen."""

    def guarded() -> None:
        try:
            target()
        except BaseException:
            import structlog

            structlog.get_logger(__name__).critical("a thread of the model process ended", thread=name, exc_info=True)
            os._exit(70)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread


def _done_frame(done: list[Done], busy: float, to_device: float | None) -> str:
    rows = []
    for each in done:
        error = "null" if each.error is None else json.dumps([type(each.error).__name__, each.error.message])
        times = f"{each.sample.preprocess_ms:.3f},{each.process_ms:.3f}"
        rows.append(f"[{each.sample.number},{times},{each.result or 'null'},{error}]")
    copied = "" if to_device is None else f',"to_device":{to_device:.6f}'
    return f'{{"done":[{",".join(rows)}],"busy":{busy:.6f}{copied}}}'
