"""The object detector: what a picture shows, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cvworker.modules.classifier import DIGITS
from cvworker.modules.spec import MAX_SIDE, UNUSED, Spec, is_number
from cvworker.modules.weighted import Weighted

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCORE_THRESHOLD = 0.5
BOX_DIGITS = 2  # of a pixel
BACKGROUND = "__background__"
NOTHING = (BACKGROUND, UNUSED)


class Detect(Weighted):
    """Objects in a picture, each with a label, a score and a box in pixels of the original upright image.

    The weights' metadata may name, besides what every built-in module needs, ``score_threshold`` (0 to 1, by default
    0.5; what scores less is not reported) and ``max_size``. Without ``max_size`` a picture is stretched to a square of
    ``input_size``, as torchvision does for SSD: no pixel is spent on borders, and samples of one size make the best
    batches. With it the picture keeps its shape, as torchvision does for the others: its shorter side becomes
    ``input_size``, or less where the longer one would exceed ``max_size``.

    ``classes`` has a name for each of the network's outputs, ``__background__`` among them where it has one, just as
    torchvision lists its categories. It is never reported.
    """

    name = "detect"
    demo_weights: ClassVar[Path | None] = Path(__file__).with_name("weights") / "detect.safetensors"
    min_side = (
        None  # boxes are in the original's pixels, and an image that was decoded smaller no longer tells its size
    )

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        self.max_size = None
        if "max_size" in self.spec.metadata:
            self.max_size = self.spec.side("max_size")
            if self.max_size < self.spec.input_size:
                raise self.spec.refuse(
                    f"has metadata 'max_size' {self.max_size} below its 'input_size' {self.spec.input_size}; "
                    f"save it again with a longer side from that to {MAX_SIDE} pixels"
                )
        self.score_threshold = _score_threshold(self.spec)

    def build(self) -> nn.Module:
        """The detector that the weights name, which takes bytes."""
        from cvworker.modules.detectors import build

        return build(self.spec, self.score_threshold)

    def load_exported(self, device: torch.device) -> nn.Module:
        """A ``torch.export`` program or an ONNX model: see :mod:`cvworker.modules.programs`."""
        from cvworker.modules.programs import load_detector

        if self.max_size is not None:
            raise self.spec.refuse(
                "has metadata 'max_size', but an exported detector takes squares; export one for them"
            )
        return load_detector(self.spec, device, self.score_threshold)

    def preprocess(self, image: Tensor) -> dict[str, Tensor]:
        """Scale ``uint8 [3, H, W]``: ``image`` is ``uint8 [3, h, w]``, ``size`` the original's W and H, ``int32 [2]``.

        Both are tensors, since a sample of nothing else crosses the process border in memory that is there already.
        """
        import torch
        from torch.nn.functional import interpolate

        height, width = image.shape[-2:]
        scaled = interpolate(image[None], size=self._scaled(height, width), mode="bilinear", antialias=True)[0]
        return {"image": scaled, "size": torch.tensor([width, height], dtype=torch.int32)}

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """``images``: ``uint8 [N, 3, S, S]``, or a list where shapes differ; ``sizes``: as numbers, for the CPU."""
        import torch

        images = [sample["image"] for sample in samples]
        return {
            "images": torch.stack(images) if self.max_size is None else images,
            "sizes": [sample["size"].tolist() for sample in samples],
        }

    def process(self, batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """One result for each picture: ``width`` and ``height`` of the original in pixels, and ``objects``.

        Each object has ``label``, ``score`` and ``box`` (left, top, right, bottom, in pixels of the original), highest
        score first.
        """
        import torch

        images = batch["images"]
        outputs = self.model(list(images))
        counts = [len(output["scores"]) for output in outputs]
        # all numbers of the batch in one copy from the device
        parts = [
            torch.cat([output["boxes"], output["scores"][:, None], output["labels"][:, None]], 1) for output in outputs
        ]
        found = torch.split(torch.cat(parts).float().cpu(), counts)
        return [
            self._result(rows.tolist(), image.shape[-2:], size)
            for rows, image, size in zip(found, images, batch["sizes"], strict=True)
        ]

    def example(self) -> Any:
        """A drawn picture with objects: where nothing is found, other precisions would have no boxes to agree on."""
        import numpy
        import torch

        from cvworker.embedded import pictures

        drawn = pictures.draw(16, (640, 480))
        return torch.from_numpy(numpy.array(drawn.image)).permute(2, 0, 1).contiguous()

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the sample."""
        side = self.spec.input_size
        if self.max_size is None:
            return side, side
        scale = min(side / min(height, width), self.max_size / max(height, width))
        return max(1, int(height * scale + 1e-6)), max(1, int(width * scale + 1e-6))

    def _result(self, rows: list[list[float]], shape: Sequence[int], size: Sequence[int]) -> dict[str, Any]:
        width, height = size
        across, down = width / shape[1], height / shape[0]
        objects = [
            {
                "label": self.spec.classes[int(label)],
                "score": round(score, DIGITS),
                "box": [round(value, BOX_DIGITS) for value in (x1 * across, y1 * down, x2 * across, y2 * down)],
            }
            for x1, y1, x2, y2, score, label in rows
            if self.spec.classes[int(label)] not in NOTHING
        ]
        return {"width": width, "height": height, "objects": objects}


def _score_threshold(spec: Spec) -> float:
    value = spec.value("score_threshold", SCORE_THRESHOLD)
    if not (is_number(value) and 0 <= value <= 1):
        raise spec.refuse(f"has metadata 'score_threshold' {value!r}; save it again with a number from 0 to 1")
    return float(value)
