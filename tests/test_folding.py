"""Batch norms folded into the convolutions before them, where nothing but the norm sees what those give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from cvworker.model.folding import Chain, chains_of
from cvworker.model.optimize import ChannelsLast


class Network(nn.Module):
    """One convolution and one norm, put together by ``way``."""

    def __init__(self, way: Callable[[Network, Tensor], Tensor] = lambda net, x: net.norm(net.conv(x))) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.way = way

    def forward(self, batch: Tensor) -> Tensor:
        return self.way(self, batch)


def with_statistics(model: nn.Module) -> nn.Module:
    """As after training: every norm does something."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features) * 0.1
            layer.running_var = torch.rand(layer.num_features) + 0.5
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.1)
    return model.eval()


def outputs(model: nn.Module, side: int = 32) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)))
    return result


def pairs_of(model: nn.Module) -> list[Chain]:
    """Convolutions with their norms."""
    return [chain for chain in chains_of(model) if chain.norm is not None]


@pytest.mark.parametrize(
    ("name", "norms"), [("resnet18", 20), ("mobilenet_v3_small", 34), ("efficientnet_b0", 49), ("vit_b_32", 0)]
)
def test_every_norm_of_known_networks_is_folded_and_answers_stay(name: str, norms: int) -> None:
    model = with_statistics(models.get_model(name))
    assert len(pairs_of(model)) == norms
    side = 224 if name.startswith("vit") else 64
    expected = outputs(model, side)
    ChannelsLast(model, None).on()
    torch.testing.assert_close(outputs(model, side), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "activations"),
    [("resnet18", 9), ("mobilenet_v3_small", 32), ("mobilenet_v2", 35), ("efficientnet_b0", 49)],
)
def test_activations_that_alone_take_a_convolutions_output_are_computed_with_it(name: str, activations: int) -> None:
    model = with_statistics(models.get_model(name))
    assert sum(chain.activation is not None for chain in chains_of(model)) == activations


class Activations(nn.Module):
    """One convolution and one activation, put together by ``way``."""

    def __init__(self, way: Callable[[Activations, Tensor], Tensor], activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = activation
        self.way = way

    def forward(self, batch: Tensor) -> Tensor:
        return self.way(self, batch)


def changed_in_place(net: Activations, x: Tensor) -> Tensor:
    found = net.act(net.conv(x))
    found -= 0.2
    return net.act(found)  # the second call is of something else


def of_a_view(net: Activations, x: Tensor) -> Tensor:
    return net.act(net.act(net.conv(x))[:, :2] - 0.2)


def of_both(net: Activations, x: Tensor) -> Tensor:
    before = net.conv(x)
    return net.act(before) + before


def functional(net: Activations, x: Tensor) -> Tensor:
    return nn.functional.relu(net.conv(x)) + net.act(x - 0.5)


@pytest.mark.parametrize("way", [changed_in_place, of_a_view, of_both, functional])
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(), nn.SiLU()], ids=str
)
def test_answers_stay_however_an_activation_is_used(
    way: Callable[[Activations, Tensor], Tensor], activation: nn.Module
) -> None:
    torch.manual_seed(2)
    model = Activations(way, activation).eval()
    nn.init.normal_(model.conv.weight, std=3.0)  # so that ReLU6 and Hardswish meet all they tell apart
    expected = outputs(model)
    form = ChannelsLast(model, None)
    form.on()
    for _ in range(2):
        torch.testing.assert_close(outputs(model), expected)
    form.off()
    assert torch.equal(outputs(model), expected)


def test_a_watched_activation_sees_what_it_always_saw() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    model[1].register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0].clone()))
    ChannelsLast(model, None).on()
    outputs(model)
    assert bool((seen[0] < 0).any())


def test_a_detector_whose_way_depends_on_the_data_is_folded_in_its_parts() -> None:
    model = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    assert len(pairs_of(model)) == sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_a_norm_without_weights_of_its_own_is_folded_too() -> None:
    model = Network()
    model.norm = nn.BatchNorm2d(4, affine=False)
    expected = outputs(with_statistics(model))
    assert len(pairs_of(model)) == 1
    ChannelsLast(model, None).on()
    torch.testing.assert_close(outputs(model), expected)


def twice(net: Network, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + net.conv(x)


def seen_by_another(net: Network, x: Tensor) -> Tensor:
    before = net.conv(x)
    return net.norm(before) + before


def of_a_sum(net: Network, x: Tensor) -> Tensor:
    return net.norm(net.conv(x) + 1)


@pytest.mark.parametrize("way", [twice, seen_by_another, of_a_sum])
def test_a_convolution_whose_output_goes_elsewhere_too_is_left_alone(way: Callable[[Network, Tensor], Tensor]) -> None:
    model = with_statistics(Network(way))
    assert pairs_of(model) == []


def test_layers_that_are_watched_trained_or_somebodys_own_are_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        """May do anything."""

    watched, trained, own = Network(), Network(), Network()
    watched.eval().conv.register_forward_hook(lambda *_: None)
    own.norm = Own(4)
    assert [pairs_of(model) for model in (watched, trained.train(), own.eval())] == [[], [], []]


def test_looking_for_pairs_leaves_nothing_in_the_network() -> None:
    class Remembers(Network):
        """Keeps what it saw, as some networks do for a later loss."""

        def forward(self, batch: Tensor) -> Tensor:
            self.seen = self.conv(batch)
            return self.norm(self.seen)

    model = with_statistics(Remembers())
    pairs_of(model)
    assert not hasattr(model, "seen")
