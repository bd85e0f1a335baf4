"""What each example says of pictures whose content is known; the way through a worker is in test_every_module.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors import safe_open

from cvworker.errors import StartupError
from cvworker.loading import load, make
from cvworker.testing import call_hooks
from modules.examples import EXAMPLES, WEIGHTS, file_of, script, spec_of, weights_of

PAGES = Path(__file__).parent.parent / "docs" / "examples"
LARGEST_WEIGHTS = 2_000_000
WITH_WEIGHTS = [name for name, weights in WEIGHTS.items() if weights]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    folder = tmp_path_factory.mktemp("weights")
    return {name: weights_of(name, folder) for name in WEIGHTS}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height // 8, width // 8, 3), dtype=torch.uint8, generator=generator).numpy()
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def results(example: str, weights: dict[str, Path | None], *pictures: Any) -> list[dict[str, Any]]:
    return call_hooks(spec_of(example), pictures, weights=weights[example])


def test_every_folder_of_examples_is_tested_and_has_a_page_that_shows_how_it_is_run() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(WEIGHTS)
    for name, weights in WEIGHTS.items():
        page = (PAGES / f"{name}.md").read_text()
        assert f"cvworker check --module examples/{name}/{file_of(name).name}:" in page
        assert weights is None or f"python examples/{name}/make_weights.py {weights}" in page


@pytest.mark.parametrize("example", WEIGHTS)
def test_an_example_is_small_enough_to_be_read(example: str) -> None:
    assert len(file_of(example).read_text().splitlines()) <= 80


@pytest.mark.parametrize("example", WITH_WEIGHTS)
def test_weights_are_small_and_the_same_each_time(
    example: str, weights: dict[str, Path | None], tmp_path: Path
) -> None:
    first, again = weights[example], weights_of(example, tmp_path)
    assert first is not None
    assert again is not None
    assert first.stat().st_size < LARGEST_WEIGHTS
    assert content(first) == content(again)


@pytest.mark.parametrize("example", WITH_WEIGHTS)
def test_without_weights_an_example_says_in_one_line_where_to_get_some(example: str) -> None:
    with pytest.raises(StartupError, match=r"^weights: .*--weights"):
        make(load(spec_of(example)), None)


def test_a_script_makes_weights_where_it_is_told_to(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "onnx_classifier" / "make_weights.py", "tiny.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "tiny.onnx\n"), done.stderr
    assert (tmp_path / "tiny.onnx").stat().st_size > 0


def test_the_timm_example_prepares_pictures_as_timm_does(weights: dict[str, Path | None]) -> None:
    module = make(load(spec_of("timm_classifier")), str(weights["timm_classifier"]))
    module.setup(torch.device("cpu"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module.model))
    for size in ((320, 240), (200, 500), (161, 160)):
        picture = noise(*size)
        bytes_of = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        ours = (module.preprocess(bytes_of) - module.mean) / module.std
        assert (ours - transform(picture)).abs().mean() < 0.02  # of a range from -1 to 1


def test_the_timm_example_gives_the_best_classes_first(weights: dict[str, Path | None]) -> None:
    [result] = results("timm_classifier", weights, noise(320, 240))
    scores = [each["score"] for each in result["labels"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1.001


def test_the_hugging_face_example_says_what_a_pipeline_says(weights: dict[str, Path | None]) -> None:
    from transformers import pipeline

    path = weights["huggingface_classifier"]
    assert path is not None
    pictures = [noise(320, 240, seed) for seed in range(4)]
    expected = pipeline("image-classification", model=str(path.parent), device="cpu")(pictures)
    found = results("huggingface_classifier", weights, *pictures)
    for [best, *_], result in zip(expected, found, strict=True):
        assert result["label"] == best["label"]
        assert result["score"] == pytest.approx(best["score"], abs=2e-3)


def test_the_onnx_example_gives_a_probability_for_each_class(weights: dict[str, Path | None]) -> None:
    found = results("onnx_classifier", weights, *(noise(320, 240, seed) for seed in range(3)))
    for result in found:
        assert list(result["scores"]) == ["day", "dusk", "night"]
        assert sum(result["scores"].values()) == pytest.approx(1, abs=1e-3)
    assert found[0] != found[1]


def test_the_text_example_reads_lines_of_any_length_in_one_batch(weights: dict[str, Path | None]) -> None:
    draw = script("text_line").draw
    texts = ["2026", "", "7", "3141592653589793", "000111", "8"]
    found = results("text_line", weights, *(draw(text) for text in texts))
    assert [result["text"] for result in found] == texts
    assert [len(result["scores"]) for result in found] == [len(text) for text in texts]


@pytest.mark.parametrize("size", [24, 40, 100])
def test_the_text_example_reads_other_sizes(weights: dict[str, Path | None], size: int) -> None:
    [result] = results("text_line", weights, script("text_line").draw("0123456789", size))
    assert result["text"] == "0123456789"


def test_the_text_example_finds_nothing_on_empty_pages(weights: dict[str, Path | None]) -> None:
    white = Image.new("RGB", (100, 50), "white")
    assert results("text_line", weights, white, white) == [{"text": "", "scores": []}] * 2


def test_the_example_of_two_models_finds_things_in_pictures_of_many_sizes(weights: dict[str, Path | None]) -> None:
    things = {
        "red": (16, 24, 56, 64),
        "green": (80, 8, 112, 40),
        "blue": (32, 96, 48, 112),
        "yellow": (88, 72, 136, 80),
    }
    pictures = []
    for size in ((160, 120), (240, 136), (64, 64)):
        picture = Image.new("RGB", size, (10, 10, 10))
        for colour, (x0, y0, x1, y1) in things.items():
            ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill="lime" if colour == "green" else colour)
        pictures.append(picture)
    *whole, part = results("detect_then_classify", weights, *pictures)
    for result in whole:
        assert {each["label"]: tuple(each["box"]) for each in result["objects"]} == things
        assert all(each["score"] > 0.5 and each["label_score"] > 0.9 for each in result["objects"])
    assert [(each["label"], each["box"]) for each in part["objects"]] == [("red", [16, 24, 56, 64])]


def test_the_example_of_two_models_answers_pictures_without_things(weights: dict[str, Path | None]) -> None:
    dark = Image.new("RGB", (100, 80))
    assert results("detect_then_classify", weights, dark, dark) == [{"objects": []}] * 2


def test_the_numpy_example_tells_sharp_from_blurred_and_dark(weights: dict[str, Path | None]) -> None:
    sharp = noise(512, 384)
    blurred = sharp.filter(ImageFilter.GaussianBlur(12))
    dark = sharp.point(lambda value: value // 8)
    good, soft, black = results("picture_quality", weights, sharp, blurred, dark)
    assert (good["usable"], soft["usable"], black["usable"]) == (True, False, False)
    assert good["sharpness"] > 5 * soft["sharpness"]
    assert black["brightness"] < 40


def test_the_numpy_example_gives_pictures_that_look_the_same_nearly_the_same_hash(
    weights: dict[str, Path | None],
) -> None:
    picture, other = noise(640, 480), noise(640, 480, seed=1)
    first, smaller, different = results("picture_quality", weights, picture, picture.resize((320, 240)), other)
    assert distance(first["hash"], smaller["hash"]) <= 4
    assert distance(first["hash"], different["hash"]) >= 16


def test_the_numpy_example_does_without_torch() -> None:
    assert not re.search(r"^(import|from) torch", file_of("picture_quality").read_text(), re.MULTILINE)


def content(path: Path) -> Any:
    """What is in a file of weights, whatever the order of its metadata."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()
