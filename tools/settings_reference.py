"""Writes ``docs/settings.md``, the table of every setting, from the settings class itself.

``make docs`` runs it. With ``--check`` it writes nothing and exits 1 where the file is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretBytes, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

INTRODUCTION = """\
<!-- Written by `make docs` from src/cvworker/settings.py: change it there. -->
# Settings

Each setting is a flag of `cvworker run`, an environment variable and a line of a `.env` file in the directory that the
worker starts in. A flag wins over a variable, and a variable over `.env`. A variable that is empty counts as not set.
Lists are given as JSON, comma-separated, or as a single bare value.
"""
HEADER = "| flag | variable | default | unit | meaning |\n| --- | --- | --- | --- | --- |\n"


def render(settings: type[BaseSettings]) -> str:
    """The reference as Markdown: a section with a table for each group, groups and fields in their order."""
    prefix = settings.model_config.get("env_prefix", "")
    groups: dict[str, list[str]] = {}
    for name, field in settings.model_fields.items():
        groups.setdefault(_extra(field, "group") or "Other", []).append(_row(name, field, prefix))
    sections = [f"## {group}\n\n{HEADER}{''.join(rows)}" for group, rows in groups.items()]
    return "\n".join([INTRODUCTION, *sections])


def _row(name: str, field: FieldInfo, prefix: str) -> str:
    unit = _extra(field, "unit")
    meaning = (field.description or "").removesuffix(f" [{unit}]")  # the help of the command line carries it too
    if get_origin(field.annotation) is Literal:
        meaning += f" ({', '.join(map(str, get_args(field.annotation)))})"
    # No flag for a secret: every user of the machine can read the flags of a process.
    flag = "" if _is_secret(field.annotation) else _code("--" + name.replace("_", "-"))
    cells = [flag, _code((prefix + name).upper()), _default(field, unit), unit, meaning]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"


def _default(field: FieldInfo, unit: str) -> str:
    if field.is_required():
        return "required"
    if _is_secret(field.annotation):
        return ""
    value = field.default  # what a factory makes may depend on the machine
    if value is None or field.default_factory:
        return ""
    if isinstance(value, bool):
        return _code(str(value).lower())
    if isinstance(value, (list, tuple, set)):
        return _code(",".join(map(str, value)))
    if isinstance(value, int):
        return _code(str(int(value))) + (f" ({_binary(value)})" if unit == "bytes" and value >= 1024 else "")
    return _code(str(value))


def _binary(size: int) -> str:
    """A size in bytes in the largest binary unit that divides it."""
    units = iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size % 1024 == 0 and (larger := next(units, None)):
        size, unit = size // 1024, larger
    return f"{int(size)} {unit}"


def _is_secret(annotation: Any) -> bool:
    return any(part in (SecretStr, SecretBytes) for part in _parts(annotation))


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def _extra(field: FieldInfo, key: str) -> str:
    extra = field.json_schema_extra
    return str(extra.get(key) or "") if isinstance(extra, dict) else ""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes docs/settings.md from the settings class.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file is out of date")
    arguments = parser.parse_args()
    from cvworker.settings import Settings

    text = render(Settings)
    current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else None
    if text == current:
        return 0
    if arguments.check:
        print("docs/settings.md is out of date: run make docs", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    print("docs/settings.md is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
