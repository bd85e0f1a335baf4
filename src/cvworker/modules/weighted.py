"""What all built-in modules share: weights that describe themselves, and the torchvision network they are for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from safetensors import SafetensorError

from cvworker.errors import StartupError
from cvworker.module import Module
from cvworker.modules.metadata import first_line, is_exported
from cvworker.modules.spec import Spec, read_spec

if TYPE_CHECKING:  # so that bad weights can be told in the process that was started, which does without torch
    import torch
    from torch import Tensor, nn

COUNTER = "num_batches_tracked"
"""What a batch norm counts while it is trained: frozen ones, which detectors are often trained with, have none."""


class Weighted(Module):
    """A torchvision network with weights from a file: extend it and write ``build``, ``preprocess`` and ``process``."""

    model: nn.Module

    demo_weights: ClassVar[Path | None] = None
    """The file that ``--weights demo`` means, where one is shipped."""

    def __init__(self, weights: Path | None = None) -> None:
        """Read what the weights say of themselves; the tensors are left for ``setup``.

        Raises:
            StartupError: no weights, or a file that is not what it should be.
        """
        super().__init__(weights)
        if weights is None:
            demo = ", or --weights demo for the small set shipped with cvworker" if self.demo_weights else ""
            raise StartupError(f"module {self.name!r} needs weights: --weights FILE (or CVWORKER_WEIGHTS){demo}")
        self.spec = read_spec(weights)

    def setup(self, device: torch.device) -> None:
        """Load the network into ``self.model``, in eval mode on ``device``.

        Raises:
            StartupError: the tensors are not those of the architecture and classes that the file names.
        """
        if is_exported(self.spec.path):
            self.model = self.load_exported(device)
            return
        network = self.build()
        fill(network, self.spec)
        self.model = network.eval().to(device)

    def load_exported(self, device: torch.device) -> nn.Module:
        """The network that the weights hold in place of tensors, for modules that take such files.

        Raises:
            StartupError: this module does not, or the file is not what its metadata says.
        """
        raise self.spec.refuse(f"is an exported network, which {self.name!r} does not take; give safetensors")

    @abstractmethod
    def build(self) -> nn.Module:
        """The network that ``self.spec`` names, with any values, on the CPU.

        Raises:
            StartupError: there is no such architecture.
        """


def fill(network: nn.Module, spec: Spec) -> None:
    """Copy the file's tensors into the network, whose types they take, whatever they were stored as.

    Raises:
        StartupError: they are not its own.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(spec.path)
    except (OSError, SafetensorError) as error:
        raise spec.refuse(f"cannot be read ({first_line(error)}); copy or download it again") from error
    _check_tensors(spec, tensors, network.state_dict())
    network.load_state_dict(tensors, strict=False)  # only a counter may be missing by now


def normalisation(spec: Spec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand, each ``float32 [3, 1, 1]``: a byte times one plus the other is (byte / 255 - mean) / std."""
    import torch

    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (spec.mean, spec.std))
    return 1 / (255 * std), -mean / std


def unknown(spec: Spec, what: str, example: str) -> StartupError:
    """The error for an architecture that is not there, or not one of ``what``."""
    return spec.refuse(
        f"names an architecture that torchvision does not have: {spec.architecture!r}; its metadata must name "
        f"one of torchvision's {what}, such as {example!r}"
    )


def _check_tensors(spec: Spec, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names and shapes here: torch's own message is one line for each tensor."""
    wanted = f"{spec.architecture} with {len(spec.classes)} classes"
    way_out = "name the architecture and classes that it was trained with in its metadata, or use another file"
    for name, tensor in expected.items():
        if name not in found:
            if name.endswith(COUNTER):
                continue
            raise spec.refuse(f"lacks the tensor {name!r} of {wanted}; {way_out}")
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, but {wanted} needs {list(tensor.shape)}"
            raise spec.refuse(f"has {name!r} of shape {shapes}; {way_out}")
        if not found[name].isfinite().all():
            raise spec.refuse(f"has values in {name!r} that are not finite; train or convert it again")
    if extra := found.keys() - expected.keys():
        raise spec.refuse(f"has the tensor {min(extra)!r}, which {wanted} does not have; {way_out}")
