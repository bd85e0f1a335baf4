"""What the samples say: medians, ratios within a round, a table, and everything as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from load.compare import pictures, task
from load.compare.ceiling import Ceiling
from load.compare.contenders import BASELINE, CONTENDERS, ROOT
from load.compare.limit import Limit
from load.compare.measure import Sample
from rich.table import Table

PACKAGES = ("cvworker", "torch", "torchvision", "simplejpeg", "aiohttp", "boto3", "requests", "numpy")
_CPU_MODEL = "model name"


@dataclass(frozen=True, slots=True)
class Row:
    """One worker under one load, over all rounds: medians. ``ratio`` is to the baseline, or None without one."""

    worker: str
    load: str
    images_s: float
    cpu_ms: float
    ratio: float | None
    pss_mb: float
    start_s: float
    repeats: int
    errors: int
    expired: int
    rounds: int


@dataclass(slots=True)
class Report:
    """A whole run."""

    seconds: float
    rounds: int
    samples: list[Sample] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    ceiling: Ceiling | None = None
    notes: list[str] = field(default_factory=list)
    """Who was skipped, and who failed."""

    def rows(self) -> list[Row]:
        """By load and worker, in the order they ran."""
        keys = dict.fromkeys((sample.load, sample.worker) for sample in self.samples)
        return [self._row(load, worker) for load, worker in keys]

    def _row(self, load: str, worker: str) -> Row:
        of = [each for each in self.samples if (each.load, each.worker) == (load, worker)]
        base = {each.round: each for each in self.samples if (each.load, each.worker) == (load, BASELINE)}
        ratios = [s.images_s / base[s.round].images_s for s in of if s.round in base and base[s.round].images_s]
        return Row(
            worker=worker,
            load=load,
            images_s=_median(each.images_s for each in of),
            cpu_ms=_median(each.cpu_ms for each in of),
            ratio=_median(ratios) if ratios else None,
            pss_mb=max(each.pss_mb for each in of),
            start_s=_median(each.start_s for each in of),
            repeats=sum(each.repeats for each in of),
            errors=sum(each.errors for each in of),
            expired=sum(each.expired for each in of),
            rounds=len(of),
        )

    def table(self) -> Table:
        """For people."""
        table = Table(box=None, pad_edge=False)
        for name, justify in _COLUMNS:
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in self.rows():
            table.add_row(*_cells(row))
        return table

    def limit_lines(self) -> list[str]:
        """What nobody could exceed here."""
        lines = [f"limit: {each.name}: {each.images_s:.1f} images/s, {each.cpu_ms:.2f} CPU ms" for each in self.limits]
        if self.ceiling:
            shown = f"{self.ceiling.images_s:.0f} images/s, {self.ceiling.cpu_ms:.2f} CPU ms of its own"
            lines.append(f"the world (queue, host, receiver) serves {shown}")
        return lines

    def json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "seeds": {"pictures": pictures.SEED, "model": task.SEED},
            "seconds": self.seconds,
            "rounds": self.rounds,
            "baseline": BASELINE,
            "loads": {name: load.summary for name, load in task.LOADS.items()},
            "workers": {name: each.summary for name, each in CONTENDERS.items()},
            "rows": [asdict(row) for row in self.rows()],
            "limits": [asdict(limit) for limit in self.limits],
            "ceiling": asdict(self.ceiling) if self.ceiling else None,
            "notes": self.notes,
            "samples": [sample.json() for sample in self.samples],
        }

    def write(self, folder: Path) -> Path:
        """``compare.json`` in ``folder``."""
        path = folder / "compare.json"
        path.write_text(json.dumps(self.json(), indent=1) + "\n")
        return path


_COLUMNS = (
    ("load", "left"),
    ("worker", "left"),
    ("images/s", "right"),
    (f"× {BASELINE}", "right"),
    ("CPU ms", "right"),
    ("PSS MB", "right"),
    ("start s", "right"),
    ("repeats", "right"),
    ("errors", "right"),
    ("expired", "right"),
)


def _cells(row: Row) -> Iterable[str]:
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
    counted = (str(number) if number else "" for number in (row.repeats, row.errors, row.expired))
    shown = f"{row.images_s:.1f}", ratio, f"{row.cpu_ms:.2f}", f"{row.pss_mb:.0f}", f"{row.start_s:.1f}"
    return (row.load, row.worker, *shown, *counted)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    cpu = ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = (line for line in info.read_text().splitlines() if line.startswith(_CPU_MODEL))
        cpu = next(lines, "").partition(":")[2].strip()
    return {
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it; nothing outside a repository."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short=12", "HEAD") + changed
