"""What a weights file says of itself: the metadata that every built-in module reads, checked, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvworker.errors import StartupError
from cvworker.modules.metadata import read_metadata, refuse

KEYS = ("architecture", "classes", "input_size", "mean", "std")
UNUSED = "N/A"
"""What torchvision calls outputs that stand for nothing; the only name that may come twice."""
MAX_SIDE = 4096
"""Pixels; more is a typing error, and would allocate accordingly."""


@dataclass(frozen=True)
class Spec:
    """The metadata of a weights file.

    ``architecture`` is torchvision's name of the network; ``classes`` names its outputs, in order; ``input_size`` is
    the side, in pixels, of the square that it takes; ``mean`` and ``std`` are per RGB channel, for pixels from 0 to 1;
    ``metadata`` is all of it as it stands, for what only one module needs.
    """

    path: Path
    architecture: str
    classes: tuple[str, ...]
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metadata: Mapping[str, str]

    def refuse(self, problem: str) -> StartupError:
        """The error that names the file, what is wrong with it and (in ``problem``) the way out."""
        return refuse(self.path, problem)

    def value(self, key: str, default: Any = None) -> Any:
        """What only one module needs, from JSON; ``default`` where it is absent, unless that is None.

        Raises:
            StartupError: it is absent and there is no default, or it is not JSON.
        """
        return default if default is not None and key not in self.metadata else _json(self.path, self.metadata, key)

    def side(self, key: str, default: int | None = None) -> int:
        """A number of pixels.

        Raises:
            StartupError: it is absent and there is no default, or no such number.
        """
        return _whole(self.path, self.value(key, default), key, f"a side from 1 to {MAX_SIDE} pixels", MAX_SIDE)


def read_spec(path: Path) -> Spec:
    """Read a weights file's metadata, without its tensors.

    Raises:
        StartupError: one line with the file, what is wrong with it and the way out.
    """
    metadata = _complete(path)
    size = _json(path, metadata, "input_size")
    return Spec(
        path=path,
        architecture=metadata["architecture"],
        classes=_classes(path, metadata),
        input_size=_whole(path, size, "input_size", f"a side from 1 to {MAX_SIDE} pixels", MAX_SIDE),
        mean=_channels(path, metadata, "mean", above=-math.inf),
        std=_channels(path, metadata, "std", above=0),
        metadata=metadata,
    )


def is_number(value: Any) -> bool:
    """A finite number, as JSON has them: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _complete(path: Path) -> dict[str, str]:
    metadata = read_metadata(path)
    if missing := [key for key in KEYS if not metadata.get(key)]:
        raise refuse(path, f"does not say its {', '.join(missing)}; save it with the metadata {', '.join(KEYS)}")
    return metadata


def _json(path: Path, metadata: Mapping[str, str], key: str) -> Any:
    """One value of the metadata, which holds strings only."""
    try:
        return json.loads(metadata[key])
    except KeyError as error:
        raise refuse(path, f"has no metadata {key!r}; save it again with that, as JSON") from error
    except ValueError as error:
        raise refuse(path, f"has metadata {key!r} that is not JSON; save it again with json.dumps") from error


def _classes(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    value = _json(path, metadata, "classes")
    names = value if isinstance(value, list) and all(isinstance(name, str) and name for name in value) else []
    used = [name for name in names if name != UNUSED]
    if not used or len(set(used)) < len(used):
        raise refuse(path, "has metadata 'classes' that is not a JSON list of distinct names; save it again with one")
    return tuple(names)


def _whole(path: Path, value: Any, key: str, wanted: str, largest: float = math.inf) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise refuse(path, f"has metadata {key!r} {value!r}; save it again with {wanted}")
    return value


def _channels(path: Path, metadata: Mapping[str, str], key: str, above: float) -> tuple[float, ...]:
    value = _json(path, metadata, key)
    if not (isinstance(value, list) and len(value) == 3 and all(is_number(part) and part > above for part in value)):
        wanted = f"three numbers{'' if math.isinf(above) else f' above {above:g}'}, for red, green and blue"
        raise refuse(path, f"has metadata {key!r} {value!r}; save it again with {wanted}")
    return tuple(float(part) for part in value)
