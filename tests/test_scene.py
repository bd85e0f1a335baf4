from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cvworker.embedded import scenes
from cvworker.errors import StartupError
from cvworker.modules.scene import Scene
from cvworker.modules.spec import read_spec
from weights_refusals import FILES, METADATA, TENSORS, Writer, changed, refusal

FRESH = 5_000_000  # first seed; tools/train takes its pictures from 1, 2 and 3 million on
DEMO = Scene.demo_weights
assert DEMO is not None


class Fixed(nn.Module):
    """A network that gives the same scores whatever it sees."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, batch: Tensor) -> Tensor:
        return self.scores.log().expand(len(batch), -1)


def answer(module: Scene, images: list[Tensor]) -> list[Any]:
    with torch.inference_mode():
        return list(module.process(module.collate([module.preprocess(image) for image in images])))


@pytest.fixture(scope="module")
def scene() -> Scene:
    module = Scene(DEMO)
    module.setup(torch.device("cpu"))
    return module


def tensor(seed: int, size: tuple[int, int]) -> tuple[Tensor, str]:
    drawn = scenes.draw(seed, size)
    [label] = drawn.labels
    return torch.from_numpy(np.array(drawn.image)).permute(2, 0, 1), label


def test_on_freshly_drawn_scenes_at_least_95_of_100_have_the_right_label(scene: Scene) -> None:
    sizes, right, count = [(320, 240), (400, 300), (240, 320), (256, 256)], 0, 200
    for start in range(FRESH, FRESH + count, 40):
        shown = [tensor(seed, sizes[seed % 4]) for seed in range(start, start + 40)]
        results = answer(scene, [image for image, _ in shown])
        right += sum(result["label"] == label for result, (_, label) in zip(results, shown, strict=True))
    assert right / count >= 0.95


def test_a_result_lists_the_likeliest_labels_highest_first_and_survives_json(scene: Scene) -> None:
    result = answer(scene, [scene.example()])[0]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {"label", "labels"}
    assert result["label"] == result["labels"][0]["label"]
    assert len(result["labels"]) == 5
    scores = [entry["score"] for entry in result["labels"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) <= 1.001
    assert {entry["label"] for entry in result["labels"]} <= set(scenes.SCENES)


def test_scores_are_softmax_and_top_k_comes_from_the_weights(tmp_path: Path) -> None:
    # given
    path = tmp_path / "scene.safetensors"
    changed(top_k="2")(DEMO, path)
    module = Scene(path)
    module.setup(torch.device("cpu"))
    module.model = Fixed(0.05, 0.6, 0.05, 0.2, 0.025, 0.025, 0.025, 0.025)
    # when
    result = answer(module, [torch.zeros(3, 20, 30, dtype=torch.uint8)])[0]
    # then
    names = module.spec.classes
    assert result == {
        "label": names[1],
        "labels": [{"label": names[1], "score": 0.6}, {"label": names[3], "score": 0.2}],
    }


def test_a_top_k_beyond_the_classes_lists_them_all(tmp_path: Path) -> None:
    path = tmp_path / "scene.safetensors"
    changed(top_k="50")(DEMO, path)
    assert Scene(path).top_k == len(scenes.SCENES)


@pytest.mark.parametrize("value", ["0", "-1", "2.5", '"5"', "true"])
def test_a_top_k_that_is_no_whole_number_is_refused_in_one_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "scene.safetensors"
    changed(top_k=value)(DEMO, path)
    assert "has metadata 'top_k' " in refusal(Scene, path)


@pytest.mark.parametrize(("write", "problem"), FILES + METADATA + TENSORS)
def test_bad_weights_are_refused_in_one_line(tmp_path: Path, write: Writer, problem: str) -> None:
    path = tmp_path / "scene.safetensors"
    write(DEMO, path)
    assert problem in refusal(Scene, path)


def test_weights_of_another_number_of_classes_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scene.safetensors"
    changed(classes='["beach", "city"]')(DEMO, path)
    assert "shufflenet_v2_x0_5 with 2 classes needs" in refusal(Scene, path)


def test_without_weights_the_error_names_the_demo() -> None:
    with pytest.raises(StartupError, match=r"module .scene. needs weights: .* or --weights demo"):
        Scene()


def test_the_shipped_weights_say_how_they_were_made_and_how_good_they_are() -> None:
    metadata = read_spec(DEMO).metadata
    assert json.loads(metadata["accuracy"])["top_1"] >= 0.95
    assert metadata["command"].startswith("python tools/train scene ")
    assert read_spec(DEMO).classes == scenes.SCENES


def test_the_same_seed_draws_the_same_scene_and_every_kind_comes_up() -> None:
    first, second = scenes.draw(7, (80, 60)), scenes.draw(7, (80, 60))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.image.size == (80, 60)
    assert {label for seed in range(80) for label in scenes.draw(seed, (32, 24)).labels} == set(scenes.SCENES)


def test_drawing_and_reading_the_weights_need_no_torch() -> None:
    code = (
        "import sys; from cvworker.embedded.scenes import draw; draw(0, (64, 48)); "
        "from cvworker.modules.scene import Scene; from cvworker.modules.detect import Detect; "
        "Scene(Scene.demo_weights); Detect(Detect.demo_weights); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
