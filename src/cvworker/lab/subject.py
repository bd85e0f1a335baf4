"""A module, set up on a device, and one batch of it at a time: its network alone, or all of ``process``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torch.utils import _pytree as pytree

from cvworker import weights
from cvworker.errors import StartupError
from cvworker.lab.results import ModuleInfo, Split
from cvworker.lab.timing import Batch
from cvworker.loading import load, make
from cvworker.model.batch_size import LARGEST
from cvworker.model.batcher import Sample
from cvworker.model.hooks import describe_value
from cvworker.model.precision import variations
from cvworker.model.runner import Runner

PICTURES = 8
"""Different pictures in a batch: as many as :func:`cvworker.model.precision.variations` knows."""
DIGITS = 4  # of a millisecond


class _Seen(BaseException):
    """Ends a run of ``process`` once the network's inputs are known; a module's own ``except`` must not catch it."""


class Subject:
    """A module as the worker runs it, in this process.

    Raises:
        StartupError: module or weights will not do.
    """

    def __init__(
        self,
        spec: str,
        weights_path: str | None,
        device: torch.device,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.module = make(load(spec), weights_path)
        self.device = device
        self._seed = seed
        self._clock = clock
        try:
            self.module.setup(device)
        except StartupError:
            raise
        except Exception as error:
            raise StartupError(f"module: {self.module.name}.setup raised {type(error).__name__}: {error}") from error
        self.runner = Runner(self.module, device, "fp32", LARGEST)
        model = getattr(self.module, "model", None)
        self.network: nn.Module | None = model if isinstance(model, nn.Module) else None
        try:
            self._example = self.module.example()
            self.sample = self.samples(1)[0].value
            self.runner.trial(self.samples(1))
        except Exception as error:
            raise StartupError(
                f"module: its example fails in {self.module.name} ({type(error).__name__}: {error}); "
                "'cvworker check' shows where"
            ) from error

    def info(self, spec: str) -> ModuleInfo:
        """What the profile says of it."""
        model = self.network
        return ModuleInfo(
            name=self.module.name,
            spec=spec,
            weights=weights.sha256_of(self.module.weights) if self.module.weights else None,
            network=type(model).__name__ if model is not None else None,
            parameters=sum(weight.numel() for weight in model.parameters()) if model is not None else None,
            sample=describe_value(self.sample),
        )

    @property
    def follows_size(self) -> bool:
        """Whether a larger picture makes a larger sample."""
        try:
            smaller = self.module.preprocess(_scaled(self._example, 0.5))
        except Exception:  # it may well want pictures of one size
            return False
        return _shapes(smaller) != _shapes(self.sample)

    def samples(self, count: int, megapixels: float | None = None) -> list[Sample]:
        """``count`` samples of variations of the module's example, scaled to ``megapixels`` where given."""
        image = self._example
        if megapixels is not None:
            image = _scaled(image, (megapixels * 1e6 / _pixels(image)) ** 0.5)
        values = [self.module.preprocess(each) for each in variations(image, min(count, PICTURES))]
        return [Sample(number, values[number % len(values)], 0.0) for number in range(count)]

    def network_batch(self, count: int, megapixels: float | None = None) -> Batch:
        """The network alone, on random inputs of the shapes that ``process`` gives it for ``count`` samples.

        On a GPU the batch that the worker would copy there is copied before it, and the outputs after it. Raises
        LookupError where ``process`` does not call ``self.model``.
        """
        samples = self.samples(count, megapixels)
        args, kwargs = self._inputs(samples)
        network, runner = self.network, self.runner
        assert network is not None
        if self.device.type != "cuda":

            def run() -> Split:
                began = self._clock()
                with torch.inference_mode(), runner.autocast():
                    network(*args, **kwargs)
                return Split(0.0, self._since(began), 0.0)

            return run
        batch = pytree.tree_map_only(torch.Tensor, _pinned, self.module.collate([sample.value for sample in samples]))

        def compute() -> Any:
            with torch.inference_mode(), runner.autocast():
                return network(*args, **kwargs)

        return lambda: _on_gpu(batch, compute, self.device)

    def process_batch(self, count: int, megapixels: float | None = None) -> Batch:
        """Collate, copy, ``process`` and its results as JSON, as the worker does it; the first two count as copying."""
        samples = self.samples(count, megapixels)

        def run() -> Split:
            began = self._clock()
            done = self.runner.trial(samples)
            total = self._since(began)
            if self.device.type != "cuda":
                return Split(0.0, total, 0.0)
            inside = round(min(done[0].process_ms, total), DIGITS)
            return Split(total - inside, inside, 0.0)

        return run

    def _since(self, began: float) -> float:
        return round((self._clock() - began) * 1000, DIGITS)

    def _inputs(self, samples: list[Sample]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What ``process`` first calls the network with, its numbers replaced by random ones."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def look(_network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Seen

        assert self.network is not None
        handle = self.network.register_forward_pre_hook(look, with_kwargs=True)
        precision, self.runner.precision = self.runner.precision, "fp32"
        try:
            self.runner.trial(samples)
        except _Seen:
            pass
        finally:
            handle.remove()
            self.runner.precision = precision
        if not seen:
            raise LookupError(f"{self.module.name}.process does not call self.model(...)")
        generator = torch.Generator().manual_seed(self._seed)
        random: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            torch.Tensor, lambda tensor: _random(tensor, generator), seen[0]
        )
        return random


def _random(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Like ``tensor``, its bytes uniform and its floats of the same mean and spread; whole numbers may be indices."""
    if tensor.dtype is torch.uint8:
        return torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=generator).to(tensor.device)
    if tensor.is_floating_point() and tensor.numel():
        spread, mean = torch.std_mean(tensor.float(), correction=0)
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        return (noise * spread + mean).to(tensor.dtype)
    return tensor


def _on_gpu(batch: Any, compute: Callable[[], Any], device: torch.device) -> Split:
    """Timed by events on the current stream; nothing overlaps. Written for CUDA, not measured on a GPU yet."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
    events[0].record()
    pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
    events[1].record()
    outputs = compute()
    events[2].record()
    pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), outputs)
    events[3].record()
    events[3].synchronize()
    return Split(*(round(one.elapsed_time(other), DIGITS) for one, other in itertools.pairwise(events)))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_cuda else tensor.pin_memory()


def _scaled(image: Any, factor: float) -> Any:
    """An image of either type, its sides multiplied by ``factor``."""
    if isinstance(image, Image.Image):
        return image.resize([max(1, round(side * factor)) for side in image.size])
    height, width = (max(1, round(side * factor)) for side in image.shape[-2:])
    return interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]


def _pixels(image: Any) -> int:
    if isinstance(image, Image.Image):
        return image.width * image.height
    return int(image.shape[-2] * image.shape[-1])


def _shapes(sample: Any) -> list[Any]:
    return [list(leaf.shape) for leaf in pytree.tree_leaves(sample) if isinstance(leaf, torch.Tensor)]
