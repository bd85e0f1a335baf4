"""What image classifiers share: weights that describe themselves, the torchvision network, resize and normalise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError, safe_open

from cvworker.errors import StartupError
from cvworker.module import Module

if TYPE_CHECKING:  # so that bad weights can be told in the process that was started, which does without torch
    import torch
    from torch import Tensor, nn

KEYS = ("architecture", "classes", "input_size", "mean", "std")
_MAX_INPUT_SIZE = 4096  # pixels; more is a typing error, and would allocate accordingly


@dataclass(frozen=True)
class Spec:
    """What a weights file says of itself in its safetensors metadata.

    ``input_size`` is the side, in pixels, of the square that the network takes; ``mean`` and ``std`` are per RGB
    channel, for pixels from 0 to 1; ``metadata`` is all of it as it stands, for what only one module needs.
    """

    path: Path
    architecture: str
    classes: tuple[str, ...]
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metadata: Mapping[str, str]


class Classifier(Module):
    """A torchvision image classifier: extend it, and turn ``self.logits(batch)`` into results in ``process``."""

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
        self.min_side = self.spec.input_size

    def setup(self, device: torch.device) -> None:
        """Load the network into ``self.model``, in eval mode on ``device``.

        Raises:
            StartupError: the tensors are not those of the architecture and classes that the file names.
        """
        import torch

        self.model = load_network(self.spec).eval().to(device)
        # (x / 255 - mean) / std, as one multiplication and one addition
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.spec.mean, self.spec.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def preprocess(self, image: Tensor) -> Tensor:
        """Scale ``uint8 [3, H, W]`` to ``uint8 [3, S, S]``; it travels as bytes and is normalised on the device."""
        from torch.nn.functional import interpolate  # what torchvision's resize calls, without loading torchvision

        side = self.spec.input_size
        return interpolate(image[None], size=(side, side), mode="bilinear", antialias=True)[0]

    def logits(self, batch: Tensor) -> Tensor:
        """From ``uint8 [N, 3, S, S]`` on the device to ``float32 [N, classes]``."""
        output: Tensor = self.model(self._shift + batch.float() * self._scale)
        return output.float()  # half precision would round scores near 1 to 1


def read_spec(path: Path) -> Spec:
    """Read a safetensors file's metadata, without its tensors.

    Raises:
        StartupError: one line with the file, what is wrong with it and the way out.
    """
    metadata = _metadata(path)
    return Spec(
        path=path,
        architecture=metadata["architecture"],
        classes=_classes(path, metadata),
        input_size=_input_size(path, metadata),
        mean=_channels(path, metadata, "mean", above=-math.inf),
        std=_channels(path, metadata, "std", above=0),
        metadata=metadata,
    )


def load_network(spec: Spec) -> nn.Module:
    """The torchvision network with the file's tensors, on the CPU in float32, whatever they were stored as.

    Raises:
        StartupError: an unknown architecture, or tensors that are not its own.
    """
    import torchvision.models
    from safetensors.torch import load_file

    if spec.architecture not in torchvision.models.list_models(module=torchvision.models):
        raise refuse(
            spec.path,
            f"names an architecture that torchvision does not have: {spec.architecture!r}; its metadata must name "
            f"one of torchvision's classifiers, such as 'resnet50'",
        )
    network: nn.Module = torchvision.models.get_model(spec.architecture, weights=None, num_classes=len(spec.classes))
    try:
        tensors = load_file(spec.path)
    except (OSError, SafetensorError) as error:
        raise refuse(spec.path, f"cannot be read ({_first_line(error)}); copy or download it again") from error
    _check_tensors(spec, tensors, network.state_dict())
    network.load_state_dict(tensors)
    return network


def refuse(path: Path, problem: str) -> StartupError:
    """The error that names the file, what is wrong with it and (in ``problem``) the way out."""
    return StartupError(f"weights: {path} {problem}")


def json_value(path: Path, metadata: Mapping[str, str], key: str) -> Any:
    """One value of the metadata, which holds strings only.

    Raises:
        StartupError: it is not there, or not JSON.
    """
    try:
        return json.loads(metadata[key])
    except KeyError as error:
        raise refuse(path, f"has no metadata {key!r}; save it again with that, as JSON") from error
    except ValueError as error:
        raise refuse(path, f"has metadata {key!r} that is not JSON; save it again with json.dumps") from error


def is_number(value: Any) -> bool:
    """A finite number, as JSON has them: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_tensors(spec: Spec, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names and shapes here: torch's own message is one line for each tensor."""
    wanted = f"{spec.architecture} with {len(spec.classes)} classes"
    way_out = "name the architecture and classes that it was trained with in its metadata, or use another file"
    for name, tensor in expected.items():
        if name not in found:
            raise refuse(spec.path, f"lacks the tensor {name!r} of {wanted}; {way_out}")
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, but {wanted} needs {list(tensor.shape)}"
            raise refuse(spec.path, f"has {name!r} of shape {shapes}; {way_out}")
        if not found[name].isfinite().all():
            raise refuse(spec.path, f"has values in {name!r} that are not finite; train or convert it again")
    if extra := found.keys() - expected.keys():
        raise refuse(spec.path, f"has the tensor {min(extra)!r}, which {wanted} does not have; {way_out}")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:  # OSErrors have better texts than safe_open's
            start = file.read(4)
        with safe_open(path, framework="numpy") as tensors:
            metadata: dict[str, str] = tensors.metadata() or {}
    except OSError as error:
        reason = error.strerror or error
        raise refuse(path, f"cannot be opened ({reason}); set --weights to a safetensors file") from error
    except SafetensorError as error:
        if start.startswith((b"PK\x03\x04", b"\x80")):  # torch.save's zip, or a bare pickle
            raise refuse(path, "is a pickle, which could run code when loaded; convert it to safetensors") from error
        reason = _first_line(error)
        raise refuse(path, f"is no safetensors file, or a damaged one ({reason}); copy or download it again") from error
    if missing := [key for key in KEYS if not metadata.get(key)]:
        raise refuse(path, f"does not say its {', '.join(missing)}; save it with the metadata {', '.join(KEYS)}")
    return metadata


def _classes(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    value = json_value(path, metadata, "classes")
    names = value if isinstance(value, list) and all(isinstance(name, str) and name for name in value) else []
    if not names or len(set(names)) < len(names):
        raise refuse(path, "has metadata 'classes' that is not a JSON list of distinct names; save it again with one")
    return tuple(names)


def _input_size(path: Path, metadata: Mapping[str, str]) -> int:
    value = json_value(path, metadata, "input_size")
    if type(value) is not int or not 1 <= value <= _MAX_INPUT_SIZE:
        allowed = f"a side from 1 to {_MAX_INPUT_SIZE} pixels"
        raise refuse(path, f"has metadata 'input_size' {value!r}; save it again with {allowed}")
    return value


def _channels(path: Path, metadata: Mapping[str, str], key: str, above: float) -> tuple[float, ...]:
    value = json_value(path, metadata, key)
    if not (isinstance(value, list) and len(value) == 3 and all(is_number(part) and part > above for part in value)):
        wanted = f"three numbers{'' if math.isinf(above) else f' above {above:g}'}, for red, green and blue"
        raise refuse(path, f"has metadata {key!r} {value!r}; save it again with {wanted}")
    return tuple(float(part) for part in value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
