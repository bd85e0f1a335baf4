"""The scene classifier: what kind of place a picture shows, as the likeliest few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cvworker.modules.classifier import DIGITS, Classifier
from cvworker.modules.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

TOP_K = 5


class Scene(Classifier):
    """One label for each picture, with the likeliest others beside it.

    The weights' metadata may name, besides what every :class:`Classifier` needs, ``top_k``: how many labels a result
    lists, by default 5.
    """

    name = "scene"
    demo_weights: ClassVar[Path | None] = Path(__file__).with_name("weights") / "scene.safetensors"

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        self.top_k = min(_top_k(self.spec), len(self.spec.classes))

    def process(self, batch: Tensor) -> Sequence[Mapping[str, Any]]:
        """From ``uint8 [N, 3, S, S]`` on the device to the likeliest labels of each picture.

        Each result has ``label``, the likeliest, and ``labels``: the ``top_k`` likeliest with their scores, highest
        first. Scores of all classes add up to 1 (softmax).
        """
        import torch

        scores, indices = self.logits(batch).softmax(1).topk(self.top_k)
        rows = torch.stack([scores, indices.float()], 1).tolist()  # one copy from the device; exact up to 2^24 classes
        return [self._result(*row) for row in rows]

    def _result(self, scores: Sequence[float], indices: Sequence[float]) -> dict[str, Any]:
        labels = [
            {"label": self.spec.classes[int(index)], "score": round(score, DIGITS)}
            for score, index in zip(scores, indices, strict=True)
        ]
        return {"label": labels[0]["label"], "labels": labels}


def _top_k(spec: Spec) -> int:
    value = spec.value("top_k", TOP_K)
    if type(value) is not int or value < 1:
        raise spec.refuse(f"has metadata 'top_k' {value!r}; save it again with a whole number from 1 on")
    return value
