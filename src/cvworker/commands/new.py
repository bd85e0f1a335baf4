"""``cvworker new``."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cvworker.errors import StartupError
from cvworker.loading import installed
from cvworker.settings import CommandLine

SUFFIX = ".tmpl"
"""Of the templates, so that no tool takes them for code."""
LONGEST = 50


class New(CommandLine):
    """Write a small package with a module, a test of it through a real worker, and a Dockerfile, in a folder of its
    name. The test passes as it is; put your network in.

    examples: cvworker new my_module

              cvworker new street_signs --into ~/models
    """

    name: CliPositionalArg[str] = Field(description="Of the package, the folder and the module: lower case and _")
    into: Path = Field(Path("."), description="The folder that the package's own folder is made in")

    def main(self) -> int:
        cls = class_name(self.name)
        folder = self.into.expanduser() / self.name
        if folder.exists() or folder.is_symlink():
            raise StartupError(f"name: {folder} is there already; choose another name, or --into another folder")
        if not folder.parent.is_dir():
            raise StartupError(f"into: {folder.parent} is no folder; make it first, or give another with --into")
        try:
            written = write(folder, {"name": self.name, "cls": cls})
        except OSError as error:
            raise StartupError(
                f"into: cannot write to {folder.parent} ({error.strerror}); give another folder with --into"
            ) from None
        print(f"cvworker new: wrote {folder}: {', '.join(sorted(written))}")
        print("next:")
        print(f"  cd {folder}")
        for command, why in (
            ("python -m pytest", "its test, through a real worker"),
            (f"cvworker check --module {self.name}/module.py:{cls}", "every hook's shapes, types and time"),
            ("python -m pip install -e .", f"from then on: --module {self.name}"),
        ):
            print(f"  {command:<60} # {why}")
        return 0


def class_name(name: str) -> str:
    """The class of a package's module: ``my_module`` gives ``MyModule``.

    Raises:
        StartupError: a name that no package can have, or that another one has.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > LONGEST:
        usual = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789")[:LONGEST].rstrip("_") or "my_module"
        raise StartupError(f"name: {name!r} is no name for a package: a-z, then 0-9 and _, such as {usual}")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in ("name", "tests"):
        raise StartupError(f"name: {name} means something else already; choose another, such as {name}_module")
    if name in installed():
        raise StartupError(f"name: a module {name!r} is installed ('cvworker modules'); choose another name")
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise StartupError(f"name: there is a package {name!r} already; choose another, such as {name}_module")
    return "".join(part.capitalize() for part in name.split("_"))


def write(folder: Path, values: dict[str, str]) -> list[str]:
    """Write the package into ``folder``, all of it or nothing; the files, as paths below it. Raises OSError."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        partial.chmod(0o755)
        written = []
        for path, template in _templates(files("cvworker") / "templates" / "module"):
            place = path.removesuffix(SUFFIX).replace("test_name", f"test_{values['name']}")
            place = re.sub(r"^name/", f"{values['name']}/", place)
            (partial / place).parent.mkdir(exist_ok=True)
            (partial / place).write_text(Template(template.read_text("utf-8")).substitute(values), "utf-8")
            written.append(place)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return written


def _templates(folder: Traversable, at: str = "") -> Iterator[tuple[str, Traversable]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _templates(each, f"{at}{each.name}/")
        elif each.name.endswith(SUFFIX):
            yield at + each.name, each
