"""Other forms of a network: put on, they answer the same; taken off, nothing of them is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cvworker import Module
from cvworker.model import optimize
from cvworker.model.optimize import ChannelsLast, Compiled, PaddedForward, has_images, network_of, padded_sizes
from cvworker.model.prepacking import Prepacked


def a_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Linear(4 * 36, 2)
    return nn.Sequential(*layers).eval()


@torch.inference_mode()
def outputs(model: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    batch = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        result: torch.Tensor = model(batch)
    return result.float()


def state(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: (id(weight), weight.stride()) for name, weight in model.named_parameters()}


def test_channels_last_answers_the_same_and_comes_off_without_a_trace() -> None:
    model = a_network()
    before, expected = state(model), outputs(model)
    form = ChannelsLast(model, None)
    form.on()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs(model), expected)
    form.off()
    assert state(model) == before
    assert torch.equal(outputs(model), expected)


def test_weights_that_autocast_would_convert_are_converted_once_with_the_very_same_answers() -> None:
    model = a_network()
    model[0].register_forward_hook(lambda *_: None)  # its output is watched, so that nothing is folded into it
    expected = outputs(model, torch.bfloat16)
    ChannelsLast(model, torch.bfloat16).on()
    assert [weight.dtype for weight in model.parameters()].count(torch.bfloat16) == 4
    assert model[1].weight.dtype is torch.float32, "batch norms are computed in fp32"
    torch.testing.assert_close(outputs(model, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_convolutions_answer_the_same_for_batches_of_every_size(dtype: torch.dtype | None) -> None:
    # given convolutions of each kind: plain, strided, dilated, in groups, without a bias, folded with a norm
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False),
        nn.Conv2d(8, 4, (3, 1), dilation=(2, 1), groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
    ]
    torch.manual_seed(3)
    model = nn.Sequential(*layers).eval()
    batches = [torch.rand(shape) for shape in ((4, 3, 32, 24), (1, 3, 32, 24), (3, 3, 17, 40))]
    tolerance = {} if dtype is None else {"atol": 0.02, "rtol": 0.02}

    def answers() -> list[torch.Tensor]:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            return [model(batch).float() for batch in batches]

    expected = answers()
    form = ChannelsLast(model, dtype)
    form.on()
    packed = [layer for layer in model if isinstance(vars(layer).get("forward"), Prepacked)]
    assert len(packed) == 3
    torch.testing.assert_close(answers(), expected, **tolerance)
    # and other weights, which somebody may load later, are seen
    packed[0].weight = nn.Parameter(torch.zeros_like(packed[0].weight))
    packed[0].bias = nn.Parameter(torch.zeros_like(packed[0].bias))
    four, one, _ = answers()
    torch.testing.assert_close(four, one.expand_as(four), **tolerance)
    form.off()
    assert not any("forward" in vars(layer) for layer in model)


def test_a_convolution_that_is_trained_further_or_given_one_image_computes_as_it_always_did() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    image = torch.rand(3, 8, 8)
    expected = model(image)
    ChannelsLast(model, None).on()
    model(image[None]).sum().backward()
    assert model[0].weight.grad is not None
    with torch.inference_mode():
        torch.testing.assert_close(model(image), expected)


def test_a_layer_of_the_modules_own_keeps_its_type() -> None:
    class Own(nn.Linear):
        """May do anything with its weight."""

    model = nn.Sequential(Own(2, 2), nn.Linear(2, 2))
    ChannelsLast(model, torch.bfloat16).on()
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]


class Recorder:
    """What a CUDA graph does, on the CPU: it takes one shape only and gives the same buffer each time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays = 0

    def __call__(self, forward: Callable[..., Any], example: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        self.sizes.append(len(example))
        buffer = forward(example).clone()

        def replay(batch: torch.Tensor) -> Any:
            assert batch.shape == example.shape
            self.replays += 1
            return buffer.copy_(forward(batch))

        return replay


def double(batch: torch.Tensor, plus: float = 0.0) -> torch.Tensor:
    return batch * 2 + plus


def test_batches_are_padded_to_a_recorded_size_and_answered_without_the_padding() -> None:
    record = Recorder()
    forward = PaddedForward(double, padded_sizes(8), record)
    for count in (1, 2, 3, 4, 5, 8, 3):
        batch = torch.rand(count, 2)
        torch.testing.assert_close(forward(batch), batch * 2)
    assert record.sizes == [1, 2, 4, 8]
    assert record.replays == 7


def test_what_one_call_gave_stays_after_the_next() -> None:
    forward = PaddedForward(double, [2], Recorder())
    first = forward(torch.ones(2, 1))
    forward(torch.zeros(2, 1))
    assert first.tolist() == [[2.0], [2.0]]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(9, 1),), {}),
        ((torch.ones(0, 1),), {}),
        ((torch.tensor(1.0),), {}),
        ((torch.ones(2, 1), 1.0), {}),
        ((torch.ones(2, 1),), {"plus": 1.0}),
    ],
    ids=["too many samples", "none", "no batch", "more arguments", "named arguments"],
)
def test_a_call_that_cannot_be_replayed_runs_as_it_is(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    record = Recorder()
    forward = PaddedForward(double, padded_sizes(8), record)
    torch.testing.assert_close(forward(*args, **kwargs), double(*args, **kwargs))
    assert record.replays == 0


def test_outputs_that_are_not_one_row_a_sample_are_never_padded() -> None:
    record = Recorder()
    forward = PaddedForward(torch.mean, [4], record)
    assert forward(torch.tensor([1.0, 2.0, 3.0])) == 2.0
    assert record.sizes == []


def test_shapes_without_end_are_not_recorded_without_end() -> None:
    record = Recorder()
    forward = PaddedForward(double, [1], record)
    for width in range(1, 60):
        assert forward(torch.ones(1, width)).shape == (1, width)
    assert len(record.sizes) == PaddedForward.MAX_RECORDINGS


def test_each_precision_has_recordings_of_its_own() -> None:
    record = Recorder()
    forward = PaddedForward(nn.Linear(2, 2), [1], record)
    with torch.inference_mode():
        forward(torch.ones(1, 2))
        with torch.autocast("cpu", torch.bfloat16):
            assert forward(torch.ones(1, 2)).dtype is torch.bfloat16
    assert record.sizes == [1, 1]


@pytest.mark.parametrize(("size", "sizes"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_padded_sizes_are_powers_of_two_up_to_the_batch_size(size: int, sizes: list[int]) -> None:
    assert padded_sizes(size) == sizes


def test_without_a_compiler_a_cpu_network_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "has_compiler", lambda: False)
    model = a_network()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        Compiled(model).on()
    assert "forward" not in vars(model)


def test_a_compiled_network_stays_the_modules_own_object_and_comes_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda forward: lambda batch: forward(batch) + 1)
    model = a_network()
    expected = outputs(model)
    form = Compiled(model)
    form.on()
    torch.testing.assert_close(outputs(model), expected + 1)
    form.off()
    torch.testing.assert_close(outputs(model), expected)


def test_a_network_is_what_a_module_keeps_in_model() -> None:
    class Told(Module):
        def preprocess(self, image: Any) -> Any:
            return image

        def process(self, batch: Any) -> Any:
            return [{}] * len(batch)

    module = Told()
    assert network_of(module) is None
    for value in ("a name", nn.ReLU(), lambda batch: batch):
        module.model = value  # type: ignore[attr-defined]
        assert network_of(module) is None
    module.model = a_network()  # type: ignore[attr-defined]
    assert network_of(module) is module.model  # type: ignore[attr-defined]


def test_only_networks_with_four_dimensional_weights_have_channels() -> None:
    assert has_images(a_network())
    assert not has_images(nn.Linear(2, 2))
