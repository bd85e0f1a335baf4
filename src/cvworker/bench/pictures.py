"""The pictures that every rung works on: the user's own, or drawn ones as the demo has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cvworker import images
from cvworker.embedded.exhibits import exhibit
from cvworker.embedded.subjects import SUBJECTS, THREATS
from cvworker.errors import JobError, StartupError
from cvworker.settings import Settings

DRAWN, SEED = 64, 0
MOST, MOST_BYTES = 256, 256 * 2**20
"""Of the user's own: enough variety, and little enough to be kept in memory by the image host."""
NAMED = 3
"""Files that are told by name; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """What was put into the image host's folder; ``notes`` say what was left out, a sentence each."""

    source: str
    count: int
    bytes: int
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.count} {self.source}, {self.bytes / self.count / 1000:,.0f} kB on average"


def draw(module: str, into: Path) -> Pictures:
    """Draw the kind of pictures that the demo has for ``module``, the same ones each time, as files in ``into``."""
    subject = SUBJECTS.get(module, THREATS)
    size = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for each in pool.map(lambda number: exhibit(SEED, number, None, subject), range(DRAWN)):
            assert each.body is not None
            (into / each.name).write_bytes(each.body)
            size += len(each.body)
    return Pictures("drawn pictures", DRAWN, size)


def copy(folder: Path, into: Path, limits: Settings) -> Pictures:
    """Copy the pictures of ``folder`` and the folders in it that ``run`` would take.

    Raises StartupError where there are none, or they cannot be read.
    """
    refused: list[str] = []
    count = size = 0
    try:
        files = list(islice(_files(folder), MOST + 1))
        for path in files[:MOST]:
            data = path.read_bytes()
            if size + len(data) > MOST_BYTES:
                break
            if problem := _problem(data, limits):
                refused.append(f"{path.name} ({problem})")
                continue
            (into / f"{count:04}").write_bytes(data)
            count, size = count + 1, size + len(data)
    except OSError as error:
        raise StartupError(f"images: {error.filename or folder} cannot be read ({error.strerror})") from None
    named = ", ".join(refused[:NAMED]) + (f" and {len(refused) - NAMED} more" if len(refused) > NAMED else "")
    if not count:
        why = f": {named}" if refused else ""
        raise StartupError(f"images: {folder} holds no picture that 'run' would take{why}; give another folder")
    notes = [f"left out, as 'run' would not take them: {named}"] if refused else []
    if count + len(refused) < len(files):
        notes.append(f"only the first {count} pictures of {folder} are used")
    return Pictures("pictures of your own", count, size, tuple(notes))


def _files(folder: Path) -> Iterator[Path]:
    """In order of their names, without hidden ones."""
    if not folder.is_dir():
        raise StartupError(f"images: {folder} is no folder; give one with pictures in it")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _problem(data: bytes, limits: Settings) -> str:
    """Why a worker would not take this picture; nothing where it would."""
    if len(data) > limits.max_image_bytes:
        return "too many bytes"
    try:
        images.decode(data, image_type="pil", max_pixels=limits.max_image_pixels)
    except JobError as error:
        return error.message
    return ""
