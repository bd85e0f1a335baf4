"""Weights to export, and files that were exported and then broken."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cvworker.export.export import Exported, Wishes, export
from cvworker.loading import load
from cvworker.modules.metadata import EXTRA_FILE

CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "bird", "fish"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def weights(path: Path, architecture: str, side: int, **more: Any) -> Path:
    """Untrained weights of a torchvision classifier, of which every class answers to something else."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model(architecture, weights=None, num_classes=len(CLASSES)).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight)
    # one pass sets the batch norms to what comes, or logits would be all alike or without bounds
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        network.train()(torch.rand(16, 3, side, side) * 4 - 2)
    metadata = {"architecture": architecture, "classes": CLASSES, "input_size": side, "mean": MEAN, "std": STD, **more}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file(network.state_dict(), path, texts)
    return path


def exported(module: str, source: Path | str | None, output: Path, format: str, **wishes: Any) -> Exported:
    values: dict[str, Any] = {
        "precision": None,
        "opset": 20,
        "max_batch": 9,
        "device": CPU,
        "images": None,
        "square": False,
        "verify": True,
    }
    return export(
        load(module),
        None if source is None else str(source),
        output,
        Wishes(format=format, **values | wishes),
        lambda what, done, total: None,
    )


def with_metadata(path: Path, target: Path, change: Callable[[dict[str, str]], None]) -> Path:
    """A copy of an exported file whose metadata are other ones, and its network the same."""
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        values = {each.key: each.value for each in model.metadata_props}
        change(values)
        onnx.helper.set_model_props(model, values)
        onnx.save(model, target)
        return target

    def changed(name: str, data: bytes) -> bytes:
        if not name.endswith(f"/{EXTRA_FILE}"):
            return data
        values = json.loads(data)
        change(values)
        return json.dumps(values).encode()

    return _rewritten(path, target, changed)


def with_bytes(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    """A copy of an exported file in which ``old``, which is there once, is ``new``, of the same length."""
    assert len(old) == len(new)
    if path.suffix == ".onnx":
        data = path.read_bytes()
        assert data.count(old) == 1
        target.write_bytes(data.replace(old, new))
        return target
    seen: list[int] = []

    def changed(name: str, data: bytes) -> bytes:
        seen.append(data.count(old))
        return data.replace(old, new)

    _rewritten(path, target, changed)
    assert sum(seen) == 1
    return target


def swapped(values: dict[str, str]) -> None:
    """The mean where the standard deviation belongs, and the other way round."""
    values["mean"], values["std"] = values["std"], values["mean"]


def _rewritten(path: Path, target: Path, changed: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, changed(name, archive.read(name)))
    return target
