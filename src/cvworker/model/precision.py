"""What ``process`` runs fastest in at unchanged answers: number format and form of the network, found by measuring."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cvworker.model.batcher import Sample
from cvworker.model.optimize import ChannelsLast, Compiled, Form, Graphs, has_images, padded_sizes

if TYPE_CHECKING:
    from torch import nn

    from cvworker.model.runner import Done

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ABSOLUTE, RELATIVE = 0.01, 0.02
"""Numbers agree that differ by no more than 0.01 + 2 % of fp32's."""
GAIN = 1.1
"""How many times as fast another precision must be to be used: less than that is not worth another rounding."""
FORM_GAIN = 1.03
"""The same for another form in the same precision, which costs nothing but may be noise."""
ROUNDS = 2, 7
"""Timed batches of each, at least and at most; medians are compared."""
BUDGET_MS = 1500.0
"""For all batches of the tuning together: once it is spent, nothing more is tried, and what is being tried is timed
with the least rounds. A start is not to wait for it."""
SLOW_BATCHES = 3
"""The same in full batches, where that is more: it is a slow model that gains most."""
FULL_BUDGET_MS = 60_000.0
"""The same with ``optimize: full``, where compiling takes longer than that anyway."""
FAST_MS = 1.0
"""A full batch that takes no longer has nothing to gain, and what would be measured is noise."""
SLOW_MS = 100.0
"""A batch that takes longer is timed with fewer samples; answers are always compared over the full batch."""
CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What Linux calls bf16 arithmetic on x86 and ARM. Without it bf16 is emulated, and slower than fp32."""


class Bench(Protocol):
    """What runs a batch: :class:`cvworker.model.runner.Runner`."""

    precision: str

    def trial(self, samples: list[Sample]) -> list[Done]: ...


@dataclass(frozen=True, slots=True)
class Setup:
    """A precision, and the forms that are put on the network, in order."""

    precision: str
    forms: tuple[Form, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.precision, *(form.name for form in self.forms)))


@dataclass(frozen=True, slots=True)
class Trial:
    """How one setup did beside the best before it; milliseconds are medians for a batch of ``batch`` samples."""

    name: str
    taken: bool
    why: str
    beside: str = ""
    ms: float | None = None
    ms_before: float | None = None
    batch: int | None = None

    def __str__(self) -> str:
        if self.ms is None:
            return f"{self.name}: {self.why}"
        return f"{self.name} {self.ms:.1f} ms, {self.beside} {self.ms_before:.1f} ms at batch {self.batch}: {self.why}"


class Tuning:
    """Tries setups one after the other beside the best so far, and leaves the best of them in place.

    A setup is used if its results for a full batch of warm-up images agree with the first one's (:func:`difference`),
    and if it is :data:`GAIN` (:data:`FORM_GAIN`) times as fast as the best so far: medians of batches that are run in
    turn, so that what else the machine does meets both.
    """

    def __init__(self, bench: Bench, samples: list[Sample], first: Setup, *, budget_ms: float = BUDGET_MS) -> None:
        """Run ``first`` and keep its answers as the truth. Raises what the module raises."""
        self.best = first
        self.trials: list[Trial] = []
        self._bench = bench
        self._samples = samples
        self._left_ms = budget_ms
        _on(bench, first)
        self._expected = self._answers(len(samples))
        self.full_ms = budget_ms - self._left_ms
        self._left_ms = max(self._left_ms, SLOW_BATCHES * self.full_ms)
        self._batch = min(len(samples), max(2, int(len(samples) * SLOW_MS / max(self.full_ms, 1e-6))))

    def try_(self, precision: str, make: Callable[[], Iterable[Form]], sizes: Sequence[int] = ()) -> bool:
        """Measure a setup and keep it if it is better; whatever it raises is a reason not to.

        ``sizes`` are batch sizes to be prepared, and their answers compared, beside the full one.
        """
        before, setup = self.best, Setup(precision)
        _off(before)
        try:
            setup = Setup(precision, tuple(make()))
            trial = self._compare(before, setup, sizes)
        except Exception as error:
            trial = Trial(str(setup), False, f"not possible ({_one_line(error)})")
        _off(setup)
        self.best = setup if trial.taken else before
        _on(self._bench, self.best)
        self.trials.append(trial)
        return trial.taken

    def _compare(self, before: Setup, setup: Setup, sizes: Sequence[int]) -> Trial:
        if self._left_ms <= 0:
            return Trial(str(setup), False, "not tried, the time for measuring is over")
        _on(self._bench, setup)
        for size in (len(self._samples), *sizes):
            if found := difference(self._expected[:size], self._answers(size)):
                return Trial(str(setup), False, f"not used, answers differ: {found}")
        if self._batch < len(self._samples):
            self._milliseconds(self._batch)  # libraries prepare anew for each batch size
        times: dict[Setup, list[float]] = {setup: [], before: []}
        old, new = times[before], times[setup]
        while len(old) < ROUNDS[0] or (len(old) < ROUNDS[1] and self._left_ms > 0 and min(new) < min(old)):
            for each, other in ((setup, before), (before, setup)):
                _off(other)
                _on(self._bench, each)
                if not old and each is before and self._batch < len(self._samples):
                    self._milliseconds(self._batch)
                times[each].append(self._milliseconds(self._batch))
        ratio = median(old) / max(median(new), 1e-6)
        taken = ratio >= (FORM_GAIN if setup.precision == before.precision else GAIN)
        why = f"{'used' if taken else 'not used'}, {ratio:.2f} times as fast"
        return Trial(str(setup), taken, why, str(before), median(new), median(old), self._batch)

    def _answers(self, size: int) -> list[Any]:
        done = self._bench.trial(self._samples[:size])
        self._left_ms -= done[0].process_ms
        return [json.loads(each.result or "null") for each in done]

    def _milliseconds(self, size: int) -> float:
        took = self._bench.trial(self._samples[:size])[0].process_ms
        self._left_ms -= took
        return took


def tune(
    bench: Bench, samples: list[Sample], model: nn.Module | None, device: torch.device, *, precision: str, optimize: str
) -> tuple[Setup, list[Trial]]:
    """Put the setup in place that is best for ``samples``, a full batch, and say how each one did.

    ``precision`` and ``optimize`` are the settings. An explicit precision is taken as given, and what the network
    answers in it is the truth for its other forms; for ``auto`` that is fp32. Nothing is run where there is no choice.
    Raises what the module raises in that first one.
    """
    first = Setup("fp32" if precision == "auto" else precision)
    lower = lower_precisions(device) if precision == "auto" else []
    relayout = model is not None and optimize != "off" and has_images(model)
    full = model is not None and optimize == "full"
    if not (lower or relayout or full):
        _on(bench, first)
        return first, []

    tuning = Tuning(bench, samples, first, budget_ms=FULL_BUDGET_MS if full else BUDGET_MS)
    if tuning.full_ms < FAST_MS:
        return first, []

    def channels_last(name: str) -> list[Form]:
        assert model is not None
        return [ChannelsLast(model, PRECISIONS[name])]

    # In the order of what is to be expected, as time may run out.
    for name in lower:
        tuning.try_(name, partial(channels_last, name) if relayout else list)
    if relayout and tuning.best is first:
        tuning.try_(first.precision, partial(channels_last, first.precision))
    if full:
        assert model is not None
        sizes = padded_sizes(len(samples))
        best = tuning.best
        tuning.try_(best.precision, lambda: [*best.forms, Compiled(model)], sizes[:2])
        if device.type == "cuda":
            best = tuning.best
            tuning.try_(best.precision, lambda: [*best.forms, Graphs(model, len(samples))], [*sizes, 3])
    return tuning.best, tuning.trials


def lower_precisions(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the device has arithmetic for below fp32; a GPU's are written but not measured yet."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["fp16", "bf16"] if bf16 else ["fp16"]
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # not Linux
        return []
    flags = next((line.split(":", 1)[-1] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return ["bf16"] if CPU_FLAGS & set(flags.split()) else []


def difference(expected: Any, found: Any, at: str = "results") -> str | None:
    """Where two JSON trees disagree first, in words, or None.

    Structure, strings, booleans, nulls and whole numbers must be the same: a whole number may be a label, a count or
    an identifier. Numbers with a fraction may differ by :data:`ABSOLUTE` + :data:`RELATIVE` of the expected one.
    """
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        parts = ((expected[key], found[key], f"{at}.{key}") for key in expected)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        parts = ((one, other, f"{at}[{i}]") for i, (one, other) in enumerate(zip(expected, found, strict=True)))
    else:
        return None if _same(expected, found) else f"{at} is {_short(found)}, not {_short(expected)}"
    return next((text for part in parts if (text := difference(*part))), None)


def variations(image: Any, count: int) -> list[Any]:
    """``count`` images like ``image``, of its type: turned, shifted, inverted, darkened, noisy and smooth.

    A module's example is one picture, and all of a batch alike would hide what another number format does.
    """
    from PIL import Image

    if pil := isinstance(image, Image.Image):
        import numpy

        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
    else:
        pixels = image
    generator = torch.Generator().manual_seed(0)
    height, width = pixels.shape[-2:]
    noise = torch.randint(0, 64, pixels.shape, dtype=torch.uint8, generator=generator)
    slope = torch.linspace(0, 127, width).to(torch.uint8).expand(pixels.shape)
    kinds = [
        pixels,
        pixels.flip(-1),
        pixels.roll((height // 3, width // 4), (-2, -1)),
        pixels // 2 + slope,
        255 - pixels,
        pixels.flip(-2) // 2,
        pixels // 4 * 3 + noise,
        slope * 2,
    ]
    made = [kinds[n % len(kinds)].contiguous() for n in range(count)]
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in made] if pil else made


def _on(bench: Bench, setup: Setup) -> None:
    bench.precision = setup.precision
    for form in setup.forms:
        form.on()


def _off(setup: Setup) -> None:
    for form in reversed(setup.forms):
        form.off()


def _same(expected: Any, found: Any) -> bool:
    numbers = [type(value) in (int, float) for value in (expected, found)]
    if all(numbers) and float in (type(expected), type(found)):
        return bool(abs(found - expected) <= ABSOLUTE + RELATIVE * abs(expected))
    return type(expected) is type(found) and bool(expected == found)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
