"""What lies in a checkpoint: the tensors of one network, and what was saved beside them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cvworker.errors import StartupError
from cvworker.modules.metadata import first_line

HOMES = ("state_dict", "model_state_dict", "model_ema", "ema", "model", "net", "network", "weights", "params")
"""Where training scripts keep the state dict in what they save."""
CLASSES = ("classes", "class_names", "labels", "categories", "idx_to_class", "id2label", "class_to_idx")
ARCHITECTURE = ("architecture", "arch", "model_name")
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""What DistributedDataParallel, torch.compile, Lightning and people put in front of every name."""


@dataclass
class Checkpoint:
    """``tensors`` by name, without wrappers; ``hints`` are the metadata that the file itself has, as JSON would."""

    path: Path
    tensors: dict[str, Tensor]
    hints: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Names of what is no tensor of the network."""


def read(path: Path) -> Checkpoint:
    """Read a ``.safetensors`` file or what ``torch.save`` wrote, without running code that the file may carry.

    Raises:
        StartupError: one line that names the file, what is wrong and the way out.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise _refuse(path, f"cannot be opened ({error.strerror or error}); give a checkpoint") from None
    if not start:
        raise _refuse(path, "is empty; copy or download it again")
    saved = _unpickled(path) if start.startswith((b"PK\x03\x04", b"\x80")) else _safetensors(path)
    state, hints = _state_dict(path, saved)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    left_out = [name for name in state if name not in tensors]
    return Checkpoint(path, _unwrapped(tensors, left_out), hints, left_out)


def class_names(value: Any) -> list[str] | None:
    """Names in the order of the outputs, from a list, ``{index: name}`` or ``{name: index}``; None if it is none."""
    if isinstance(value, Mapping) and value:
        pairs = list(value.items())
        if all(isinstance(index, int) for _, index in pairs):
            pairs = [(index, name) for name, index in pairs]
        try:
            by_index = {int(index): name for index, name in pairs}
        except (TypeError, ValueError):
            return None
        value = [by_index[index] for index in sorted(by_index)] if set(by_index) == set(range(len(by_index))) else None
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        return list(value)
    return None


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise _refuse(
            path,
            f"holds more than tensors{what} and would run code when loaded; where it was trained, save "
            "model.state_dict() and pack that",
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        if "TorchScript" in str(error):
            raise _refuse(
                path, "is a TorchScript archive, not a checkpoint; pack the state dict it came from"
            ) from None
        raise _refuse(path, f"cannot be read ({first_line(error)[:120]}); copy or download it again") from None


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return {"state_dict": load_file(path), **{key: _value(text) for key, text in metadata.items()}}
    except (SafetensorError, OSError) as error:
        raise _refuse(
            path, f"is neither a checkpoint of torch.save nor a sound safetensors file ({first_line(error)[:120]})"
        ) from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _state_dict(path: Path, saved: Any) -> tuple[Mapping[str, Any], dict[str, Any]]:
    if not isinstance(saved, Mapping):
        raise _refuse(path, f"holds a {type(saved).__name__}, not a state dict; save model.state_dict() and pack that")
    hints: dict[str, Any] = {}
    for key in CLASSES:
        if names := class_names(saved.get(key)):
            hints.setdefault("classes", names)
    for key in ARCHITECTURE:
        if isinstance(saved.get(key), str):
            hints.setdefault("architecture", saved[key])
    for key in ("input_size", "mean", "std"):
        if key in saved and not isinstance(saved[key], Tensor | Mapping):
            hints[key] = saved[key]
    if any(isinstance(value, Tensor) for value in saved.values()):
        return saved, hints
    for home in HOMES:
        state = saved.get(home)
        if isinstance(state, Mapping) and any(isinstance(value, Tensor) for value in state.values()):
            return state, hints
    keys = ", ".join(str(key) for key in list(saved)[:8]) or "nothing"
    raise _refuse(path, f"has no state dict in it (it has: {keys}); save model.state_dict() and pack that")


def _unwrapped(tensors: dict[str, Tensor], left_out: list[str]) -> dict[str, Tensor]:
    """Without what stands in front of every name; what does not stand behind it is no tensor of the network."""
    while True:
        for wrapper in WRAPPERS:
            inside = {name.removeprefix(wrapper): value for name, value in tensors.items() if name.startswith(wrapper)}
            if len(inside) > len(tensors) / 2:
                left_out += [name for name in tensors if not name.startswith(wrapper)]
                tensors = inside
                break
        else:
            return tensors


def _refuse(path: Path, problem: str) -> StartupError:
    return StartupError(f"checkpoint: {path} {problem}")
