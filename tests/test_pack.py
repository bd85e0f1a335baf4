"""``cvworker pack``: checkpoints as people have them, and what is understood of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from safetensors.torch import load_file, save_file
from torch import nn

from cvworker.cli import main
from cvworker.modules.scene import Scene
from cvworker.modules.spec import read_spec
from world import BIN

NAMES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.squeezenet1_1(num_classes=len(NAMES))
    return model.eval()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n\nbird\n")
    return tmp_path


def pack(*arguments: str) -> int:
    return main(["pack", *arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is told in; nothing is written."""
    before = sorted(Path().iterdir())
    assert pack(*arguments) == 2
    assert sorted(Path().iterdir()) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def wrapped(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "save",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": wrapped(state, "module.")},
        lambda state: wrapped(state, "_orig_mod."),
        lambda state: {"state_dict": wrapped(state, "model.") | {"criterion.weight": torch.ones(3)}},
        lambda state: {"model_state_dict": wrapped(state, "module._orig_mod."), "class_to_idx": {"x": 0}},
    ],
    ids=["bare", "with epoch", "DDP", "compiled", "Lightning", "both"],
)
def test_a_state_dict_is_found_wherever_training_scripts_put_it(
    save: Any, network: nn.Module, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(save(network.state_dict()), "model.pth")
    assert pack("model.pth", "--classes", "classes.txt", "--input-size", "64") == 0
    spec = read_spec(here / "model.safetensors")
    assert (spec.architecture, spec.classes, spec.input_size) == ("squeezenet1_1", tuple(NAMES), 64)
    packed = load_file(here / "model.safetensors")
    assert all(torch.equal(packed[name], tensor) for name, tensor in network.state_dict().items())
    said = capsys.readouterr().out
    assert "recognised by 52 tensors" in said
    assert "cvworker check --module scene --weights model.safetensors" in said


def test_the_packed_file_gives_the_networks_own_answers(network: nn.Module, here: Path) -> None:
    torch.save(network.state_dict(), "model.pth")
    assert pack("model.pth", "--classes", "classes.txt", "--input-size", "64") == 0
    module = Scene(here / "model.safetensors")
    module.setup(torch.device("cpu"))
    sample = module.preprocess(module.example())
    with torch.inference_mode():
        [result] = module.process(module.collate([sample]))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (module.spec.mean, module.spec.std))
        expected = network((sample[None] / 255 - mean) / std).softmax(1)[0]
    assert result["label"] == NAMES[int(expected.argmax())]
    scores = {each["label"]: each["score"] for each in result["labels"]}
    assert scores == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=2e-4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "cat\ndog\nbird"),
        ("a.json", '["cat", "dog", "bird"]'),
        ("b.json", '{"0": "cat", "2": "bird", "1": "dog"}'),
        ("c.json", '{"dog": 1, "cat": 0, "bird": 2}'),
    ],
)
def test_classes_are_read_from_lists_of_every_usual_form(name: str, text: str, network: nn.Module, here: Path) -> None:
    torch.save(network.state_dict(), "model.pth")
    Path(name).write_text(text)
    assert pack("model.pth", "--classes", name, "--input-size", "64") == 0
    assert read_spec(here / "model.safetensors").classes == tuple(NAMES)


def test_what_the_checkpoint_says_is_used_and_what_is_given_wins(network: nn.Module, here: Path) -> None:
    saved = {"state_dict": network.state_dict(), "classes": NAMES, "input_size": 96, "mean": [0.1, 0.2, 0.3]}
    torch.save(saved, "model.pth")
    given = ("--mean", "0.5,0.5,0.5", "--meta", '{"top_k": 2}')
    assert pack("model.pth", "--output", "out.safetensors", *given) == 0
    spec = read_spec(here / "out.safetensors")
    assert (spec.classes, spec.input_size, spec.mean) == (tuple(NAMES), 96, (0.5, 0.5, 0.5))
    assert spec.std == (0.229, 0.224, 0.225)
    assert Scene(here / "out.safetensors").top_k == 2


def test_safetensors_without_metadata_are_taken_and_torchvisions_own_classes_known(here: Path) -> None:
    network = torchvision.models.squeezenet1_0(num_classes=1000)
    save_file(network.state_dict(), "bare.safetensors")
    assert pack("bare.safetensors", "--input-size", "64", "--output", "out.safetensors") == 0
    spec = read_spec(here / "out.safetensors")
    assert (spec.architecture, len(spec.classes), spec.classes[1]) == ("squeezenet1_0", 1000, "goldfish")


def test_a_detector_is_recognised_with_its_sizes_and_tried_in_detect(here: Path) -> None:
    network = torchvision.models.get_model(
        "ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3
    )
    torch.save(network.state_dict(), "boxes.pth")
    Path("classes.txt").write_text("__background__\ncar\nbus\n")
    assert pack("boxes.pth", "--classes", "classes.txt") == 0
    spec = read_spec(here / "boxes.safetensors")
    assert (spec.architecture, spec.input_size, spec.mean) == ("ssdlite320_mobilenet_v3_large", 320, (0.5, 0.5, 0.5))


def test_an_output_is_replaced_only_where_that_is_wished(
    network: nn.Module, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(network.state_dict(), "model.pth")
    Path("model.safetensors").write_text("mine")
    assert "--force" in refusal(capsys, "model.pth", "--classes", "classes.txt")
    assert Path("model.safetensors").read_text() == "mine"
    assert pack("model.pth", "--classes", "classes.txt", "--input-size", "64", "--force") == 0


class _Runs:
    def __reduce__(self) -> Any:
        return Path.write_text, (Path("harm"), "done")


def test_code_in_a_pickle_is_named_and_not_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "x": _Runs()}, "evil.pth")
    said = refusal(capsys, "evil.pth")
    assert "would run code" in said
    assert "state_dict()" in said


def test_a_whole_module_is_told_how_to_be_saved(
    network: nn.Module, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(network, "whole.pth")
    assert "SqueezeNet" in refusal(capsys, "whole.pth")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["missing.pth"], "cannot be opened"),
        (["empty.pth"], "is empty"),
        (["cut.pth"], "copy or download it again"),
        (["text.pth"], "neither a checkpoint"),
        (["number.pth"], "holds a int"),
        (["nothing.pth"], "no state dict in it (it has: epoch)"),
        (["other.pth"], "could be recognised"),
        (["model.pth"], "does not name its 3 classes"),
        (["model.pth", "--classes", "two.txt"], "there are 2, but model.pth has 3 outputs"),
        (["model.pth", "--classes", "nope.txt"], "classes: nope.txt cannot be read"),
        (["model.pth", "--classes", "number.json"], "must hold a JSON list"),
        (["model.pth", "--classes", "classes.txt", "--architecture", "resnet999"], "torchvision has no 'resnet999'"),
        (["model.pth", "--classes", "classes.txt", "--architecture", "alexnet"], "but alexnet with 3 classes needs"),
        (["model.pth", "--classes", "classes.txt", "--mean", "1,2"], "mean: three numbers"),
        (["model.pth", "--classes", "classes.txt", "--meta", "{"], "meta: not JSON"),
        (["model.pth", "--classes", "classes.txt", "--module", "threat"], "--meta"),
        (["model.pth", "--classes", "classes.txt", "--output", "no/such.safetensors"], "the folder no does not exist"),
        (["model.pth", "--classes", "classes.txt", "--output", "model.bin"], "must end in .safetensors"),
        (["nan.pth", "--classes", "classes.txt"], "not finite"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out_and_nothing_is_written(
    arguments: list[str], expected: str, network: nn.Module, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = network.state_dict()
    torch.save(state, "model.pth")
    torch.save({**state, "classifier.1.bias": torch.full([3], torch.nan)}, "nan.pth")
    torch.save({"layer.weight": torch.ones(3, 3)}, "other.pth")
    torch.save(5, "number.pth")
    torch.save({"epoch": 1}, "nothing.pth")
    Path("cut.pth").write_bytes(Path("model.pth").read_bytes()[:1000])
    Path("empty.pth").touch()
    Path("text.pth").write_text("weights, honestly")
    Path("two.txt").write_text("a\nb\n")
    Path("number.json").write_text("[1, 2, 3]")
    assert expected in refusal(capsys, *arguments)


def test_the_command_itself_packs_and_the_help_has_examples(network: nn.Module, here: Path) -> None:
    torch.save({"state_dict": network.state_dict(), "classes": NAMES}, "model.pth")
    done = subprocess.run(
        [BIN / "cvworker", "pack", "model.pth", "--input-size", "64"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    example = next(line for line in done.stdout.splitlines() if line.startswith("example"))
    assert json.loads(example.removeprefix("example"))["label"] in NAMES
    help_text = subprocess.run([BIN / "cvworker", "pack", "--help"], capture_output=True, text=True, timeout=60).stdout
    assert "cvworker pack model.pth" in help_text
