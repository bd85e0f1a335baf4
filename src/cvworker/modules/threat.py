"""The threat classifier: which dangerous things a picture shows, several at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cvworker.modules.classifier import DIGITS, Classifier
from cvworker.modules.spec import Spec, is_number

if TYPE_CHECKING:
    from torch import Tensor


class Threat(Classifier):
    """Threats in a picture, each with a score from 0 to 1; a picture with none over its threshold is safe.

    The weights' metadata names, besides what every :class:`Classifier` needs, ``thresholds``: a JSON object with a
    number from 0 to 1 for each class.
    """

    name = "threat"
    demo_weights: ClassVar[Path | None] = Path(__file__).with_name("weights") / "threat.safetensors"

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        self.thresholds = _thresholds(self.spec)

    def process(self, batch: Tensor) -> Sequence[Mapping[str, Any]]:
        """From ``uint8 [N, 3, S, S]`` on the device to one verdict per picture.

        Each result has ``verdict`` ("threat" or "safe"), ``labels`` (those at or over their threshold, highest score
        first) and ``scores`` (of every class).
        """
        return [self._result(row) for row in self.logits(batch).sigmoid().tolist()]

    def _result(self, row: Sequence[float]) -> dict[str, Any]:
        scores = {label: round(score, DIGITS) for label, score in zip(self.spec.classes, row, strict=True)}
        found = [label for label in scores if scores[label] >= self.thresholds[label]]
        found.sort(key=lambda label: -scores[label])
        return {
            "verdict": "threat" if found else "safe",
            "labels": [{"label": label, "score": scores[label]} for label in found],
            "scores": scores,
        }


def _thresholds(spec: Spec) -> dict[str, float]:
    value = spec.value("thresholds")
    if not (isinstance(value, dict) and all(is_number(number) and 0 <= number <= 1 for number in value.values())):
        raise spec.refuse("has metadata 'thresholds' that are not numbers from 0 to 1 by class; save it again")
    if odd := sorted(value.keys() ^ set(spec.classes)):
        names = ", ".join(odd)
        raise spec.refuse(f"has 'thresholds' that do not fit its classes ({names}); save it with one for each")
    return {label: float(number) for label, number in value.items()}
