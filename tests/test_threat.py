from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvworker.embedded import pictures
from cvworker.errors import StartupError
from cvworker.modules.spec import read_spec
from cvworker.modules.threat import Threat

FRESH = 5_000_000  # first seed; tools/train takes its pictures from 1, 2 and 3 million on
DEMO = Threat.demo_weights
assert DEMO is not None


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def as_jpeg(image: Image.Image, smallest: int) -> Image.Image:
    """The image as it arrives: compressed, and decoded at the smallest scale that leaves ``smallest`` pixels."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    decoded = Image.open(data)
    decoded.draft("RGB", (smallest, smallest))
    return decoded


def answer(module: Threat, images: list[Tensor]) -> list[Any]:
    with torch.inference_mode():
        return list(module.process(module.collate([module.preprocess(image) for image in images])))


@pytest.fixture(scope="module")
def threat() -> Threat:
    module = Threat(DEMO)
    module.setup(torch.device("cpu"))
    return module


class Fixed(nn.Module):
    """A network that gives the same scores whatever it sees."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, batch: Tensor) -> Tensor:
        return self.scores.logit().expand(len(batch), -1)


@pytest.fixture
def decided() -> Callable[..., Any]:
    """The answer to given scores, at thresholds of 0.5."""

    def decide(*scores: float) -> Any:
        module = Threat(DEMO)
        module.setup(torch.device("cpu"))
        module.model, module.thresholds = Fixed(*scores), dict.fromkeys(module.spec.classes, 0.5)
        return answer(module, [torch.zeros(3, 20, 30, dtype=torch.uint8)])[0]

    return decide


def test_on_freshly_drawn_pictures_at_least_95_of_100_have_exactly_the_right_labels(threat: Threat) -> None:
    assert threat.min_side is not None
    exact, verdicts, count = 0, 0, 240
    for start in range(FRESH, FRESH + count, 40):
        sizes = [None, (400, 300), (300, 400), (320, 240), (256, 256)]  # the large ones take most of the time
        drawn = [pictures.draw(seed, sizes[seed % 5]) for seed in range(start, start + 40)]
        images = [tensor(as_jpeg(one.image, threat.min_side) if i % 2 else one.image) for i, one in enumerate(drawn)]
        for one, result in zip(drawn, answer(threat, images), strict=True):
            exact += {found["label"] for found in result["labels"]} == one.labels
            verdicts += result["verdict"] == ("threat" if one.labels else "safe")
    assert exact / count >= 0.95
    assert verdicts / count >= 0.95


def test_a_result_has_verdict_labels_and_scores_and_survives_json(threat: Threat) -> None:
    result = answer(threat, [threat.example()])[0]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {"verdict", "labels", "scores"}
    assert list(result["scores"]) == list(threat.spec.classes)
    assert all(score == round(score, 4) and 0 <= score <= 1 for score in result["scores"].values())


def test_labels_at_or_over_their_threshold_are_listed_highest_first(decided: Callable[..., Any]) -> None:
    result = decided(0.6, 0.1, 0.95, 0.5)
    assert result["verdict"] == "threat"
    assert result["labels"] == [
        {"label": "gun", "score": 0.95},
        {"label": "bomb", "score": 0.6},
        {"label": "knife", "score": 0.5},
    ]
    assert result["scores"] == {"bomb": 0.6, "fire": 0.1, "gun": 0.95, "knife": 0.5}


def test_a_picture_with_every_score_under_its_threshold_is_safe(decided: Callable[..., Any]) -> None:
    result = decided(0.49, 0.1, 0.2, 0.3)
    assert result["verdict"] == "safe"
    assert result["labels"] == []


def test_a_batch_gives_the_same_answers_as_its_pictures_alone(threat: Threat) -> None:
    images = [tensor(pictures.draw(FRESH + 10_000 + i, (200 + 10 * i, 200)).image) for i in range(8)]
    for together, alone in zip(answer(threat, images), (answer(threat, [one])[0] for one in images), strict=True):
        assert together["verdict"] == alone["verdict"]
        assert together["scores"] == pytest.approx(alone["scores"], abs=2e-4)


@pytest.mark.parametrize("layout", ["planes", "interleaved"])
def test_a_sample_is_uint8_of_the_input_size_whatever_the_image(threat: Threat, layout: str) -> None:
    side = threat.spec.input_size
    assert threat.min_side == side
    for height, width in [(1, 1), (7, 900), (side, side), (480, 640)]:
        image = torch.full((3, height, width), 200, dtype=torch.uint8)
        sample = threat.preprocess(
            image if layout == "planes" else image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        )
        assert sample.dtype == torch.uint8
        assert sample.shape == (3, side, side)
        assert (sample == 200).all()


def test_bytes_are_normalised_as_the_weights_say(threat: Threat) -> None:
    seen: list[Tensor] = []
    module = Threat(DEMO)
    module.setup(torch.device("cpu"))
    module.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = torch.randint(0, 256, (2, 3, module.spec.input_size, module.spec.input_size), dtype=torch.uint8)
    module.process(batch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (module.spec.mean, module.spec.std))
    torch.testing.assert_close(seen[0], (batch / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_the_shipped_weights_are_small_and_say_how_they_were_made() -> None:
    assert DEMO.stat().st_size < 4_000_000
    metadata = read_spec(DEMO).metadata
    assert json.loads(metadata["accuracy"])["label_sets"] >= 0.95
    assert metadata["seed"]
    assert metadata["command"].startswith("python tools/train threat ")


def test_the_instance_of_a_dataloader_process_reads_no_tensors(tmp_path: Path) -> None:
    # given: four gigabytes of tensors, as a hole in the file
    size = 4 << 30
    header = {
        "__metadata__": dict(read_spec(DEMO).metadata),
        "fc.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    # when
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = Threat(large)
    sample = module.preprocess(module.example())
    # then
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert sample.shape == (3, module.min_side, module.min_side)
    assert not hasattr(module, "model")


def test_what_weights_say_of_themselves_is_read_without_torch() -> None:
    code = (
        "import sys; from cvworker.modules.threat import Threat; Threat(Threat.demo_weights); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_weights_the_error_names_the_setting_and_the_demo() -> None:
    with pytest.raises(StartupError) as error:
        Threat()
    assert str(error.value) == (
        "module 'threat' needs weights: --weights FILE (or CVWORKER_WEIGHTS), "
        "or --weights demo for the small set shipped with cvworker"
    )


def refusal(path: Path) -> str:
    """The one line that the worker would end with."""
    with pytest.raises(StartupError) as error:
        Threat(path).setup(torch.device("cpu"))
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"weights: {path} ")
    assert "; " in text, "a way out follows the problem"
    return text


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: None, "cannot be opened (No such file or directory)"),
        (lambda path: path.mkdir(), "cannot be opened (Is a directory)"),
        (lambda path: path.write_bytes(b""), "is no safetensors file, or a damaged one"),
        (lambda path: path.write_bytes(b"not weights at all"), "is no safetensors file, or a damaged one"),
        (lambda path: path.write_bytes(DEMO.read_bytes()[:-1000]), "is no safetensors file, or a damaged one"),
        (lambda path: path.write_bytes(DEMO.read_bytes()[:100]), "is no safetensors file, or a damaged one"),
        (lambda path: torch.save({"fc.weight": torch.zeros(1)}, path), "is a pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"fc.weight": 1})), "is a pickle"),
    ],
    ids=["missing", "directory", "empty", "text", "truncated", "header cut", "torch.save", "pickle"],
)
def test_a_file_that_is_no_safetensors_is_refused_in_one_line(
    tmp_path: Path, write: Callable[[Path], Any], problem: str
) -> None:
    path = tmp_path / "weights.safetensors"
    write(path)
    assert problem in refusal(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict.fromkeys(read_spec(DEMO).metadata), "does not say its architecture, classes, input_size, mean, std"),
        ({"mean": None}, "does not say its mean"),
        ({"architecture": "resnet19"}, "names an architecture that torchvision does not have: 'resnet19'"),
        ({"architecture": "mobilenet_v3_small"}, "lacks the tensor"),
        ({"architecture": "shufflenet_v2_x1_0"}, "has 'stage2.0.branch1.2.weight' of shape"),
        ({"classes": "bomb, gun"}, "has metadata 'classes' that is not JSON"),
        ({"classes": '"gun"'}, "has metadata 'classes' that is not a JSON list of distinct names"),
        ({"classes": '["gun", "gun"]'}, "has metadata 'classes' that is not a JSON list of distinct names"),
        ({"classes": '["a", "b"]', "thresholds": '{"a": 0.5, "b": 0.5}'}, "has 'fc.weight' of shape [4, 1024], but"),
        ({"input_size": "0"}, "has metadata 'input_size' 0"),
        ({"input_size": "true"}, "has metadata 'input_size' True"),
        ({"mean": "[0.5, 0.5]"}, "has metadata 'mean' [0.5, 0.5]"),
        ({"std": "[0.2, 0, 0.2]"}, "has metadata 'std' [0.2, 0, 0.2]"),
        ({"std": "[0.2, NaN, 0.2]"}, "has metadata 'std' [0.2, nan, 0.2]"),
        ({"thresholds": None}, "has no metadata 'thresholds'"),
        ({"thresholds": "[0.5, 0.5, 0.5, 0.5]"}, "has metadata 'thresholds' that are not numbers from 0 to 1"),
        ({"thresholds": '{"bomb": 1.5}'}, "has metadata 'thresholds' that are not numbers from 0 to 1"),
        ({"thresholds": '{"gun": 0.5, "cat": 0.5}'}, "that do not fit its classes (bomb, cat, fire, knife)"),
    ],
)
def test_metadata_that_is_absent_or_wrong_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, str | None], problem: str
) -> None:
    metadata = {key: value for key, value in (dict(read_spec(DEMO).metadata) | changes).items() if value is not None}
    path = tmp_path / "weights.safetensors"
    save_file(load_file(DEMO), path, metadata or None)
    assert problem in refusal(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop("fc.bias"), "lacks the tensor 'fc.bias' of shufflenet_v2_x0_5 with 4 classes"),
        (lambda tensors: tensors.update(head=torch.zeros(1)), "has the tensor 'head', which shufflenet_v2_x0_5"),
        (lambda tensors: tensors["fc.bias"].fill_(float("nan")), "has values in 'fc.bias' that are not finite"),
    ],
    ids=["one missing", "one too many", "not a number"],
)
def test_tensors_of_another_network_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], problem: str
) -> None:
    tensors = load_file(DEMO)
    change(tensors)
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path, dict(read_spec(DEMO).metadata))
    assert problem in refusal(path)


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for padding in range(0, 256, 8):  # safetensors pads its header to a multiple of eight bytes
        save_file(load_file(DEMO), path, dict(read_spec(DEMO).metadata) | {"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert Threat(path).spec.classes == read_spec(DEMO).classes


def test_weights_stored_in_half_precision_are_loaded_in_full(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    halved = {name: value.half() if value.is_floating_point() else value for name, value in load_file(DEMO).items()}
    save_file(halved, path, dict(read_spec(DEMO).metadata))
    module = Threat(path)
    module.setup(torch.device("cpu"))
    assert {value.dtype for value in module.model.parameters()} == {torch.float32}
    assert answer(module, [module.example()])[0]["verdict"] in ("threat", "safe")
