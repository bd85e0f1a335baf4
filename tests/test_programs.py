"""Exported networks as weights: programs of ``torch.export``, and ONNX models."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from cvworker.errors import StartupError
from cvworker.loading import make
from cvworker.modules.detect import Detect
from cvworker.modules.metadata import EXTRA_FILE, read_metadata
from cvworker.modules.scene import Scene
from world import BIN

SIDE = 32
METADATA = {
    "architecture": "small",
    "classes": json.dumps(["cat", "dog", "bird"]),
    "input_size": str(SIDE),
    "mean": "[0.5, 0.5, 0.5]",
    "std": "[0.25, 0.25, 0.25]",
}


class Small(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images).relu().mean((2, 3)))
        return logits


def export(
    path: Path,
    *,
    classes: int = 3,
    dynamic: bool = True,
    metadata: dict[str, str] | None = None,
    network: nn.Module | None = None,
) -> Path:
    """A network, by default the small one, as ``path``'s suffix has it."""
    shapes = {0: torch.export.Dim("batch", min=1, max=1024)} if dynamic else None
    images = torch.zeros(2, 3, SIDE, SIDE)
    network = (network or Small(classes)).eval()
    values = METADATA if metadata is None else metadata
    if path.suffix == ".pt2":
        program = torch.export.export(network, (images,), dynamic_shapes=(shapes,))
        torch.export.save(program, path, extra_files={EXTRA_FILE: json.dumps(values)})
    else:
        exported = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=(shapes,), verbose=False)
        assert exported is not None
        model = exported.model_proto
        onnx.helper.set_model_props(model, values)
        onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {suffix: export(folder / f"small.{suffix}") for suffix in ("pt2", "onnx")}


def refusal(path: Path) -> str:
    with pytest.raises(StartupError) as refused:
        make(Scene, str(path)).setup(torch.device("cpu"))
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_an_exported_network_gives_the_answers_of_the_one_it_came_from(exported: dict[str, Path], suffix: str) -> None:
    module = Scene(exported[suffix])
    module.setup(torch.device("cpu"))
    images = torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        expected = Small().eval()((images / 255 - 0.5) / 0.25)
        assert torch.allclose(module.logits(images), expected, atol=1e-5)
        assert [each["label"] for each in module.process(images)] == [
            module.spec.classes[index] for index in expected.argmax(1).tolist()
        ]


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_metadata_is_read_without_the_library_that_runs_the_network(exported: dict[str, Path], suffix: str) -> None:
    code = (
        "import sys; from pathlib import Path; from cvworker.modules.metadata import read_metadata;"
        f"assert read_metadata(Path({str(exported[suffix])!r}))['architecture'] == 'small';"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([BIN / "python", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_check_runs_an_exported_network_through_every_step(exported: dict[str, Path], suffix: str) -> None:
    path = exported[suffix]
    weights = f"{path}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}" if suffix == "pt2" else str(path)
    command = [BIN / "cvworker", "check", "--module", "scene", "--weights", weights, "--preprocess-workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ready to run" in done.stdout


def test_a_program_is_loaded_only_where_it_is_named_with_its_digest(exported: dict[str, Path]) -> None:
    command = [BIN / "cvworker", "check", "--module", "scene", "--weights", exported["pt2"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "#sha256=" in done.stderr


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"classes": 5}, r"gives \[\[1, 5\]\] where"),
        ({"dynamic": False}, "dynamic batch dimension"),
        ({"metadata": {}}, "does not say its architecture"),
    ],
    ids=["classes", "fixed batch", "no metadata"],
)
def test_what_does_not_fit_its_metadata_is_refused_in_one_line(
    tmp_path: Path, suffix: str, wrong: dict[str, Any], expected: str
) -> None:
    path = export(tmp_path / f"wrong.{suffix}", **wrong)
    assert re.search(expected, refusal(path))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_a_damaged_file_is_refused_in_one_line(
    exported: dict[str, Path], tmp_path: Path, suffix: str, damage: str
) -> None:
    path, sound = tmp_path / f"bad.{suffix}", exported[suffix].read_bytes()
    if damage != "missing":
        path.write_bytes({"cut": sound[: len(sound) // 2], "empty": b"", "text": b"weights, honestly"}[damage])
    refusal(path)


def test_a_program_whose_archive_has_no_metadata_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bare.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bare/version", "1")
    assert read_metadata(path) == {}
    assert "does not say its architecture" in refusal(path)


class Spots(nn.Module):
    """Finds two objects in each picture: one where red is strongest on average, and one that is none."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        redness = images.mean((2, 3))
        box = torch.tensor([[4.0, 8.0, 16.0, 24.0], [0.0, 0.0, 0.0, 0.0]]).expand(images.shape[0], 2, 4)
        scores = torch.stack([redness[:, 0].sigmoid(), redness[:, 0] * 0.0], 1)
        return box * 1.0, scores, redness[:, :2].argmax(1, keepdim=True).expand(-1, 2) + 0


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_an_exported_detector_gives_boxes_in_pixels_of_the_original(tmp_path: Path, suffix: str) -> None:
    path = export(tmp_path / f"spots.{suffix}", network=Spots())
    module = Detect(path)
    module.setup(torch.device("cpu"))
    red, green = torch.zeros(2, 3, 64, 128, dtype=torch.uint8)
    red[0], green[1] = 255, 255
    with torch.inference_mode():
        results = module.process(module.collate([module.preprocess(each) for each in (red, green)]))
    assert [[each["label"] for each in result["objects"]] for result in results] == [["cat"], []]
    assert results[0]["objects"][0]["box"] == [16.0, 16.0, 64.0, 48.0]
    assert (results[0]["width"], results[0]["height"]) == (128, 64)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_classifier_is_no_detector(exported: dict[str, Path], suffix: str) -> None:
    with pytest.raises(StartupError, match="metadata means boxes"):
        Detect(exported[suffix]).setup(torch.device("cpu"))
