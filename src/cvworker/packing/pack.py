"""From a checkpoint and what is said of it to a weights file for the built-in modules, tried before it is kept."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cvworker.errors import StartupError
from cvworker.loading import load
from cvworker.modules.weighted import Weighted
from cvworker.packing import architecture as known
from cvworker.packing.checkpoint import Checkpoint, class_names, read
from cvworker.weights import sha256_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT_SIZE = 224


@dataclass
class Wishes:
    """What the user says; None is left to the checkpoint, and then to what torchvision's own weights use."""

    architecture: str | None = None
    classes: list[str] | None = None
    input_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    module: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Packed:
    """``understood``: what is in the file, as rows of name, value and where the value came from."""

    path: Path
    sha256: str
    module: str
    understood: list[tuple[str, str, str]]
    example: Any
    """The module's result for its example."""


def pack(checkpoint: Path, output: Path, wishes: Wishes, say: Callable[[str], object] = lambda _: None) -> Packed:
    """Write ``output``, a safetensors file that describes itself, and try it in its module.

    Raises:
        StartupError: one line that says what is missing or wrong; nothing is then written.
    """
    if output.suffix != ".safetensors":
        raise StartupError(f"output: {output} must end in .safetensors")
    if not output.parent.is_dir():
        raise StartupError(f"output: the folder {output.parent} does not exist")
    say(f"reading {checkpoint}")
    found = read(checkpoint)
    facts = _Facts()
    _architecture(found, wishes, facts, say)
    _classes(found, wishes, facts)
    _preprocessing(found, wishes, facts)
    for key, value in wishes.extra.items():
        facts.note(key, value, "given")
    module = wishes.module or ("detect" if known.is_detector(facts["architecture"]) else "scene")
    say(f"trying it in the module {module!r}")
    part = Path(tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)[1])
    try:
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.values.items()}
        save_file({name: tensor.contiguous().clone() for name, tensor in found.tensors.items()}, part, metadata)
        example = _try(module, part, checkpoint)
        digest = sha256_of(part)
        part.chmod(0o666 & ~_umask())
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return Packed(output, digest, module, [*facts.rows(), *_tensors(found)], example)


class _Facts:
    """Metadata, each value with its origin."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._origins: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def note(self, key: str, value: Any, origin: str) -> None:
        self.values[key] = value
        self._origins[key] = origin

    def rows(self) -> list[tuple[str, str, str]]:
        return [(key, _shown(value), self._origins[key]) for key, value in self.values.items()]


def _architecture(found: Checkpoint, wishes: Wishes, facts: _Facts, say: Callable[[str], object]) -> None:
    named = wishes.architecture or found.hints.get("architecture")
    if named in known.names():
        facts.note("architecture", named, "given" if wishes.architecture else "from the checkpoint")
        return
    if wishes.architecture:
        raise StartupError(
            f"architecture: torchvision has no {wishes.architecture!r}; leave it out to have it recognised, or name "
            "one such as 'resnet50', 'efficientnet_b0', 'vit_b_16' or 'fasterrcnn_resnet50_fpn_v2'"
        )
    say("looking for the architecture")
    classes = wishes.classes or found.hints.get("classes")
    name = known.recognise(found.tensors, len(classes) if classes else None)
    if name is None and classes:
        name = known.recognise(found.tensors, None)  # the classes are then what is wrong
    if name is None:
        first = ", ".join(list(found.tensors)[:2])
        raise StartupError(
            f"checkpoint: {found.path} is of no architecture of torchvision's that could be recognised (its tensors "
            f"begin with {first}); name it with --architecture, for a detector also its --classes; for a network of "
            "another library write a module (docs/write-a-module.md)"
        )
    facts.note("architecture", name, f"recognised by {len(found.tensors)} tensors")


def _classes(found: Checkpoint, wishes: Wishes, facts: _Facts) -> None:
    name, outputs = facts["architecture"], known.outputs_of(facts["architecture"], found.tensors)
    usual = known.usual(name)
    if wishes.classes:
        classes, origin = wishes.classes, "given"
    elif hinted := class_names(found.hints.get("classes")):
        classes, origin = hinted, "from the checkpoint"
    elif usual and usual.categories and outputs in (None, len(usual.categories)):
        classes, origin = _distinct(usual.categories), "torchvision's own for this architecture"
    else:
        raise StartupError(
            f"classes: {found.path} does not name its {outputs or ''} classes; give --classes FILE, a JSON list or "
            "one name a line, in the order of the outputs".replace("  ", " ")
        )
    if outputs is not None and len(classes) != outputs:
        raise StartupError(f"classes: there are {len(classes)}, but {found.path} has {outputs} outputs; give as many")
    facts.note("classes", classes, origin)


def _preprocessing(found: Checkpoint, wishes: Wishes, facts: _Facts) -> None:
    usual = known.usual(facts["architecture"])
    usually = "usual for it; was it trained so?"
    fallback = {"input_size": INPUT_SIZE, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for key, default in fallback.items():
        given = getattr(wishes, key)
        if given is not None:
            facts.note(key, given, "given")
        elif key in found.hints:
            facts.note(key, found.hints[key], "from the checkpoint")
        else:
            facts.note(key, getattr(usual, key) if usual else default, usually)
    if usual and usual.max_size and "max_size" not in wishes.extra:
        facts.note("max_size", usual.max_size, usually)


def _try(module: str, part: Path, checkpoint: Path) -> Any:
    """The module's own checks, and its example through it; it speaks of the checkpoint, not of our temporary file."""
    cls = load(module)
    if not issubclass(cls, Weighted):
        raise StartupError(f"module: {module!r} does not take such a file; give threat, scene, detect or one like them")
    try:
        made = cls(part)
        made.setup(torch.device("cpu"))
    except StartupError as error:
        said = str(error).replace(str(part), str(checkpoint))
        raise StartupError(f"{said} (here: --classes, --input-size, --mean, --std and, for the rest, --meta)") from None
    batch = made.collate([made.preprocess(made.example())] * 2)
    with torch.inference_mode():
        return made.process(batch)[0]


def _tensors(found: Checkpoint) -> list[tuple[str, str, str]]:
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})
    size = sum(tensor.numel() for tensor in found.tensors.values())
    rows = [("tensors", f"{len(found.tensors)}, {size / 1e6:.1f} million values", ", ".join(kinds))]
    if found.left_out:
        rows.append(("left out", _shown(found.left_out), "no tensors of the network"))
    return rows


def _distinct(names: Sequence[str]) -> list[str]:
    """Torchvision's lists have "N/A" where the data set skips a number, and some names twice."""
    return [name if names.index(name) == index else f"{name} ({index})" for index, name in enumerate(names)]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 6:
        return f"{len(value)}: {', '.join(str(each) for each in value[:4])}, …"
    if isinstance(value, list | tuple):
        return ", ".join(str(each) for each in value)
    return str(value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
