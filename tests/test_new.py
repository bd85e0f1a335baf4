"""``cvworker new``: a package that works as it is written, and nothing half-written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cvworker.cli import main
from cvworker.commands.new import class_name, write
from cvworker.errors import StartupError
from world import BIN

FILES = {
    "Dockerfile",
    "README.md",
    "my_module/__init__.py",
    "my_module/module.py",
    "pyproject.toml",
    "tests/test_my_module.py",
}


def ran(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """What a command that has to succeed says on stdout."""
    variables: Mapping[str, str] = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    ran([BIN / "cvworker", "new", "my_module"], folder)
    return folder / "my_module"


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_it_writes_a_package_and_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "my_module", "--into", str(tmp_path)]) == 0
    assert files_in(tmp_path / "my_module") == FILES
    assert not [path.name for path in tmp_path.iterdir() if path.name != "my_module"]
    said = capsys.readouterr().out
    for line in (
        f"  cd {tmp_path / 'my_module'}",
        "  python -m pytest ",
        "  cvworker check --module my_module/module.py:MyModule ",
    ):
        assert line in said


def test_no_placeholder_is_left(package: Path) -> None:
    for file in sorted(FILES):
        assert "$" not in (package / file).read_text(), file
    assert len((package / "Dockerfile").read_text().splitlines()) == 3


@pytest.mark.timeout(600)
def test_its_own_test_passes_at_once(package: Path) -> None:
    assert re.search(r"\b4 passed", ran([sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], package))


def test_its_code_is_clean(package: Path) -> None:
    own = "lint.isort.known-third-party = ['cvworker']"
    ran([sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", "--config", own, "."], package)
    ran([sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=120", "--check", "."], package)
    ran([sys.executable, "-m", "mypy", "--strict", "my_module", "tests"], package)
    ran([BIN / "hadolint", "--ignore", "DL3006", "Dockerfile"], package)  # untagged: the image is built locally


def test_installed_it_is_known_by_its_name(package: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    copy = shutil.copytree(package, tmp_path / "copy")  # a build leaves folders behind
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", site]
    ran([sys.executable, "-m", "pip", "install", "-q", *options, "."], copy)
    listed = ran([BIN / "cvworker", "modules"], tmp_path, PYTHONPATH=str(site))
    assert re.search(r"^my_module +my_module\.module:MyModule", listed, re.MULTILINE)


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_module").mkdir()
    (tmp_path / "my_module" / "thesis.txt").write_text("two years")
    assert main(["new", "my_module", "--into", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert files_in(tmp_path) == {"my_module/thesis.txt"}


def test_a_folder_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "my_module", "--into", str(tmp_path / "nowhere")]) == 2
    assert "--into" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="cls"):  # as a full disk would: after the first files
        write(tmp_path / "my_module", {"name": "my_module"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My-Module", "such as my_module"),
        ("9lives", "such as lives"),
        ("..", "such as my_module"),
        ("a/b", "such as a_b"),
        ("x" * 60, "no name for a package"),
        ("class", "means something else"),
        ("tests", "means something else"),
        ("json", "a package 'json'"),
        ("torch", "a package 'torch'"),
        ("threat", "'threat' is installed"),
    ],
)
def test_a_name_that_will_not_do_is_refused_with_one_that_might(name: str, said: str) -> None:
    with pytest.raises(StartupError, match=r"^name: ") as refused:
        class_name(name)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_class_has_the_packages_name() -> None:
    assert [class_name(name) for name in ("my_module", "signs", "yolo_v9")] == ["MyModule", "Signs", "YoloV9"]
