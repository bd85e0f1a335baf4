"""Torchvision's detectors, made to take bytes and to be safe in half precision."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torchvision.models.detection
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.misc import Conv2dNormActivation

from cvworker.modules.detect import BACKGROUND
from cvworker.modules.spec import Spec
from cvworker.modules.weighted import normalisation, unknown

FAMILIES = ("ssd", "fasterrcnn", "retinanet", "fcos")
"""What the names of torchvision's box detectors begin with; the others also answer masks or keypoints."""


def build(spec: Spec, score_threshold: float) -> nn.Module:
    """The detector that ``spec`` names, with any values, on the CPU: it takes a list of ``uint8 [3, H, W]``.

    Raises:
        StartupError: there is no such detector, or its class 0 must be the background and is not.
    """
    network: Any = _network(spec)
    if isinstance(network, SSD | FasterRCNN) and spec.classes[0] != BACKGROUND:
        raise spec.refuse(
            f"has metadata 'classes' that begin with {spec.classes[0]!r}, but output 0 of {spec.architecture} is "
            f"{BACKGROUND!r}; save it again with that in front"
        )
    if isinstance(network, FasterRCNN):
        network.roi_heads.score_thresh = score_threshold
        heads = [network.rpn.head, network.roi_heads.box_predictor]
    else:
        network.score_thresh = score_threshold
        heads = [network.head]
    for head in heads:
        head.register_forward_hook(_in_full)
    network.transform = FromBytes(spec, network.transform.size_divisible)
    built: nn.Module = network
    return built


class FromBytes(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision has no types
    """Normalises on the device what ``preprocess`` has scaled already, and pads a batch to one shape.

    The network's own transform takes floats, four times the bytes, and scales them on the device. Boxes come out in
    pixels of what went in.
    """

    def __init__(self, spec: Spec, size_divisible: int) -> None:
        super().__init__(spec.input_size, spec.input_size, spec.mean, spec.std, size_divisible)
        scale, shift = normalisation(spec, torch.device("cpu"))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        normal: Tensor = self.shift + image.float() * self.scale
        return normal

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


class ShuffleMaps(nn.Module):
    """Feature maps of ShuffleNetV2 x0.5 at strides 16 and 32, and two more at 64 and 128, for SSD."""

    channels = (96, 1024, 256, 128)

    def __init__(self) -> None:
        super().__init__()
        self.base = torchvision.models.shufflenet_v2_x0_5(weights=None)
        self.base.fc = nn.Identity()
        self.further = nn.ModuleList(
            nn.Sequential(Conv2dNormActivation(before, after // 2, 1), Conv2dNormActivation(after // 2, after, 3, 2))
            for before, after in pairwise(self.channels[1:])
        )

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        maps = [self.base.stage3(self.base.stage2(self.base.maxpool(self.base.conv1(batch))))]
        maps.append(self.base.conv5(self.base.stage4(maps[0])))
        for block in self.further:
            maps.append(block(maps[-1]))
        return {str(i): each for i, each in enumerate(maps)}


def ssdlite_shufflenet(classes: int) -> nn.Module:
    """SSDLite on ShuffleNetV2 x0.5: under a million parameters, and quick on a CPU."""
    anchors = DefaultBoxGenerator([[2, 3]] * len(ShuffleMaps.channels), scales=[0.2, 0.4, 0.6, 0.8, 1.0])
    head = SSDLiteHead(list(ShuffleMaps.channels), anchors.num_anchors_per_location(), classes, nn.BatchNorm2d)
    network: nn.Module = SSD(ShuffleMaps(), anchors, (320, 320), classes, head=head, nms_thresh=0.5)
    return network


ASSEMBLED: dict[str, Callable[[int], nn.Module]] = {"ssdlite_shufflenet_v2_x0_5": ssdlite_shufflenet}
"""Detectors of torchvision's parts, by a name like its own."""


def _network(spec: Spec) -> nn.Module:
    name, classes = spec.architecture, len(spec.classes)
    if name in ASSEMBLED:
        return ASSEMBLED[name](classes)
    names = torchvision.models.list_models(module=torchvision.models.detection)
    if name not in names or not name.startswith(FAMILIES):
        raise unknown(spec, "box detectors", "fasterrcnn_resnet50_fpn_v2")
    network: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    return network


def _in_full(_: nn.Module, __: Any, output: Any) -> Any:
    """What a head gives, in float32: anchors are cast to its type, and bf16 knows no odd pixel over 256."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.float(), output)
