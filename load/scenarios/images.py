"""The pictures of a load test: drawn ones, a folder of one's own, or URLs that are somewhere already."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cvworker.errors import StartupError
from cvworker.send import read_lines
from cvworker.settings import Settings

SCHEMES = ("http://", "https://", "s3://")


@dataclass(frozen=True, slots=True)
class Pictures:
    """What requests name: the files of ``folder``, behind the image host; or ``elsewhere``, which it has no part in."""

    folder: Path
    told: str
    elsewhere: tuple[str, ...] = ()

    def urls(self, base: str) -> list[str]:
        """One for each picture; ``base`` is the image host's address."""
        return [*self.elsewhere] or [f"{base}/i/{path.name}" for path in sorted(self.folder.iterdir())]


@contextmanager
def served(given: str | None, settings: Settings) -> Iterator[Pictures]:
    """The pictures named by ``--images``, else such as the demo draws for the module; there while the block runs.

    Raises StartupError where there are none that a worker with these settings would take.
    """
    with tempfile.TemporaryDirectory(prefix="cvworker-load-") as name:
        folder = Path(name)
        if given is not None and Path(given).is_file():
            found = read_urls(Path(given))
            yield Pictures(folder, f"{len(found)} URLs of {given}", found)
            return
        from cvworker.bench.pictures import copy, draw

        gathered = draw(settings.module or "", folder) if given is None else copy(Path(given), folder, settings)
        yield Pictures(folder, "; ".join((gathered.told, *gathered.notes)))


def read_urls(path: Path) -> tuple[str, ...]:
    """The URLs of a file with one a line. Raises StartupError, naming the row."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            found = tuple((request.where, str(request.get("image_url", ""))) for request in read_lines(file, str(path)))
    except OSError as error:
        raise StartupError(f"images: {path} cannot be read ({error.strerror})") from None
    for where, url in found:
        if not url.startswith(SCHEMES):
            raise StartupError(f"images: {where}: {url!r} is no URL; it must begin with {', '.join(SCHEMES)}")
    if not found:
        raise StartupError(f"images: {path}: there is no URL in it")
    return tuple(url for _, url in found)
