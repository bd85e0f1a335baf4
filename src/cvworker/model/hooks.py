"""What each hook of a module gets, gives and takes in time, for ``cvworker check``."""

from __future__ import annotations

import base64
import io
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from inspect import getsourcefile
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from cvworker import images
from cvworker.model.batcher import Sample
from cvworker.model.preprocess import describe
from cvworker.module import Module

if TYPE_CHECKING:
    from cvworker.model.runner import Runner

BUDGET_S = 1.0
"""For timing one hook; the least is one run."""
ROUNDS = 5
MAX_TEXT = 60


@dataclass(frozen=True, slots=True)
class Step:
    """One hook: what it got and gave, and milliseconds for one image and for a batch."""

    hook: str
    takes: str
    gives: str
    image_ms: float
    batch_ms: float


@dataclass(frozen=True, slots=True)
class Broken:
    """A hook that raised, or gave what the next one cannot take."""

    hook: str
    error: str


class _Failed(Exception):
    def __init__(self, hook: str) -> None:
        super().__init__(hook)
        self.hook = hook


def report(module: Module, runner: Runner, picture: bytes | None, max_pixels: int) -> dict[str, Any]:
    """Take ``picture`` (the module's example without one) through every hook, in this process.

    Returns ``picture`` (its bytes in base64) and ``steps``, with a ``note`` where pictures of different sizes would not
    go into one batch; or ``broken``: which hook, and what it raised.
    """
    found: dict[str, Any] = {"image_type": module.image_type}
    try:
        if picture is None:
            picture = _try("example", lambda: png(module.example()))[0]
        found["picture"] = base64.b64encode(picture).decode()
        found |= _trace(module, runner, picture, max_pixels)
    except _Failed as failed:
        cause = failed.__cause__
        assert cause is not None
        found["broken"] = asdict(Broken(failed.hook, describe(cause) + _where(module, cause)))
    return found


def _trace(module: Module, runner: Runner, picture: bytes, max_pixels: int) -> dict[str, Any]:
    count = runner.batch_size

    def decode() -> Any:
        return images.decode(picture, image_type=module.image_type, min_side=module.min_side, max_pixels=max_pixels)

    image, decode_ms = _try("decode", decode)
    sample, preprocess_ms = _try("preprocess", lambda: module.preprocess(image))
    samples = [Sample(0, sample, 0.0) for _ in range(count)]
    _, collate_ms = _try("collate", lambda: module.collate([sample]))
    batch, collate_batch_ms = _try("collate", lambda: module.collate([sample] * count))
    done, _ = _try("process", lambda: runner.trial(samples))
    process_ms, process_batch_ms = (_process_ms(runner, samples[:size]) for size in (1, count))
    result = json.loads(done[0].result or "null")
    steps = [
        Step("decode", _file(picture), describe_value(image), decode_ms, decode_ms * count),
        Step("preprocess", describe_value(image), describe_value(sample), preprocess_ms, preprocess_ms * count),
        Step("collate", f"{count} × {describe_value(sample)}", describe_value(batch), collate_ms, collate_batch_ms),
        Step("process", describe_value(batch), f"{count} × {_keys(result)}", process_ms, process_batch_ms),
    ]
    note = _sizes(module, image, sample)
    return {"steps": [asdict(step) for step in steps], **({"note": note} if note else {})}


def _sizes(module: Module, image: Any, sample: Any) -> str | None:
    """What is to be said of pictures of different sizes in one batch."""
    try:
        other = module.preprocess(_narrower(image))
    except Exception:  # it may well want pictures of this size
        return None
    try:
        module.collate([sample, other])
    except Exception as error:
        return f"samples of pictures of different sizes cannot be collated ({describe(error)})"
    return None


def describe_value(value: Any) -> str:
    """The shapes and types of an image, a sample or a batch, for people."""
    if isinstance(value, Image.Image):
        return f"PIL {value.mode} {value.width}×{value.height}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return _together([describe_value(part) for part in value])
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def png(image: Any) -> bytes:
    """An image of either type, ``uint8 [3, H, W]`` or PIL, as a PNG file."""
    if isinstance(image, torch.Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _try(hook: str, run: Callable[[], Any]) -> tuple[Any, float]:
    """What ``run`` gives and its median milliseconds, the first run aside; raises _Failed with what it raises."""
    try:
        value = run()
        times: list[float] = []
        while len(times) < ROUNDS and sum(times) < BUDGET_S * 1000:
            began = time.perf_counter()
            value = run()
            times.append((time.perf_counter() - began) * 1000)
        return value, median(times)
    except Exception as error:
        raise _Failed(hook) from error


def _process_ms(runner: Runner, samples: list[Sample]) -> float:
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) < BUDGET_S * 1000:
        times.append(runner.trial(samples)[0].process_ms)
    return median(times)


def _where(module: Module, error: BaseException) -> str:
    """The last line of the module's own file that the error passed through."""
    own = getsourcefile(type(module))
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f" (at {lines[-1].filename}:{lines[-1].lineno})" if lines else ""


def _narrower(image: Any) -> Any:
    """The left two thirds of an image of either type."""
    if isinstance(image, Image.Image):
        return image.crop((0, 0, max(1, image.width * 2 // 3), image.height))
    return image[:, :, : max(1, image.shape[2] * 2 // 3)]


def _together(parts: list[str]) -> str:
    if len(parts) > 1 and len(set(parts)) == 1:
        return f"{len(parts)} × {parts[0]}"
    return "[" + ", ".join(parts) + "]"


def _file(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as image:
        return f"{image.format} {image.width}×{image.height}, {len(picture) / 1000:.0f} kB"


def _keys(result: Mapping[str, Any]) -> str:
    text = "{" + ", ".join(result) + "}"
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 2] + "…}"
