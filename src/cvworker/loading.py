"""From what ``--module`` says to the class it means."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from cvworker.errors import StartupError
from cvworker.module import Module

GROUP = "cvworker.modules"
DEMO = "demo"
_FORMS = "an installed name (see 'cvworker modules'), package.module:Class or path/file.py:Class"


def installed() -> dict[str, EntryPoint]:
    """The modules that installed packages offer, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def check_spec(spec: str) -> None:
    """Find out what can be found out about ``--module`` without importing it.

    Raises:
        StartupError: an unknown name, a file that is not there, or neither of the forms.
    """
    place, colon, _ = spec.rpartition(":")
    if not colon:
        names = installed()
        if spec not in names:
            raise StartupError(
                f"module: no module named {spec!r} is installed (installed: {', '.join(names) or 'none'}); "
                f"give {_FORMS}"
            )
    elif _is_file(place) and not Path(place).is_file():
        raise StartupError(f"module: {place} does not exist; give {_FORMS}")


def load(spec: str) -> type[Module]:
    """The class that ``spec`` names, checked to be a module that can be made.

    Raises:
        StartupError: one line that says which module, and what was expected of it.
    """
    check_spec(spec)
    place, colon, name = spec.rpartition(":")
    if not colon:
        entry = installed()[spec]
        place, name = entry.module, entry.attr
    try:
        home = _from_file(Path(place)) if _is_file(place) else importlib.import_module(place)
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(f"module: {place} could not be imported: {_where(error)}") from error
    return _check(getattr(home, name, None), place, name)


def make(cls: type[Module], weights: str | None) -> Module:
    """An instance of ``cls``; ``weights`` is a path, or ``demo`` for those the class itself names.

    Raises:
        StartupError: there are no such weights, or ``__init__`` raised.
    """
    path = Path(weights) if weights else None
    if weights == DEMO:
        path = getattr(cls, "demo_weights", None)
        if path is None:
            raise StartupError(f"weights: module {cls.name!r} comes with no demo weights; give a file")
    try:
        return cls(path)
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(f"module: {cls.__name__}(weights) raised {_where(error)}") from error


def _check(cls: object, place: str, name: str) -> type[Module]:
    if cls is None:
        raise StartupError(f"module: {place} has no class {name!r}; give {_FORMS}")
    if not (isinstance(cls, type) and issubclass(cls, Module)):
        raise StartupError(f"module: {place}:{name} does not extend cvworker.Module")
    if inspect.isabstract(cls):
        missing = " and ".join(sorted(cls.__abstractmethods__))
        raise StartupError(
            f"module: {place}:{name} lacks {missing}; a module must define preprocess(self, image) and "
            "process(self, batch)"
        )
    if cls.image_type not in ("tensor", "pil"):
        raise StartupError(f"module: {place}:{name} has image_type {cls.image_type!r}; it must be 'tensor' or 'pil'")
    if cls.decode_on_device and cls.image_type != "tensor":
        raise StartupError(f"module: {place}:{name} has decode_on_device, which needs the image_type 'tensor'")
    return cls


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _from_file(path: Path) -> ModuleType:
    # The name is the same in every process, so that objects of the file's classes can be pickled between them.
    name = f"cvworker_path_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise StartupError(f"module: {path} is not a Python file")
    if str(path.resolve().parent) not in sys.path:  # its neighbours can be imported, as when it is run
        sys.path.append(str(path.resolve().parent))
    home = importlib.util.module_from_spec(spec)
    sys.modules[name] = home
    try:
        spec.loader.exec_module(home)
    except BaseException:
        del sys.modules[name]
        raise
    return home


def _where(error: BaseException) -> str:
    """The error on one line, with the last line of code that is not ours."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
