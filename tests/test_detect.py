from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models.detection
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cvworker.embedded import pictures
from cvworker.embedded.subjects import overlap
from cvworker.model.chunk import Chunk
from cvworker.model.slabs import Slabs
from cvworker.modules.detect import BACKGROUND, Detect
from cvworker.modules.detectors import ASSEMBLED
from cvworker.modules.spec import read_spec
from weights_refusals import FILES, METADATA, TENSORS, Writer, changed, refusal

sys.path.append(str(Path(__file__).parents[1] / "tools" / "train"))
from average_precision import Found, mean_average_precision

FRESH = 5_000_000  # first seed; tools/train takes its pictures from 1, 2 and 3 million on
DEMO = Detect.demo_weights
assert DEMO is not None
CPU = torch.device("cpu")
CLASSES = [BACKGROUND, "cat", "dog"]


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def noise(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def answer(module: Detect, images: list[Tensor]) -> list[Any]:
    with torch.inference_mode():
        return list(module.process(module.collate([module.preprocess(image) for image in images])))


def write(path: Path, network: nn.Module, architecture: str, side: int, **further: Any) -> Detect:
    """The network's values as somebody would save them, loaded by the module."""
    metadata = {"architecture": architecture, "classes": CLASSES, "input_size": side, "score_threshold": 0.0}
    metadata |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]} | further
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file(network.state_dict(), path, texts)
    module = Detect(path)
    module.setup(CPU)
    return module


def network_of(architecture: str) -> Any:
    torch.manual_seed(0)
    if architecture in ASSEMBLED:
        return ASSEMBLED[architecture](len(CLASSES)).eval()
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": len(CLASSES)}
    return torchvision.models.get_model(architecture, **options).eval()


@pytest.fixture(scope="module")
def detect() -> Detect:
    module = Detect(DEMO)
    module.setup(CPU)
    return module


class Fixed(nn.Module):
    """A network that finds the same in every picture, whatever it sees; ``found`` is in parts of its sides."""

    def __init__(self, *found: tuple[list[float], float, int]) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        outputs = []
        for image in images:
            height, width = image.shape[-2:]
            boxes = [np.multiply(box, [width, height, width, height]).tolist() for box, _, _ in self.found]
            outputs.append(
                {
                    "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                    "scores": torch.tensor([score for _, score, _ in self.found], dtype=torch.float32),
                    "labels": torch.tensor([label for _, _, label in self.found], dtype=torch.int64),
                }
            )
        return outputs


def test_on_freshly_drawn_pictures_mean_average_precision_is_at_least_80(detect: Detect) -> None:
    sizes = [(320, 240), (400, 300), (240, 320), (256, 256), (480, 360)]
    pairs, strict = [], 0
    for start in range(FRESH, FRESH + 200, 40):
        shown = [pictures.draw(seed, sizes[seed % 5]) for seed in range(start, start + 40)]
        for one, result in zip(shown, answer(detect, [tensor(one.image) for one in shown]), strict=True):
            there = [Found(item.label, item.box) for item in one.objects]
            pairs.append(([Found(each["label"], each["box"], each["score"]) for each in result["objects"]], there))
            strict += sorted(each["label"] for each in result["objects"]) == sorted(item.label for item in one.objects)
    # what scores less than the file's threshold is not even counted
    assert mean_average_precision(pairs)["mean"] >= 0.80
    assert strict / 200 >= 0.6


def test_boxes_are_in_pixels_of_the_original_whatever_its_size_and_shape() -> None:
    module = Detect(DEMO)
    module.setup(CPU)
    module.model = Fixed(([0.25, 0.5, 0.75, 1.0], 0.9, 1), ([0.0, 0.0, 0.1, 0.2], 0.8, 2))
    names = module.spec.classes
    for height, width in [(480, 640), (1, 1), (3000, 200), (128, 128)]:
        assert answer(module, [noise(height, width)])[0] == {
            "width": width,
            "height": height,
            "objects": [
                {"label": names[1], "score": 0.9, "box": pytest.approx([width / 4, height / 2, width * 3 / 4, height])},
                {"label": names[2], "score": 0.8, "box": pytest.approx([0, 0, width / 10, height / 5], abs=0.006)},
            ],
        }


def test_a_picture_without_objects_has_an_empty_list() -> None:
    module = Detect(DEMO)
    module.setup(CPU)
    module.model = Fixed()
    assert answer(module, [noise(30, 20), noise(20, 30)]) == [
        {"width": 20, "height": 30, "objects": []},
        {"width": 30, "height": 20, "objects": []},
    ]


def test_background_and_unused_outputs_are_never_reported(tmp_path: Path) -> None:
    classes = [BACKGROUND, "cat", "N/A", "dog", "N/A"]
    network = torchvision.models.get_model(
        "ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=len(classes)
    )
    module = write(
        tmp_path / "coco.safetensors", network, "ssdlite320_mobilenet_v3_large", 320, classes=json.dumps(classes)
    )
    box = [0.0, 0.0, 1.0, 1.0]
    module.model = Fixed(*((box, 0.9, label) for label in range(len(classes))))
    assert [each["label"] for each in answer(module, [noise(30, 20)])[0]["objects"]] == ["cat", "dog"]


def test_the_example_shows_something_to_agree_on(detect: Detect) -> None:
    example = detect.example()
    assert (example.dtype, example.shape) == (torch.uint8, (3, 480, 640))
    result = answer(detect, [example])[0]
    assert result["objects"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    scores = [each["score"] for each in result["objects"]]
    assert scores == sorted(scores, reverse=True)
    for each in result["objects"]:
        left, top, right, bottom = each["box"]
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480


def test_a_batch_gives_the_same_answers_as_its_pictures_alone(detect: Detect) -> None:
    images = [tensor(pictures.draw(FRESH + 10_000 + i, (200 + 10 * i, 200)).image) for i in range(8)]
    for together, one in zip(answer(detect, images), images, strict=True):
        same(together, answer(detect, [one])[0], pixels=0.05, score=1e-3)


def test_half_precision_finds_the_same_objects_at_about_the_same_places(detect: Detect) -> None:
    images = [tensor(pictures.draw(seed, (320, 240)).image) for seed in range(FRESH, FRESH + 12)]
    full = answer(detect, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = answer(detect, images)
    pairs = [
        ([Found(each["label"], each["box"], each["score"]) for each in now["objects"]],
         [Found(each["label"], each["box"]) for each in before["objects"]])
        for now, before in zip(half, full, strict=True)
    ]  # fmt: skip
    assert sum(len(there) for _, there in pairs) > 8
    assert mean_average_precision(pairs, iou=0.9)["mean"] > 0.9


@pytest.mark.parametrize(
    ("architecture", "side", "max_size"),
    [
        ("ssdlite320_mobilenet_v3_large", 320, None),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 96, 128),
        ("retinanet_resnet50_fpn_v2", 96, 128),
        ("fcos_resnet50_fpn", 96, 128),
        ("ssdlite_shufflenet_v2_x0_5", 320, None),
    ],
)
def test_a_network_of_any_architecture_finds_what_torchvisions_own_does(
    tmp_path: Path, architecture: str, side: int, max_size: int | None
) -> None:
    # given a picture that need not be scaled, and a threshold that random values reach
    network = network_of(architecture)
    further = {"max_size": max_size} if max_size else {}
    module = write(tmp_path / "weights.safetensors", network, architecture, side, **further)
    image = noise(side, max_size or side)
    # when
    own = network.transform
    own.image_mean, own.image_std = module.spec.mean, module.spec.std
    if max_size:
        own.min_size, own.max_size = (side,), max_size
    network.score_thresh = 0.0
    if hasattr(network, "roi_heads"):
        network.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        [expected] = network([image / 255])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = answer(module, [image])[0]
    found = answer(module, [image])[0]
    # then: every one of the best is there, whatever rounding did to the order of random scores
    assert len(found["objects"]) >= 10
    for each in found["objects"][:10]:
        alike = [
            (box, score)
            for box, score, label in zip(
                *(expected[key].tolist() for key in ("boxes", "scores", "labels")), strict=True
            )
            if CLASSES[label] == each["label"] and np.allclose(box, each["box"], atol=0.05)
        ]
        assert any(abs(score - each["score"]) < 1e-3 for _, score in alike), each
    assert all(np.isfinite(each["box"]).all() for each in half["objects"])


def test_pictures_of_many_shapes_keep_them_and_share_a_batch(tmp_path: Path) -> None:
    # given
    module = write(
        tmp_path / "weights.safetensors", network_of("fcos_resnet50_fpn"), "fcos_resnet50_fpn", 64, max_size=96
    )
    images = [noise(200, 300), noise(300, 200), noise(100, 1000), noise(64, 64)]
    samples = [module.preprocess(image) for image in images]
    # then: the shorter side is 64, unless the longer one would exceed 96
    assert [tuple(sample["image"].shape) for sample in samples] == [(3, 64, 96), (3, 96, 64), (3, 9, 96), (3, 64, 64)]
    assert [sample["size"].tolist() for sample in samples] == [[300, 200], [200, 300], [1000, 100], [64, 64]]
    # and each has an answer in its own pixels
    results = answer(module, images)
    assert [(each["width"], each["height"]) for each in results] == [(300, 200), (200, 300), (1000, 100), (64, 64)]
    for result in results:
        for each in result["objects"]:
            assert 0 <= each["box"][0] <= each["box"][2] <= result["width"]
            assert 0 <= each["box"][1] <= each["box"][3] <= result["height"]


def test_samples_cross_the_process_border_in_memory_that_is_there_already(detect: Detect) -> None:
    images = [noise(200, 300), noise(300, 200), noise(9, 9)]
    samples = [detect.preprocess(image) for image in images]
    slabs = Slabs(1)
    chunk = Chunk([1, 2, 3], [0.0] * 3, list(samples)).pack(slabs, 0)
    assert chunk.slab is not None
    back = chunk.unpack(slabs, pin=False)
    assert all(sample["image"].dtype == torch.uint8 for sample in back)
    with torch.inference_mode():
        assert detect.process(detect.collate(back)) == detect.process(detect.collate(samples))


def test_decoders_may_not_scale_what_boxes_are_measured_in(detect: Detect) -> None:
    assert detect.min_side is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"score_threshold": "1.5"}, "has metadata 'score_threshold' 1.5"),
        ({"score_threshold": '"high"'}, "has metadata 'score_threshold' 'high'"),
        ({"score_threshold": "NaN"}, "has metadata 'score_threshold' nan"),
        ({"max_size": "0"}, "has metadata 'max_size' 0"),
        ({"max_size": "64"}, "has metadata 'max_size' 64 below its 'input_size' 128"),
        ({"architecture": "resnet18"}, "must name one of torchvision's box detectors, such as"),
        ({"architecture": "maskrcnn_resnet50_fpn"}, "must name one of torchvision's box detectors, such as"),
        ({"architecture": "ssdlite320_mobilenet_v3_large"}, "lacks the tensor '"),
        ({"classes": '["bomb", "ball"]'}, "has metadata 'classes' that begin with 'bomb', but output 0 of ssdlite"),
        ({"classes": '["__background__", "ball"]'}, " with 2 classes needs "),
    ],
)
def test_metadata_that_is_wrong_for_a_detector_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, str], problem: str
) -> None:
    path = tmp_path / "detect.safetensors"
    changed(**changes)(DEMO, path)
    assert problem in refusal(Detect, path)


@pytest.mark.parametrize(("spoil", "problem"), FILES + METADATA + TENSORS)
def test_bad_weights_are_refused_in_one_line(tmp_path: Path, spoil: Writer, problem: str) -> None:
    path = tmp_path / "detect.safetensors"
    spoil(DEMO, path)
    assert problem in refusal(Detect, path)


def test_the_shipped_weights_say_how_they_were_made_and_how_good_they_are() -> None:
    metadata = read_spec(DEMO).metadata
    assert json.loads(metadata["accuracy"])["map50"] >= 0.80
    assert metadata["command"].startswith("python tools/train detect ")
    assert sum(path.stat().st_size for path in DEMO.parent.glob("*.safetensors")) < 12_000_000


class TestMeanAveragePrecision:
    """Against cases worked out by hand."""

    def test_everything_found_is_1_and_nothing_found_is_0(self) -> None:
        there = [Found("cat", (0, 0, 10, 10)), Found("dog", (20, 20, 30, 30))]
        assert mean_average_precision([(there, there)]) == {"cat": 1.0, "dog": 1.0, "mean": 1.0}
        assert mean_average_precision([([], there)])["mean"] == 0.0

    def test_the_area_under_precision_over_recall(self) -> None:
        # given: in order of score right, wrong, right, wrong; three objects, one of which nobody finds
        there = [Found("cat", (0, 0, 10, 10)), Found("cat", (20, 0, 30, 10)), Found("cat", (40, 0, 50, 10))]
        found = [
            Found("cat", (0, 0, 10, 10), 0.9),
            Found("cat", (70, 0, 80, 10), 0.8),
            Found("cat", (20, 0, 30, 9), 0.7),
            Found("cat", (90, 0, 99, 10), 0.6),
        ]
        # then: precision 1 up to a recall of 1/3, 2/3 up to 2/3, nothing beyond
        assert mean_average_precision([(found, there)])["mean"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)

    def test_an_object_is_found_once_and_boxes_must_share_half_of_their_union(self) -> None:
        there = [Found("cat", (0, 0, 10, 10))]
        twice = [Found("cat", (0, 0, 10, 10), 0.5), Found("cat", (0, 0, 10, 9), 0.9)]
        assert (
            mean_average_precision([(twice, there)])["mean"] == 1.0
        )  # the second is wrong, but comes too late to matter
        beside = [Found("cat", (6, 0, 16, 10), 0.9), *twice]
        assert mean_average_precision([(beside, there)])["mean"] == 0.5
        assert mean_average_precision([(beside, there)], iou=0.95)["mean"] == pytest.approx(1 / 3)

    def test_a_label_that_is_in_no_picture_does_not_count_and_pictures_are_kept_apart(self) -> None:
        cat = [Found("cat", (0, 0, 10, 10))]
        assert mean_average_precision([(cat, []), ([], cat), ([Found("owl", (0, 0, 5, 5))], [])]) == {
            "cat": 0.0,
            "mean": 0.0,
        }

    def test_overlap_is_the_shared_area_over_the_area_of_both(self) -> None:
        assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
        assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0


def same(one: Any, other: Any, *, pixels: float, score: float) -> None:
    assert [each["label"] for each in one["objects"]] == [each["label"] for each in other["objects"]]
    for left, right in zip(one["objects"], other["objects"], strict=True):
        assert left["box"] == pytest.approx(right["box"], abs=pixels)
        assert left["score"] == pytest.approx(right["score"], abs=score)
