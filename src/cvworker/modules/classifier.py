"""What image classifiers share: the torchvision network, resize and normalise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cvworker.modules.metadata import first_line
from cvworker.modules.weighted import Weighted, normalisation, unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DIGITS = 4
"""Of a score: more is noise, and each costs bytes in every callback."""


class Classifier(Weighted):
    """A torchvision image classifier: extend it, and turn ``self.logits(batch)`` into results in ``process``."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        self.min_side = self.spec.input_size

    def build(self) -> nn.Module:
        """The classifier that the weights name; a vision transformer is made for their input size."""
        import torchvision.models

        name = self.spec.architecture
        if name not in torchvision.models.list_models(module=torchvision.models):
            raise unknown(self.spec, "classifiers", "resnet50")
        options = {"image_size": self.spec.input_size} if name.startswith("vit_") else {}
        try:
            network: nn.Module = torchvision.models.get_model(
                name, weights=None, num_classes=len(self.spec.classes), **options
            )
        except (ValueError, AssertionError) as error:  # a transformer's patches must fill the square
            raise self.spec.refuse(
                f"has metadata 'input_size' {self.spec.input_size}, which {name} cannot take "
                f"({first_line(error)}); save it again with the size that it was trained with"
            ) from error
        return network

    def setup(self, device: torch.device) -> None:
        """Load the network into ``self.model``, in eval mode on ``device``.

        Raises:
            StartupError: the tensors are not those of the architecture and classes that the file names.
        """
        super().setup(device)
        self._scale, self._shift = normalisation(self.spec, device)

    def load_exported(self, device: torch.device) -> nn.Module:
        """A ``torch.export`` program or an ONNX model, which takes normalised floats and gives logits."""
        from cvworker.modules.programs import load_classifier

        return load_classifier(self.spec, device)

    def preprocess(self, image: Tensor) -> Tensor:
        """Scale ``uint8 [3, H, W]`` to ``uint8 [3, S, S]``; it travels as bytes and is normalised on the device."""
        from torch.nn.functional import interpolate  # what torchvision's resize calls, without loading torchvision

        side = self.spec.input_size
        return interpolate(image[None], size=(side, side), mode="bilinear", antialias=True)[0]

    def logits(self, batch: Tensor) -> Tensor:
        """From ``uint8 [N, 3, S, S]`` on the device to ``float32 [N, classes]``."""
        output: Tensor = self.model(self._shift + batch.float() * self._scale)
        return output.float()  # half precision would round scores near 1 to 1
