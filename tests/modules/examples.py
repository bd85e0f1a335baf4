"""The examples that the repository shows, with weights made by their own scripts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
WEIGHTS = {
    "detect_then_classify": "two.safetensors",
    "huggingface_classifier": "tiny-vit",
    "onnx_classifier": "tiny.onnx",
    "picture_quality": None,
    "text_line": "digits.safetensors",
    "timm_classifier": "timm.safetensors",
}
"""What each example's ``make_weights.py`` writes; None where it needs no weights."""


def file_of(example: str) -> Path:
    return EXAMPLES / example / f"{example}.py"


def spec_of(example: str) -> str:
    """What ``--module`` takes: the one class of the file."""
    return f"{file_of(example)}:{''.join(part.capitalize() for part in example.split('_')).replace('face', 'Face')}"


def script(example: str) -> ModuleType:
    """The example's ``make_weights.py``, which is found by its name only next to the example."""
    place = str(EXAMPLES / example)
    if place not in sys.path:
        sys.path.append(place)
    spec = importlib.util.spec_from_file_location(f"make_weights_of_{example}", f"{place}/make_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights_of(example: str, folder: Path) -> Path | None:
    """Weights for the example, made in ``folder``."""
    name = WEIGHTS[example]
    if name is None:
        return None
    made: Path = script(example).make(folder / name)
    return made
