"""Whether a module answers with an exported network, or in a faster form, as it does in fp32 without either."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cvworker.errors import StartupError
from cvworker.export import pictures
from cvworker.export.compare import TOLERANCES, Answer, Differences, Tolerance, compare
from cvworker.loading import make
from cvworker.model.batcher import Sample
from cvworker.model.optimize import ChannelsLast, Compiled, Form, Graphs, has_images, network_of
from cvworker.model.precision import PRECISIONS
from cvworker.model.preprocess import describe
from cvworker.model.runner import Runner
from cvworker.module import Module
from cvworker.modules.metadata import read_metadata
from cvworker.modules.networks import load_network
from cvworker.modules.weighted import Weighted

PICTURES = 32
"""Real ones, unless the folder has fewer; and half as many random ones."""
BATCH = 8
ODD = 3
RANDOM = "random pictures"


@dataclass(frozen=True)
class Variant:
    """What is compared with the reference: ``precision`` and ``optimize`` as the worker has them, and the largest
    batch. ``tolerance`` is the row of :data:`~cvworker.export.compare.TOLERANCES` that it has to keep to."""

    name: str
    module: Module
    precision: str
    optimize: str
    largest: int
    tolerance: str


@dataclass(frozen=True)
class Report:
    """``groups`` of pictures and batch sizes, and the limits they were held to."""

    module: str
    name: str
    device: str
    tolerance_name: str
    tolerance: Tolerance
    groups: list[Differences]
    problems: list[str]

    @property
    def passed(self) -> bool:
        return not self.problems and all(group.passed for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        groups = [asdict(group) | {"passed": group.passed} for group in self.groups]
        return asdict(self) | {"passed": self.passed, "groups": groups}


def reference_of(cls: type[Module], weights: str | None, device: torch.device) -> Module:
    """The module in fp32, as its ``setup`` makes it. Raises StartupError where that fails."""
    module = make(cls, weights)
    _set_up(module, device)
    return module


def exported_of(cls: type[Module], path: Path, original: str | None, device: torch.device) -> Module:
    """The module with an exported network: a built-in one loads the file itself, with the file's own metadata.

    For any other module that is the one of the original weights, with ``self.model`` replaced by the network: what its
    own ``setup`` would do.

    Raises:
        StartupError: the file, or the module, is not what it should be.
    """
    if issubclass(cls, Weighted):
        return reference_of(cls, str(path), device)
    module: Any = reference_of(cls, original, device)
    module.model = load_network(path, device)
    made: Module = module
    return made


def tolerance_of(path: Path | None, precision: str, device: torch.device) -> str:
    """The row of the table for an exported file, run in ``precision``: the coarser of the two."""
    names = [precision]
    if path is not None:
        names.append(read_metadata(path).get("precision", "fp32"))
    if device.type == "cuda":
        names.append("tf32")  # what convolutions use there unless they are told not to
    rows = list(TOLERANCES)
    return max((name if name in rows else "fp32" for name in names), key=rows.index)


def verify(
    reference: Module,
    variant: Variant,
    device: torch.device,
    folder: Path | None = None,
    say: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> Report:
    """Compare a variant with the reference, on real pictures and random ones, and at the edges of the batch size.

    Raises:
        StartupError: the reference itself fails, or there are no pictures.
    """
    real = pictures.real(reference, folder, PICTURES)
    images = [*real, *pictures.noise(reference, PICTURES // 2)]
    total = 2 * len(images) + 1 + ODD + variant.largest
    done = 0

    def count(more: int, what: str) -> None:
        nonlocal done
        done += more
        say(what, done, total)

    with _exact(), _Side(reference, device, "fp32", "off") as side:
        try:
            expected = side.answers(images, BATCH, lambda n: count(n, "reference"))
        except Exception as error:
            raise StartupError(f"reference: {reference.name!r} fails on the pictures: {describe(error)}") from error
    plan = _plan(expected[: len(real)], variant.largest)
    tolerance = TOLERANCES[variant.tolerance]
    threshold = float(getattr(reference, "score_threshold", 0.0))
    groups = []
    try:
        with _Side(variant.module, device, variant.precision, variant.optimize) as side:
            for name, rows, batch in plan:
                try:
                    found = side.answers([images[row] for row in rows], batch, lambda n: count(n, variant.name))
                except Exception as error:
                    groups.append(Differences(name, len(rows), batch, problems=[describe(error)]))
                    continue
                truth = [expected[row] for row in rows]
                limits = tolerance
                if name == RANDOM and tolerance.answers < 1:  # where everything is near a threshold
                    limits = replace(tolerance, top1=0.0, answers=0.0)
                groups.append(compare(name, batch, truth, found, limits, threshold))
    except _NoForm as error:
        raise StartupError(f"optimize: {error}") from error
    return Report(reference.name, variant.name, str(device), variant.tolerance, tolerance, groups, _vacuous(expected))


def _plan(real: Sequence[Answer], largest: int) -> list[tuple[str, list[int], int]]:
    """Groups of pictures by number, each with the batch size they go in; the random ones come after the real.

    The edges begin with a picture that has an answer to compare, where a detector may find nothing.
    """
    random = range(len(real), len(real) + PICTURES // 2)
    batch, odd = min(BATCH, largest), min(ODD, largest)
    first = next((n for n, each in enumerate(real) if not _is_empty(each)), 0)
    cycle = [(first + n) % len(real) for n in range(max(odd, largest))]
    return [
        ("real pictures", list(range(len(real))), batch),
        (RANDOM, list(random), batch),
        ("batch of one", cycle[:1], 1),
        ("odd batch", cycle[:odd], odd),
        ("largest batch", cycle[:largest], largest),
    ]


def _is_empty(answer: Answer) -> bool:
    return isinstance(answer.result, dict) and answer.result.get("objects") == []


def _vacuous(expected: Sequence[Answer]) -> list[str]:
    """A detector that finds nothing in any picture has not been compared at all."""
    if all(map(_is_empty, expected)):
        return ["the reference finds no object in any picture, so nothing was compared: give --images FOLDER with some"]
    return []


class _NoForm(Exception):
    """A form of the network that cannot be had here."""


class _Side:
    """A module that answers: its hooks, with what ``self.model`` gives noted on the way."""

    def __init__(self, module: Module, device: torch.device, precision: str, optimize: str) -> None:
        self._module = module
        self._runner = Runner(module, device, precision, 1)
        self._forms = _forms(module, precision, optimize, device)
        self._outputs: list[Any] = []

    def __enter__(self) -> _Side:
        network = getattr(self._module, "model", None)
        self._hook = None
        if isinstance(network, nn.Module):
            self._hook = network.register_forward_hook(lambda _, __, output: self._outputs.append(output))
        try:
            for form in self._forms:
                form.on()
        except Exception as error:
            raise _NoForm(f"{self._forms[-1].name} is not possible here: {describe(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        for form in reversed(self._forms):
            form.off()
        if self._hook is not None:
            self._hook.remove()

    def answers(self, images: Sequence[Any], batch: int, count: Callable[[int], None]) -> list[Answer]:
        """What the module answers to images of its ``image_type``. Raises what it raises."""
        found: list[Answer] = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            samples = [Sample(n, self._module.preprocess(image), 0.0) for n, image in enumerate(part)]
            self._outputs.clear()
            done = self._runner.trial(samples)
            rows = _rows(self._outputs, len(part))
            found += [Answer(row, json.loads(each.result or "null")) for row, each in zip(rows, done, strict=True)]
            count(len(part))
        return found


def _forms(module: Module, precision: str, optimize: str, device: torch.device) -> list[Form]:
    """What ``--optimize`` may put on the network, all of it: here nothing is measured."""
    model = network_of(module)
    if optimize == "off" or model is None:
        return []
    forms: list[Form] = [ChannelsLast(model, PRECISIONS[precision])] if has_images(model) else []
    if optimize == "full":
        forms.append(Compiled(model))
        if device.type == "cuda":
            forms.append(Graphs(model, BATCH))
    return forms


def _rows(outputs: Any, count: int) -> list[tuple[Tensor, ...]]:
    """The tensors that have a row for each picture, as rows; pictures of a detector's list have none."""
    leaves = [
        each.detach().float().cpu() if each.is_floating_point() else each.cpu()
        for each in pytree.tree_leaves(outputs)
        if isinstance(each, Tensor) and each.dim() and len(each) == count
    ]
    return [tuple(leaf[index] for leaf in leaves) for index in range(count)]


def _set_up(module: Module, device: torch.device) -> None:
    try:
        module.setup(device)
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(f"module: {module.name}.setup raised {describe(error)}") from error


@contextmanager
def _exact() -> Iterator[None]:
    """fp32 without the shorter products of TF32, which convolutions on a GPU use by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def first_problem(report: Report) -> str:
    """What went wrong first, for one line."""
    found = [*report.problems, *(f"{g.group}: {problem}" for g in report.groups for problem in g.problems)]
    return found[0] if found else ""
