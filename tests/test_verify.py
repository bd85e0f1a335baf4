"""``cvworker verify``: exports that were broken on purpose are caught, and faster forms are told from wrong ones."""

from __future__ import annotations

import json
import math
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cvworker.export.compare import TOLERANCES, Answer, compare
from cvworker.export.verify import Report, Variant, exported_of, reference_of, tolerance_of, verify
from cvworker.loading import load
from cvworker.model.optimize import has_compiler
from cvworker.module import Module
from export_files import CPU, exported, swapped, with_bytes, with_metadata
from world import BIN

FILES = {"torch-export": "net.pt2", "onnx": "net.onnx", "int8": "net.int8.onnx", "aotinductor": "net.aoti.pt2"}
FORMATS = [
    "torch-export",
    "onnx",
    "int8",
    pytest.param("aotinductor", marks=pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")),
]
DEMO = load("scene").demo_weights  # type: ignore[attr-defined]


@pytest.fixture(scope="module", autouse=True)
def few_pictures() -> Iterator[None]:
    """Half as many as in earnest, so that the tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvworker.export.verify.PICTURES", 16)
        yield


@pytest.fixture(scope="module")
def reference() -> Module:
    return reference_of(load("scene"), "demo", CPU)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's scene classifier, exported when a format is first asked for."""
    folder = tmp_path_factory.mktemp("verify")

    class Files(dict[str, Path]):
        def __missing__(self, format: str) -> Path:
            done = exported("scene", "demo", folder / FILES[format], format)
            assert done.report is not None
            assert done.report.passed, done.report
            self[format] = done.path
            return done.path

    return Files()


def verified(path: Path, reference: Module, largest: int = 9) -> Report:
    """An exported file beside what it was made from."""
    candidate = exported_of(type(reference), path, "demo", CPU)
    variant = Variant(path.name, candidate, "fp32", "off", largest, tolerance_of(path, "fp32", CPU))
    return verify(reference, variant, CPU)


def changed_bias() -> tuple[bytes, bytes]:
    """The bytes of the last layer's bias, and those with one value that is larger by one."""
    bias = load_file(DEMO)["fc.bias"].float()
    old = bias.numpy().tobytes()
    return old, struct.pack("<f", bias[0].item() + 1) + old[4:]


@pytest.mark.parametrize("format", FORMATS)
def test_a_sound_export_passes_at_every_batch_size(files: dict[str, Path], reference: Module, format: str) -> None:
    report = verified(files[format], reference, largest=7)
    assert report.passed, report
    assert report.tolerance_name == ("int8" if format == "int8" else "fp32")
    assert [(group.group, group.batch) for group in report.groups] == [
        ("real pictures", 7),
        ("random pictures", 7),
        ("batch of one", 1),
        ("odd batch", 3),
        ("largest batch", 7),
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_one_changed_weight_is_caught(files: dict[str, Path], reference: Module, tmp_path: Path, format: str) -> None:
    target = tmp_path / FILES[format]
    if format == "int8":  # the bias is in steps of its own there, and less than the limits is not to be seen
        model = onnx.load(files[format])
        parts = {each.name: each for each in model.graph.initializer}
        bias, steps = (parts[name] for name in ("fc.bias_quantized", "fc.bias_quantized_scale"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[0] += int(10 / onnx.numpy_helper.to_array(steps)[0])
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, target)
    else:
        with_bytes(files[format], target, *changed_bias())
    report = verified(target, reference)
    assert not report.passed
    assert any("error" in problem for group in report.groups for problem in group.problems), report


@pytest.mark.parametrize("format", FORMATS)
def test_a_swapped_normalisation_is_caught(
    files: dict[str, Path], reference: Module, tmp_path: Path, format: str
) -> None:
    report = verified(with_metadata(files[format], tmp_path / FILES[format], swapped), reference)
    assert not report.passed
    assert all(group.problems for group in report.groups)


def test_classes_in_another_order_are_caught(files: dict[str, Path], reference: Module, tmp_path: Path) -> None:
    def reverse(values: dict[str, str]) -> None:
        values["classes"] = json.dumps(json.loads(values["classes"])[::-1])

    report = verified(with_metadata(files["onnx"], tmp_path / "net.onnx", reverse), reference)
    assert "answers" in report.groups[0].problems[0]


def test_a_weight_that_is_no_number_is_caught(files: dict[str, Path], reference: Module, tmp_path: Path) -> None:
    old, _ = changed_bias()
    target = with_bytes(files["onnx"], tmp_path / "net.onnx", old, struct.pack("<f", math.nan) + old[4:])
    report = verified(target, reference)
    assert not report.passed
    assert any("not" in problem for problem in report.groups[0].problems)


def test_a_detector_that_moves_its_boxes_is_caught(tmp_path: Path) -> None:
    sound = exported("detect", "demo", tmp_path / "detect.onnx", "onnx").path
    detect = reference_of(load("detect"), "demo", CPU)
    report = verified(with_metadata(sound, tmp_path / "moved.onnx", swapped), detect)
    assert not report.passed
    assert "objects agree" in report.groups[0].problems[0]


def test_the_command_exits_with_1_and_says_what_differs(files: dict[str, Path], tmp_path: Path) -> None:
    broken = with_metadata(files["onnx"], tmp_path / "net.onnx", swapped)
    command = [BIN / "cvworker", "verify", "--module", "scene", "--weights", broken]
    command += ["--reference", DEMO, "--max-batch", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "real pictures" in done.stdout
    assert "differs    real pictures: largest relative error" in done.stdout
    assert done.stderr == ""


def test_the_command_gives_json_for_a_faster_form() -> None:
    command = [BIN / "cvworker", "verify", "--module", "threat", "--weights", "demo", "--precision", "bf16"]
    command += ["--optimize", "auto", "--max-batch", "9", "--as-json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["tolerance_name"] == "bf16"
    assert 0 < report["groups"][0]["rms"] < TOLERANCES["bf16"].rms
    assert report["groups"][-1]["batch"] == 9


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--weights", "{onnx}"], "--reference FILE"),
        (["--weights", "{onnx}", "--reference", "{onnx}"], "is exported itself"),
        (["--weights", "{onnx}", "--reference", "demo", "--images", "{empty}"], "there is no picture in"),
        (["--weights", "demo", "--device", "cuda:7"], "there is no cuda:7"),
    ],
    ids=["no reference", "exported reference", "no pictures", "no device"],
)
def test_what_cannot_be_compared_is_told_in_one_line(
    files: dict[str, Path], tmp_path: Path, arguments: list[str], expected: str
) -> None:
    places = {"onnx": files["onnx"], "empty": tmp_path}
    command = [BIN / "cvworker", "verify", "--module", "scene", *(each.format(**places) for each in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert expected in done.stderr


def test_a_detector_that_finds_nothing_proves_nothing(tmp_path: Path) -> None:
    demo = load("detect").demo_weights  # type: ignore[attr-defined]
    with safe_open(demo, framework="numpy") as tensors:
        metadata = tensors.metadata()
    save_file(load_file(demo), tmp_path / "strict.safetensors", metadata | {"score_threshold": "1"})
    module = reference_of(load("detect"), str(tmp_path / "strict.safetensors"), CPU)
    report = verify(module, Variant("itself", module, "fp32", "off", 1, "fp32"), CPU)
    assert not report.passed
    assert "nothing was compared" in report.problems[0]


def answers(*rows: list[float]) -> list[Answer]:
    return [Answer((torch.tensor(row),), {"best": max(range(len(row)), key=row.__getitem__)}) for row in rows]


def test_errors_next_to_zero_are_measured_against_the_size_of_the_outputs() -> None:
    truth, found = answers([1.0, -1.0, 0.0]), answers([1.0, -1.0, 1e-4])
    report = compare("some", 1, truth, found, TOLERANCES["fp32"], 0)
    assert report.passed
    assert report.max_abs == pytest.approx(1e-4, rel=1e-3)
    assert report.max_rel == pytest.approx(1e-4 / math.sqrt(2 / 3), rel=1e-3)


def test_an_error_as_large_as_the_limit_of_another_precision_is_too_large_for_fp32() -> None:
    truth, found = answers([1.0, -1.0, 0.5]), answers([1.0, -1.02, 0.5])
    assert not compare("some", 1, truth, found, TOLERANCES["fp32"], 0).passed
    assert compare("some", 1, truth, found, TOLERANCES["bf16"], 0).passed


def test_a_shape_that_differs_is_a_problem_whatever_is_in_it() -> None:
    report = compare("some", 1, answers([1.0, 2.0]), answers([1.0, 2.0, 0.0]), TOLERANCES["int8"], 0)
    assert "shape" in report.problems[0]


def found(*objects: tuple[str, float, list[float]]) -> list[Answer]:
    return [Answer((), {"objects": [{"label": a, "score": b, "box": c} for a, b, c in objects]})]


BOX = [10.0, 10.0, 50.0, 50.0]


@pytest.mark.parametrize(
    ("other", "share"),
    [
        (found(("gun", 0.9, BOX), ("bomb", 0.8, BOX)), 1.0),
        (found(("gun", 0.9, BOX), ("bomb", 0.8, BOX), ("gun", 0.501, [60.0, 60.0, 90.0, 90.0])), 1.0),
        (found(("gun", 0.9, BOX)), 0.5),
        (found(("gun", 0.9, BOX), ("knife", 0.8, BOX)), 1 / 3),
        (found(("gun", 0.9, BOX), ("bomb", 0.8, [30.0, 10.0, 70.0, 50.0])), 1 / 3),
        (found(("gun", 0.9, BOX), ("bomb", 0.7, BOX)), 0.5),
    ],
    ids=["the same", "one more at the threshold", "one missing", "another label", "another place", "another score"],
)
def test_objects_are_found_again_by_label_place_and_score(other: list[Answer], share: float) -> None:
    truth = found(("gun", 0.9, BOX), ("bomb", 0.8, BOX))
    report = compare("some", 1, truth, other, replace(TOLERANCES["fp32"], score=0.01), 0.5)
    assert report.objects == pytest.approx(share)
    assert report.passed == (share == 1)


def test_the_limits_in_the_documentation_are_those_that_are_held_to() -> None:
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    rows = {
        row.split("|")[1].split()[0]: row
        for row in page.splitlines()
        if row.startswith(("| fp", "| tf", "| bf", "| int"))
    }
    for name, limits in TOLERANCES.items():
        shares = " | ".join(f"{share * 100:g} %" for share in (limits.top1, limits.answers, limits.objects))
        expected = f"| {limits.relative:g} | {limits.rms:g} | {shares} | {limits.overlap:g}, {limits.score:g} |"
        assert rows[name].endswith(expected), (rows[name], expected)
