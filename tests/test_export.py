"""``cvworker export``: a network in another format that the modules take as weights, or one line that says why not."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cvworker import weights as weights_of
from cvworker.errors import StartupError
from cvworker.export.detectors import best
from cvworker.export.formats import FORMATS, OPSET
from cvworker.loading import load, make
from cvworker.model.optimize import has_compiler
from cvworker.modules.metadata import EXTRA_FILE, is_native, read_metadata
from cvworker.modules.networks import load_network
from cvworker.net import AddressGuard
from export_files import CPU, exported, weights
from world import BIN, MODULES

NETWORKS = MODULES / "exportable.py"
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def few_pictures() -> Iterator[None]:
    """Fewer than in earnest, so that the tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvworker.export.verify.PICTURES", 8)
        patch.setattr("cvworker.export.export.CALIBRATION", 16)
        yield


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's module, compiled: that takes long, so all tests share one."""
    folder = tmp_path_factory.mktemp("package")
    return exported(f"{NETWORKS}:Keeps", None, folder / "keeps.aoti.pt2", "aotinductor").path


def refusal(module: str, output: Path, format: str, source: Path | str | None = None, **wishes: Any) -> str:
    with pytest.raises(StartupError) as refused:
        exported(module, source, output, format, **wishes)
    assert list(output.parent.glob(".*")) == []
    assert not output.exists()
    return str(refused.value)


def line_of(code: str) -> int:
    return 1 + next(n for n, line in enumerate(NETWORKS.read_text().splitlines()) if code in line)


@pytest.mark.parametrize(
    ("architecture", "format", "precision"),
    [
        ("resnet18", "torch-export", "fp32"),
        ("resnet18", "onnx", "fp16"),
        ("mobilenet_v3_small", "onnx", "fp32"),
        ("mobilenet_v3_small", "torch-export", "fp32"),
    ],
)
def test_an_exported_classifier_is_weights_that_say_what_they_are(
    tmp_path: Path, architecture: str, format: str, precision: str
) -> None:
    source = weights(tmp_path / "net.safetensors", architecture, 64, top_k=2)
    output = tmp_path / f"exported{FORMATS[format].suffix}"
    done = exported("scene", source, output, format, precision=precision)
    assert done.report is not None
    assert done.report.passed, done.report
    assert done.report.tolerance_name == precision
    assert set(tmp_path.iterdir()) == {source, output}
    metadata = read_metadata(output)
    with safe_open(source, framework="numpy") as tensors:
        assert metadata.items() >= tensors.metadata().items()
    assert metadata["precision"] == precision
    assert metadata["exported_from"] == weights_of.sha256_of(source)
    assert metadata["torch"] == torch.__version__
    assert metadata.get("opset") == ("20" if format == "onnx" else None)
    if format == "onnx":
        assert [each.version for each in onnx.load(output).opset_import if each.domain == ""] == [OPSET]


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_the_same_export_is_the_same_file_and_tells_nothing_of_this_machine(tmp_path: Path, format: str) -> None:
    suffix = FORMATS[format].suffix
    files = [
        exported(f"{NETWORKS}:Keeps", None, tmp_path / f"{n}{suffix}", format, verify=False).path.read_bytes()
        for n in range(2)
    ]
    assert files[0] == files[1]
    assert b"exportable.py" not in files[0]


def test_check_runs_an_int8_export_through_every_step(tmp_path: Path) -> None:
    done = exported("threat", "demo", tmp_path / "threat.int8.onnx", "int8")
    assert done.report is not None
    assert done.report.passed, done.report
    assert done.size < 0.6 * exported("threat", "demo", tmp_path / "threat.onnx", "onnx", verify=False).size
    command = [BIN / "cvworker", "check", "--module", "threat", "--weights", done.path, "--preprocess-workers", "1"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert checked.returncode == 0, checked.stderr
    assert "ready to run" in checked.stdout


DETECTORS = [
    ("ssdlite320_mobilenet_v3_large", 128, 0.05),
    ("fasterrcnn_mobilenet_v3_large_320_fpn", 72, 0.02),
    ("retinanet_resnet50_fpn", 64, 0.01),
    ("fcos_resnet50_fpn", 64, 0.01),
]
"""With the side of their squares, and the spread of the last layers' weights: with more all scores would be 1."""


def detector(path: Path, architecture: str, side: int, spread: float) -> Path:
    """Untrained weights that find many objects, with scores that are no ties."""
    from cvworker.modules import detectors
    from cvworker.modules.spec import Spec

    classes = ("__background__", "cat", "dog")
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    torch.manual_seed(0)
    network = detectors.build(Spec(path, architecture, classes, side, mean, std, {}), 0.05)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    for name, values in network.named_parameters():
        if re.search("cls|class|bbox|score", name):
            torch.nn.init.zeros_(values) if values.dim() == 1 else torch.nn.init.normal_(values, std=spread)
    with torch.no_grad():
        network.backbone.train()(torch.rand(8, 3, side, side) * 4 - 2)  # type: ignore[operator, union-attr]
    metadata = {"classes": classes, "input_size": side, "mean": mean, "std": std, "score_threshold": 0.05}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    save_file(network.state_dict(), path, {"architecture": architecture, **texts})
    return path


@pytest.mark.parametrize(("architecture", "side", "spread"), DETECTORS, ids=[each[0] for each in DETECTORS])
def test_a_detector_that_keeps_its_batch_together_finds_what_torchvisions_does(
    tmp_path: Path, architecture: str, side: int, spread: float
) -> None:
    from cvworker.export.network import source_of
    from cvworker.export.pictures import real

    module = make(load("detect"), str(detector(tmp_path / "net.safetensors", architecture, side, spread)))
    module.setup(CPU)
    source = source_of(module, CPU)
    images = real(module, None, 4)
    with torch.inference_mode():
        expected = module.model([module.preprocess(image)["image"] for image in images])  # type: ignore[attr-defined]
        boxes, scores, labels = source.network(*source.inputs(images))
    assert sum(len(each["scores"]) for each in expected) > 10
    for n, each in enumerate(expected):
        count = int((scores[n] > 0).sum())
        assert count == len(each["scores"])
        assert torch.allclose(scores[n, :count], each["scores"], atol=1e-5)
        # where scores tie, the order of their boxes is nobody's
        ours, theirs = (
            sorted(torch.cat([b, label[:, None]], 1).round(decimals=1).tolist())
            for b, label in ((boxes[n, :count], labels[n, :count]), (each["boxes"], each["labels"]))
        )
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        assert same >= 0.5 * count, (same, count)


def test_faster_rcnn_is_exported_with_everything_that_comes_after_the_network(tmp_path: Path) -> None:
    source = detector(tmp_path / "net.safetensors", *DETECTORS[1])
    done = exported("detect", source, tmp_path / "net.onnx", "onnx", max_batch=3)
    assert done.report is not None
    real, *_ = done.report.groups  # where untrained scores almost tie, another box may win
    assert real.objects is not None
    assert real.objects > 0.9, done.report


def test_the_demos_classifier_runs_in_half_precision(tmp_path: Path) -> None:
    done = exported("threat", "demo", tmp_path / "net.pt2", "torch-export", precision="bf16")
    assert done.report is not None
    assert done.report.passed, done.report
    assert done.report.tolerance_name == "bf16"
    assert (done.report.groups[0].rms or 0) > 1e-4


def test_the_demos_detector_runs_as_a_program(tmp_path: Path) -> None:
    done = exported("detect", "demo", tmp_path / "net.pt2", "torch-export")
    assert done.report is not None
    assert done.report.passed, done.report


def test_boxes_of_other_pictures_and_other_classes_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0]]).expand(2, 3, 4)
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.2, 0.8, 0.0]])
    groups = torch.tensor([[1, 1, 2], [1, 1, 2]])
    kept, places = best(boxes, scores, groups, 0.1, 0.5, 3)
    assert kept.tolist() == [pytest.approx([0.9, 0.7, 0.0]), pytest.approx([0.8, 0.0, 0.0])]
    assert places[:, 0].tolist() == [0, 1]


def test_a_detector_that_keeps_the_shape_of_pictures_is_exported_on_request(tmp_path: Path) -> None:
    demo = load("detect").demo_weights  # type: ignore[attr-defined]
    with safe_open(demo, framework="numpy") as tensors:
        metadata = tensors.metadata()
    source = tmp_path / "shaped.safetensors"
    save_file(load_file(demo), source, metadata | {"max_size": "256"})
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "net.onnx"
    assert "--square" in refusal("detect", output, "onnx", source)
    exported("detect", source, output, "onnx", square=True)
    assert "max_size" not in read_metadata(output)


@pytest.mark.parametrize(
    ("name", "format", "operator", "line"),
    [
        ("KeepsBranches", "torch-export", "maps.mean() > 0.5", "if maps.mean() > 0.5"),
        ("KeepsNumpy", "onnx", "maps.detach().numpy()", "numpy.fft.fft"),
        ("KeepsLoops", "torch-export", "for each in maps", "torch.stack"),
        ("KeepsRare", "onnx", "aten.linalg_eig", "torch.linalg.eigvals"),
    ],
)
def test_what_cannot_be_exported_is_told_with_its_operator_and_line(
    tmp_path: Path, name: str, format: str, operator: str, line: str
) -> None:
    text = refusal(f"{NETWORKS}:{name}", tmp_path / f"net{FORMATS[format].suffix}", format)
    assert "\n" not in text
    assert f"cannot be exported as {format} because of the operator" in text
    assert operator in text
    assert f"{NETWORKS}:{line_of(line)}" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("KeepsNothing", "no network in self.model"), ("OneByOne", "with the whole batch")],
)
def test_a_module_without_a_network_to_take_says_what_to_do(tmp_path: Path, name: str, expected: str) -> None:
    assert expected in refusal(f"{NETWORKS}:{name}", tmp_path / "net.onnx", "onnx")


@pytest.mark.parametrize(
    ("format", "wishes", "expected"),
    [
        ("onnx", {"precision": "bf16"}, "onnx has fp32, fp16, not bf16"),
        ("int8", {"precision": "fp32"}, "int8 has int8"),
        ("onnx", {"opset": 9}, "give 18 to 23"),
        ("tensorrt", {}, "needs the package tensorrt"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_loaded(
    tmp_path: Path, format: str, wishes: dict[str, Any], expected: str
) -> None:
    assert expected in refusal("scene", tmp_path / "net.onnx", format, "demo", **wishes)


def test_without_a_compiler_aotinductor_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler (c++, g++, clang++, or CXX)" in refusal(
        "scene", tmp_path / "net.pt2", "aotinductor", "demo"
    )


def test_what_is_exported_already_is_not_exported_again(tmp_path: Path) -> None:
    path = exported("scene", "demo", tmp_path / "scene.onnx", "onnx", verify=False).path
    assert "is exported already" in refusal("scene", tmp_path / "again.onnx", "onnx", path)


def test_an_export_that_answers_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cvworker.export import export as exporting

    metadata = exporting._metadata

    def wrong(*args: Any) -> dict[str, str]:
        return metadata(*args) | {"mean": "[0.9, 0.9, 0.9]"}

    monkeypatch.setattr(exporting, "_metadata", wrong)
    done = exported("scene", "demo", tmp_path / "scene.onnx", "onnx")
    assert done.report is not None
    assert not done.report.passed
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_file_and_says_how_to_run_it(tmp_path: Path) -> None:
    command = [BIN / "cvworker", "export", "--module", f"{NETWORKS}:Keeps", "--format", "onnx", "--max-batch", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256((tmp_path / "keeps.onnx").read_bytes()).hexdigest()
    assert f"--weights 'keeps.onnx#sha256={digest}'" in done.stdout
    assert "opset 20" in done.stdout
    assert "limits for fp32" in done.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--force" in again.stderr


def test_a_users_module_runs_with_its_exported_network_as_the_documentation_has_it(tmp_path: Path) -> None:
    path = exported(f"{NETWORKS}:Keeps", None, tmp_path / "keeps.onnx", "onnx").path
    before, after = make(load(f"{NETWORKS}:Loads"), None), make(load(f"{NETWORKS}:Loads"), str(path))
    batch = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    results = []
    for module in (before, after):
        module.setup(CPU)
        with torch.inference_mode():
            results.append([each["scores"] for each in module.process(batch)])
    assert results[0] == [pytest.approx(row, abs=1e-5) for row in results[1]]


@needs_compiler
def test_a_compiled_package_answers_as_the_network_does(package: Path) -> None:
    network = load_network(package, CPU)
    module: Any = make(load(f"{NETWORKS}:Keeps"), None)
    module.setup(CPU)
    with torch.inference_mode():
        for count in (1, 7, 64):
            batch = torch.rand(count, 3, 32, 32)
            assert torch.allclose(network(batch), module.model(batch), atol=1e-5)


@needs_compiler
def test_a_compiled_package_is_only_loaded_where_it_was_made_and_named_with_its_digest(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export_files import with_metadata

    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    assert is_native(package)
    with pytest.raises(StartupError, match="#sha256="):
        weights_of.local(str(package), AddressGuard())
    assert weights_of.local(f"{package}#sha256={digest}", AddressGuard()) == str(package)
    monkeypatch.setattr(weights_of, "_fetch", lambda *args: package)
    with pytest.raises(StartupError, match="only loaded from a local path"):
        weights_of.local(f"https://models.example.com/keeps.pt2#sha256={digest}", AddressGuard())
    other = with_metadata(package, tmp_path / "other.pt2", lambda values: values.update(torch="1.0"))
    with pytest.raises(StartupError, match=r"compiled with PyTorch 1\.0"):
        load_network(other, CPU)
    with pytest.raises(StartupError, match="compiled for cpu, not for cuda"):
        load_network(package, torch.device("cuda"))


def test_torchscript_is_read_with_its_digest_and_never_written(tmp_path: Path) -> None:
    source = weights(tmp_path / "net.safetensors", "resnet18", 32)
    module: Any = make(load("scene"), str(source))
    module.setup(CPU)
    with safe_open(source, framework="numpy") as tensors:
        metadata = json.dumps(tensors.metadata())
    path = tmp_path / "net.pt"
    with pytest.warns(FutureWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(module.model, torch.zeros(2, 3, 32, 32)), path, {EXTRA_FILE: metadata})
    with pytest.raises(StartupError, match="#sha256="):
        weights_of.local(str(path), AddressGuard())
    script: Any = make(load("scene"), str(path))
    script.setup(CPU)
    batch = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.allclose(script.logits(batch), module.logits(batch), atol=1e-4)


def test_an_engine_needs_tensorrt_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "net.engine"
    metadata = json.dumps({"architecture": "mine"}).encode()
    path.write_bytes(len(metadata).to_bytes(4, "little") + metadata + b"engine")
    assert read_metadata(path) == {"architecture": "mine"}
    with pytest.raises(StartupError, match="pip install tensorrt"):
        load_network(path, CPU)
    with pytest.raises(StartupError, match="#sha256="):
        weights_of.local(str(path), AddressGuard())
    path.write_bytes(b"ftrt" + bytes(100))
    with pytest.raises(StartupError, match="no TensorRT engine of 'cvworker export'"):
        read_metadata(path)
