"""Every installed module and every example, run each way there is: their answers agree.

A way takes a module and pictures, and gives one result for each, in order. Another way is one more function in
``WAYS``.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
import torch
from PIL import Image, ImageDraw

from cvworker.loading import DEMO, installed, load
from cvworker.testing import call_hooks, run
from modules.examples import WEIGHTS, spec_of, weights_of
from world import BIN

ABSOLUTE, RELATIVE = 2e-3, 1e-3
"""Numbers with a fraction agree that differ by no more: batches of other sizes are added up in another order."""

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Case:
    """A module as ``--module`` and ``--weights`` name it."""

    spec: str
    weights: Path | str | None


def by_worker(case: Case, pictures: Sequence[bytes]) -> list[Any]:
    """Queue, download, DataLoader, model process, callback."""
    return [answer.result for answer in run(case.spec, pictures, weights=case.weights)]


def by_hooks(case: Case, pictures: Sequence[bytes]) -> list[Any]:
    """Decode, preprocess, collate and process, called one after the other in this process."""
    return list(call_hooks(case.spec, pictures, weights=case.weights))


def by_hooks_one_at_a_time(case: Case, pictures: Sequence[bytes]) -> list[Any]:
    """The same with batches of one: a result must not depend on its neighbours."""
    return list(call_hooks(case.spec, pictures, weights=case.weights, batch_size=1))


def by_bulk(case: Case, pictures: Sequence[bytes]) -> list[Any]:
    """``cvworker bulk`` over a folder with the pictures, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        images, results = Path(folder, "images"), Path(folder, "results")
        images.mkdir()
        for number, picture in enumerate(pictures):
            (images / f"{number:02}.jpg").write_bytes(picture)  # what it is, is told by its bytes
        command = [BIN / "cvworker", "bulk", "--module", case.spec, "--input", images, "--output", results]
        weights = ["--weights", case.weights] if case.weights else []
        fixed = ["--precision", "fp32", "--optimize", "off", "--preprocess-workers", "1", "--batch-size", "4"]
        done = subprocess.run([*command, *weights, *fixed], capture_output=True, text=True, timeout=300, cwd=folder)
        assert done.returncode == 0, done.stderr
        rows = pyarrow.dataset.dataset(sorted(results.glob("*.parquet"))).to_table().to_pylist()
    return [json.loads(row["result"]) for row in sorted(rows, key=lambda row: row["image_url"])]


WAYS: dict[str, Callable[[Case, Sequence[bytes]], list[Any]]] = {
    "worker": by_worker,
    "hooks": by_hooks,
    "hooks one at a time": by_hooks_one_at_a_time,
    "bulk": by_bulk,
}


@pytest.fixture(scope="module", params=[*installed(), *(f"example {name}" for name in WEIGHTS)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, _, example = request.param.partition(" ")
    if example:
        return Case(spec_of(example), weights_of(example, tmp_path_factory.mktemp(example)))
    return Case(kind, DEMO if getattr(load(kind), "demo_weights", None) else None)


@pytest.fixture(scope="module")
def expected(case: Case) -> list[Any]:
    return by_hooks(case, PICTURES)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "hooks"])
def test_answers_are_the_same_whichever_way_a_module_is_run(case: Case, expected: list[Any], way: str) -> None:
    found = WAYS[way](case, PICTURES)
    assert len(found) == len(PICTURES)
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert (disagreement(one, other) or "") == "", f"picture {number}"


def test_a_result_says_something_of_the_picture(expected: list[Any]) -> None:
    assert all(isinstance(result, dict) and result for result in expected)
    assert any(disagreement(expected[0], other) for other in expected[1:])


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ({"a": [1, 0.5]}, {"a": [1, 0.501]}, True),
        ({"a": [1, 0.5]}, {"a": [2, 0.5]}, False),
        ({"a": 0.5}, {"a": 0.51}, False),
        ({"a": 0.5}, {"b": 0.5}, False),
        ({"a": [1]}, {"a": [1, 1]}, False),
        ({"a": "x"}, {"a": "y"}, False),
        ({"a": True}, {"a": 1}, False),
    ],
)
def test_a_disagreement_is_seen(one: Any, other: Any, agree: bool) -> None:
    assert (disagreement(one, other) is None) == agree


def disagreement(one: Any, other: Any, at: str = "result") -> str | None:
    """Where two results differ first, or None."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        parts = [(one[key], other[key], f"{at}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = [(a, b, f"{at}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True))]
    elif type(one) is type(other) is float:
        close = math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        return None if close else f"{at}: {one} and {other}"
    else:
        return None if type(one) is type(other) and one == other else f"{at}: {one!r} and {other!r}"
    return next((found for part in parts if (found := disagreement(*part))), None)


def pictures() -> list[bytes]:
    """Ten pictures of other sizes, shapes, contents and formats."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (width, height) in enumerate([(320, 240), (240, 320), (257, 111), (64, 64), (800, 600)] * 2):
        coarse = torch.randint(0, 256, (height // 16, width // 16, 3), dtype=torch.uint8, generator=generator).numpy()
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        if number >= 5:  # things on a plain ground, light or dark
            picture = Image.new("RGB", (width, height), (8, 8, 8) if number % 2 else (250, 250, 250))
        pen = ImageDraw.Draw(picture)
        for at, colour in zip((0.1, 0.4, 0.7), ("red", "black", "blue"), strict=True):
            pen.rectangle((at * width, at * height, (at + 0.2) * width, (at + 0.15) * height), fill=colour)
        file = io.BytesIO()
        picture.save(file, ("JPEG", "PNG", "WEBP")[number % 3])
        made.append(file.getvalue())
    return made


PICTURES = pictures()
