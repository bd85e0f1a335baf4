"""From what ``--module`` says to the class it means, or to one line that says what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cvworker import Module
from cvworker.errors import StartupError
from cvworker.loading import check_spec, installed, load, make

GOOD = """
from cvworker import Module

class Good(Module):
    def preprocess(self, image): return image
    def process(self, batch): return [{} for _ in batch]
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports is forgotten."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("cvworker_path_", "pkg")):
            del sys.modules[name]


def a_file(folder: Path, text: str = GOOD, name: str = "mine.py") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def refusal(spec: str) -> str:
    with pytest.raises(StartupError) as refused:
        load(spec)
    text = str(refused.value)
    assert text.startswith("module: ")
    assert "\n" not in text
    return text


def test_an_installed_module_is_found_by_its_name() -> None:
    assert load("threat").name == "threat"
    assert "threat" in installed()


def test_a_name_that_is_not_installed_is_told_with_those_that_are() -> None:
    assert "threat" in refusal("thraet")


def test_a_module_in_a_file_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(f"{a_file(tmp_path)}:Good").name == "good"
    monkeypatch.chdir(tmp_path)
    assert load("mine.py:Good") is load("mine.py:Good")


def test_a_file_can_import_its_neighbours(tmp_path: Path) -> None:
    a_file(tmp_path, "NAME = 'from next door'", "pkg_neighbour.py")
    spec = a_file(tmp_path, "from pkg_neighbour import NAME\n" + GOOD + "    name = NAME\n")
    assert load(f"{spec}:Good").name == "from next door"


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    first = load(a_file(tmp_path / "a") + ":Good")
    second = load(a_file(tmp_path / "b", GOOD + "    name = 'other'\n") + ":Good")
    assert (first.name, second.name) == ("good", "other")


def test_a_module_in_a_package_is_found_by_its_dotted_name(tmp_path: Path) -> None:
    a_file(tmp_path, GOOD, "pkg_models/vision.py")
    sys.path.insert(0, str(tmp_path))
    assert load("pkg_models.vision:Good").name == "good"


def test_a_file_that_is_not_there_is_told_without_an_import(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="does not exist"):
        check_spec(f"{tmp_path}/none.py:Good")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "no class 'Good'"),
        ("class Good: pass", "does not extend cvworker.Module"),
        ("Good = 5", "does not extend cvworker.Module"),
        ("from cvworker import Module\nclass Good(Module): pass", "lacks preprocess and process"),
        (GOOD + "    image_type = 'numpy'\n", "image_type 'numpy'"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(", "SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(tmp_path: Path, text: str, hint: str) -> None:
    spec = f"{a_file(tmp_path, text)}:Good"
    assert hint in refusal(spec)
    assert hint in refusal(spec), "and again: a failed import leaves nothing behind"


def test_the_place_of_the_mistake_is_told(tmp_path: Path) -> None:
    path = a_file(tmp_path, "\n\n1 / 0\n")
    assert f"(at {path}:3)" in refusal(f"{path}:Good")


class Simple(Module):
    def preprocess(self, image: Any) -> Any:
        return image

    def process(self, batch: Any) -> Any:
        return [{}] * len(batch)


class WithDemo(Simple):
    demo_weights = Path("demo.safetensors")


class Broken(Simple):
    def __init__(self, weights: Path | None = None) -> None:
        raise ValueError("bad\nweights")


def test_a_module_is_made_with_its_weights() -> None:
    assert make(Simple, None).weights is None
    assert make(Simple, "w.safetensors").weights == Path("w.safetensors")
    assert make(WithDemo, "demo").weights == Path("demo.safetensors")


def test_a_module_without_demo_weights_says_so() -> None:
    with pytest.raises(StartupError, match="weights: module 'simple' comes with no demo weights"):
        make(Simple, "demo")


def test_what_init_raises_is_told_in_one_line() -> None:
    with pytest.raises(StartupError, match=r"module: Broken\(weights\) raised ValueError: bad weights"):
        make(Broken, None)
