"""From a module and its weights to a file in another format, verified before it gets its name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cvworker import __version__
from cvworker.errors import StartupError
from cvworker.export import pictures
from cvworker.export.formats import FORMATS, OPSETS, Order
from cvworker.export.network import Source, shapes_of, source_of
from cvworker.export.verify import Report, Variant, exported_of, reference_of, tolerance_of, verify
from cvworker.loading import DEMO
from cvworker.module import Module
from cvworker.modules.detect import Detect
from cvworker.modules.metadata import is_exported
from cvworker.modules.weighted import Weighted
from cvworker.weights import sha256_of

CALIBRATION = 64
"""Pictures that the ranges of int8 activations are measured on."""
CALIBRATION_BATCH = 8

Say = Callable[[str, int, int], object]
"""Told what is being done, and how far it is: done and total, or two zeros."""


@dataclass(frozen=True)
class Wishes:
    """What is to be written: see ``cvworker export --help``."""

    format: str
    precision: str | None
    opset: int
    max_batch: int
    device: torch.device
    images: Path | None
    square: bool
    verify: bool


@dataclass(frozen=True)
class Exported:
    """``report`` is None where nothing was verified; ``path`` is there only if it passed."""

    path: Path
    sha256: str
    size: int
    metadata: dict[str, str]
    report: Report | None


def check(wishes: Wishes) -> str:
    """The precision to export in. Raises StartupError for what cannot be had, or not on this machine."""
    chosen = FORMATS[wishes.format]
    if wishes.precision is not None and wishes.precision not in chosen.precisions:
        raise StartupError(
            f"precision: {wishes.format} has {', '.join(chosen.precisions)}, not {wishes.precision}"
            + ("; for ONNX Runtime on the CPU int8 is the faster one" if wishes.format == "onnx" else "")
        )
    if missing := chosen.missing(wishes.device):
        raise StartupError(f"format: {wishes.format} needs {missing}")
    if wishes.opset not in OPSETS:
        raise StartupError(f"opset: {wishes.opset} is not one that PyTorch writes; give {OPSETS[0]} to {OPSETS[-1]}")
    return wishes.precision or chosen.precisions[0]


def default_output(module: str, weights: str | None, wishes: Wishes, precision: str) -> Path:
    """In the working directory, named after the weights, the format and the precision."""
    stem = Path((weights or "").partition("#")[0]).stem if weights and weights != DEMO else ""
    stem = stem or module.rpartition(":")[2].lower()
    marks = [] if precision == FORMATS[wishes.format].precisions[0] and wishes.format != "int8" else [precision]
    marks += ["aoti"] if wishes.format == "aotinductor" else []
    return Path(".".join([stem, *marks]) + FORMATS[wishes.format].suffix)


def export(cls: type[Module], weights: str | None, output: Path, wishes: Wishes, say: Say) -> Exported:
    """Write ``output``, and compare what it answers with the module it came from.

    Raises:
        StartupError: one line that says why it cannot be exported; nothing is then written. What was written and
            answers differently is not kept either: see ``report``.
    """
    precision = check(wishes)
    if output.suffix != FORMATS[wishes.format].suffix:
        raise StartupError(f"output: {output} must end in {FORMATS[wishes.format].suffix}")
    if not output.parent.is_dir():
        raise StartupError(f"output: the folder {output.parent} does not exist")
    say("loading the module", 0, 0)
    module = reference_of(cls, weights, wishes.device)
    _ready(module, wishes)
    source = source_of(module, wishes.device)
    metadata = _metadata(module, wishes, precision)
    order = Order(
        name=module.name,
        network=source.network.eval(),
        shapes=shapes_of(source, pictures.real(module, wishes.images, 1)[0], module.name),
        device=wishes.device,
        precision=precision,
        opset=wishes.opset,
        max_batch=wishes.max_batch,
        boxes=isinstance(module, Detect),
        calibration=lambda: _calibration(module, source, wishes.images),
        metadata=metadata,
    )
    # the loaders go by the suffix
    handle, name = tempfile.mkstemp(prefix=f".{output.stem}.", suffix=output.suffix, dir=output.parent)
    os.close(handle)
    part = Path(name)
    try:
        say(f"writing {wishes.format}", 0, 0)
        FORMATS[wishes.format].write(order, part)
        digest, size = sha256_of(part), part.stat().st_size
        report = _verified(cls, weights, module, part, wishes, say) if wishes.verify else None
        if report is None or report.passed:
            part.chmod(0o666 & ~_umask())
            part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return Exported(output, digest, size, metadata, report)


def _ready(module: Module, wishes: Wishes) -> None:
    """Refuse what is exported already; make ``detect`` take squares where that is wished."""
    if module.weights is not None and is_exported(module.weights):
        raise StartupError(f"weights: {module.weights} is exported already; give the file that it was made from")
    if isinstance(module, Detect) and module.max_size is not None:
        if not wishes.square:
            raise module.spec.refuse(
                "has metadata 'max_size', by which pictures keep their shape, but an exported detector takes squares: "
                "--square exports it for pictures stretched to input_size, which changes its answers somewhat"
            )
        module.max_size = None


def _metadata(module: Module, wishes: Wishes, precision: str) -> dict[str, str]:
    """What the weights say of themselves, and where the file comes from. No date: the same export is the same file."""
    carried = dict(module.spec.metadata) if isinstance(module, Weighted) else {}
    carried.pop("max_size", None)
    own = {
        "format": wishes.format,
        "precision": precision,
        "max_batch": str(wishes.max_batch),
        "torch": torch.__version__,
        "cvworker": __version__,
    }
    if FORMATS[wishes.format].has_opset:
        own["opset"] = str(wishes.opset)
    if module.weights is not None:
        own["exported_from"] = sha256_of(module.weights)
    return carried | own


def _calibration(module: Module, source: Source, folder: Path | None) -> Iterator[tuple[Tensor, ...]]:
    images = pictures.real(module, folder, CALIBRATION)
    for start in range(0, len(images), CALIBRATION_BATCH):
        yield source.inputs(images[start : start + CALIBRATION_BATCH])


def _verified(
    cls: type[Module], weights: str | None, reference: Module, part: Path, wishes: Wishes, say: Say
) -> Report:
    variant = Variant(
        name=wishes.format,
        module=exported_of(cls, part, weights, wishes.device),
        precision="fp32",
        optimize="off",
        largest=wishes.max_batch,
        tolerance=tolerance_of(part, "fp32", wishes.device),
    )
    return verify(reference, variant, wishes.device, wishes.images, say)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
