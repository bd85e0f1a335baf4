"""What every classifier shares, whatever it makes of the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from safetensors.torch import load_file, save_file
from torch import Tensor

from cvworker.errors import StartupError
from cvworker.modules.classifier import Classifier

CLASSES = ["cat", "dog", "owl"]
DEVICE = torch.device("cpu")


class Scores(Classifier):
    """The scores as they are."""

    def process(self, batch: Tensor) -> Sequence[Mapping[str, Any]]:
        return [{"scores": row} for row in self.logits(batch).tolist()]


def write(path: Path, architecture: str, side: int = 64, **options: Any) -> torch.nn.Module:
    """Weights of a network with random values, as somebody would save them; the network itself is returned."""
    network = torchvision.models.get_model(architecture, weights=None, num_classes=len(CLASSES), **options).eval()
    metadata = {"architecture": architecture, "classes": json.dumps(CLASSES), "input_size": str(side)}
    channels = {"mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"}
    save_file(network.state_dict(), path, metadata | channels)
    return network


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("resnet18", {}),
        ("efficientnet_b0", {}),
        ("mobilenet_v3_small", {}),
        ("mobilenet_v2", {}),
        ("vit_b_32", {"image_size": 64}),
    ],
)
def test_a_network_of_any_architecture_answers_as_torchvisions_own(
    tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    # given
    network = write(tmp_path / "weights.safetensors", architecture, **options)
    module = Scores(tmp_path / "weights.safetensors")
    module.setup(DEVICE)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # when
    with torch.inference_mode():
        answers = module.process(module.collate([module.preprocess(image) for image in images]))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (module.spec.mean, module.spec.std))
        expected = network((images / 255 - mean) / std)
    # then
    torch.testing.assert_close(torch.tensor([each["scores"] for each in answers]), expected, atol=1e-4, rtol=1e-4)


def test_a_size_that_a_transformer_cannot_take_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write(path, "resnet18")
    metadata = dict(Scores(path).spec.metadata) | {"architecture": "vit_b_32", "input_size": "100"}
    save_file(load_file(path), path, metadata)
    with pytest.raises(StartupError) as error:
        Scores(path).setup(DEVICE)
    assert "has metadata 'input_size' 100, which vit_b_32 cannot take (" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["deeplabv3_resnet50", "fasterrcnn_resnet50_fpn", "raft_small", "r3d_18"])
def test_what_is_no_classifier_of_images_is_refused_in_one_line(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "weights.safetensors"
    write(path, "mobilenet_v3_small")
    save_file(load_file(path), path, dict(Scores(path).spec.metadata) | {"architecture": architecture})
    with pytest.raises(StartupError, match="must name one of torchvision's classifiers, such as 'resnet50'"):
        Scores(path).setup(DEVICE)


def test_weights_without_the_counters_of_batch_norms_are_whole(tmp_path: Path) -> None:
    # given: frozen batch norms, which have none
    path = tmp_path / "weights.safetensors"
    network = write(path, "mobilenet_v3_small")
    metadata = dict(Scores(path).spec.metadata)
    tensors = {name: value for name, value in network.state_dict().items() if "num_batches_tracked" not in name}
    assert len(tensors) < len(network.state_dict())
    save_file(tensors, path, metadata)
    # when
    module = Scores(path)
    module.setup(DEVICE)
    # then
    loaded = module.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
