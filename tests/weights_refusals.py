"""Ways in which a weights file may be bad, whichever built-in module it is for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvworker.errors import StartupError
from cvworker.modules.spec import read_spec
from cvworker.modules.weighted import Weighted

Writer = Callable[[Path, Path], Any]
"""Writes a bad file to the second path, given a good one."""


def changed(**changes: str | None) -> Writer:
    """The good file with other metadata; None leaves an entry out."""

    def write(good: Path, path: Path) -> None:
        metadata = dict(read_spec(good).metadata) | changes
        save_file(load_file(good), path, {key: value for key, value in metadata.items() if value is not None} or None)

    return write


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Writer:
    """The good file with its tensors changed in place."""

    def write(good: Path, path: Path) -> None:
        values = load_file(good)
        change(values)
        save_file(values, path, dict(read_spec(good).metadata))

    return write


FILES: list[tuple[Writer, str]] = [
    (lambda good, path: None, "cannot be opened (No such file or directory)"),
    (lambda good, path: path.mkdir(), "cannot be opened (Is a directory)"),
    (lambda good, path: path.write_bytes(b""), "is no safetensors file, or a damaged one"),
    (lambda good, path: path.write_bytes(good.read_bytes()[:-1000]), "is no safetensors file, or a damaged one"),
    (lambda good, path: path.write_bytes(good.read_bytes()[:100]), "is no safetensors file, or a damaged one"),
    (lambda good, path: torch.save({"fc.weight": torch.zeros(1)}, path), "is a pickle"),
    (lambda good, path: path.write_bytes(pickle.dumps({"fc.weight": 1})), "is a pickle"),
]
METADATA: list[tuple[Writer, str]] = [
    (changed(architecture=None), "does not say its architecture"),
    (changed(architecture="resnet19"), "names an architecture that torchvision does not have: 'resnet19'"),
    (changed(classes="bomb, gun"), "has metadata 'classes' that is not JSON"),
    (changed(classes='["gun", "gun"]'), "has metadata 'classes' that is not a JSON list of distinct names"),
    (changed(classes='["N/A", "N/A"]'), "has metadata 'classes' that is not a JSON list of distinct names"),
    (changed(input_size="0"), "has metadata 'input_size' 0"),
    (changed(std="[0.2, 0, 0.2]"), "has metadata 'std' [0.2, 0, 0.2]"),
    (changed(mean="[0.5, NaN, 0.5]"), "has metadata 'mean' [0.5, nan, 0.5]"),
]


def first_weight(values: dict[str, torch.Tensor]) -> str:
    return next(name for name in values if name.endswith(".weight"))


TENSORS: list[tuple[Writer, str]] = [
    (tensors(lambda values: values.pop(first_weight(values))), "lacks the tensor '"),
    (tensors(lambda values: values.update(extra=torch.zeros(1))), "has the tensor 'extra', which "),
    (tensors(lambda values: values[first_weight(values)].fill_(float("nan"))), "that are not finite; train or convert"),
    (tensors(lambda values: values.update({first_weight(values): torch.zeros(1)})), " of shape [1], but "),
]


def refusal(module: type[Weighted], path: Path) -> str:
    """The one line that the worker would end with."""
    with pytest.raises(StartupError) as error:
        module(path).setup(torch.device("cpu"))
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"weights: {path} ")
    assert "; " in text, "a way out follows the problem"
    return text
