"""A Dockerfile's steps, followed in a folder: what can be known of an image without an engine that builds it.

Python steps are run as they are written, with the folder in the place of ``/``. The packages that they would download
are those of this environment, offered by links, so that pip finds each requirement met, or says which is not.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_PATHS = re.compile(r"(?<![\w.}/-])/(?=(?:opt|build|wheels|app|var/cache|tmp)\b)")
NOT_FOLLOWED = "apt-get "
"""How the steps begin that are Debian's and not Python's."""


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for kind, text in self.steps if kind == instruction]

    def environment(self) -> dict[str, str]:
        found = {}
        for text in self.all("ENV"):
            found.update(re.findall(r"(\w+)=(\S+)", text))
        return found


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile, with the instructions of each in order."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    stages: list[Stage] = []
    for line in re.sub(r"\s*\\\n\s*", " ", lines).splitlines():
        kind, _, rest = line.strip().partition(" ")
        if kind == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name, base))
        elif kind and stages:
            stages[-1].steps.append((kind, rest.strip()))
    return stages


def is_ignored(path: str, rules: list[str]) -> bool:
    """Whether ``.dockerignore`` keeps ``path`` out of the build: the last rule that names it or a folder of it."""
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    ignored = False
    for rule in rules:
        pattern = rule.removeprefix("!")
        if any(_matches(each, pattern) for each in above):
            ignored = not rule.startswith("!")
    return ignored


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern[3:])
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def ignore_rules(root: Path) -> list[str]:
    lines = (root / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def context(root: Path) -> Iterator[str]:
    """The files that a build is given, by their paths below ``root``."""
    rules = ignore_rules(root)
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in (".git", ".venv")]
        for name in files:
            path = str((Path(folder) / name).relative_to(root))
            if not is_ignored(path, rules):
                yield path


class Build:
    """Follows the stages one after the other; ``root`` is the file system of the one at work, and then of the last."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.root = folder / "root"
        self.not_followed: list[str] = []
        self._folder = folder
        self._source = source
        self._stages: dict[str, Path] = {}
        self._context = sorted(context(source))
        self._python = folder / "python"
        self._make_python()
        self._packages = self._links_to_packages()

    def follow(self, stage: Stage) -> None:
        if self.root.exists():
            raise RuntimeError("the stage before was not finished")
        self.root.mkdir()
        (self.root / "tmp").mkdir()
        workdir, environment = self.root, self.environment({})
        for kind, text in stage.steps:
            if kind == "WORKDIR":
                workdir = self.path(text)
                workdir.mkdir(parents=True, exist_ok=True)
            elif kind == "ARG":
                name, _, value = text.partition("=")
                environment[name] = value.strip('"')
            elif kind == "ENV":
                environment = self.environment(stage.environment())
            elif kind == "COPY":
                self._copy(text.split(), workdir)
            elif kind == "RUN":
                self._run(text, workdir, environment)

    def finish(self, stage: Stage) -> None:
        """Put the stage's file system aside, for others to copy from."""
        self._stages[stage.name] = self.root.rename(self._folder / f"stage-{stage.name}")

    def path(self, text: str) -> Path:
        return self.root / text.lstrip("/")

    def environment(self, image: dict[str, str]) -> dict[str, str]:
        """What a process of the image sees."""
        outside = f"{self._python / 'bin'}:/usr/bin:/bin"
        found = {name: IMAGE_PATHS.sub(f"{self.root}/", value) for name, value in image.items()}
        found["PATH"] = found.get("PATH", "$PATH").replace("$PATH", outside)
        return {
            "PYTHONPATH": str(self._packages),
            "PIP_NO_INDEX": "1",  # whatever is missing must show, not be fetched
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "TMPDIR": str(self.root / "tmp"),
            **found,
        }

    def _make_python(self) -> None:
        """What the base image has: a Python and its pip, and nothing of ours."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self._python], check=True)
        pip = self._python / "bin" / "pip"
        pip.write_text(f'#!/bin/sh\nexec {self._python}/bin/python -m pip "$@"\n')
        pip.chmod(0o755)

    def _links_to_packages(self) -> Path:
        """This environment's packages, but for the project itself and what stands for its source."""
        links = self._folder / "packages"
        links.mkdir()
        for each in Path(sysconfig.get_path("purelib")).iterdir():
            if not each.name.startswith(("cvworker", "__editable__")) and each.suffix != ".pth":
                (links / each.name).symlink_to(each)
        return links

    def _copy(self, words: list[str], workdir: Path) -> None:
        origin = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
        *sources, target = [word for word in words if not word.startswith("--")]
        place = self.path(target) if target.startswith("/") else workdir / target
        for source in sources:
            if origin:
                found = self._stages[origin] / source.lstrip("/")
                copy = shutil.copytree if found.is_dir() else shutil.copy2
                copy(found, place, **({"symlinks": True, "dirs_exist_ok": True} if found.is_dir() else {}))
            else:
                self._copy_from_context(source, place, alone=len(sources) == 1 and not target.endswith("/"))

    def _copy_from_context(self, source: str, place: Path, *, alone: bool) -> None:
        files = [path for path in self._context if path == source or path.startswith(f"{source}/")]
        if not files:
            raise FileNotFoundError(f"COPY {source}: not in the build's context")
        for path in files:
            target = place / path.removeprefix(f"{source}/") if path != source else place if alone else place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._source / path, target)

    def _run(self, text: str, workdir: Path, environment: dict[str, str]) -> None:
        for mount in re.findall(r"--mount=type=bind,(\S+)", text):
            options = dict(each.split("=", 1) for each in mount.split(","))
            self.path(options["target"]).symlink_to(self._stages[options["from"]] / options["source"].lstrip("/"))
        command = re.sub(r"--mount=\S+\s*", "", text)
        if command.startswith(NOT_FOLLOWED):
            self.not_followed.append(command)
            return
        command = IMAGE_PATHS.sub(f"{self.root}/", command)
        done = subprocess.run(
            ["sh", "-e", "-c", command], cwd=workdir, env=environment, capture_output=True, text=True, timeout=240
        )
        if done.returncode:
            raise RuntimeError(f"RUN {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def words_of(text: str) -> list[str]:
    """The words of an exec form; ValueError for a shell form."""
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError(text)
    return found
