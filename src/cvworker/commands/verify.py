"""``cvworker verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from cvworker.errors import StartupError
from cvworker.settings import CommandLine

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cvworker.export.verify import Report

PIPE_WIDTH = 160
"""Columns of the table where stdout is no terminal."""
COLUMNS = (
    ("max abs", "max_abs", None),
    ("max rel", "max_rel", "relative"),
    ("rms", "rms", "rms"),
    ("top-1", "top1", "top1"),
    ("top-5", "top5", None),
    ("objects", "objects", "objects"),
    ("overlap", "overlap", "overlap"),
    ("answers", "answers", "answers"),
)
"""Of the table: the head, the figure, and its limit."""
SHARES = ("top1", "top5", "objects", "answers")


class Verify(CommandLine):
    """Compare what a module answers with an exported file, or in a faster precision or form, with what it answers in
    fp32 without either: on real pictures and random ones, and at the smallest, an odd and the largest batch. Exit code
    1 where they differ by more than the precision may cost (docs/export.md has the table).

    examples: cvworker verify --module threat --weights threat.onnx --reference threat.safetensors

              cvworker verify --module scene --weights 'scene.pt2#sha256=...' --reference demo --images photos/

              cvworker verify --module detect --weights demo --precision bf16 --optimize full --as-json
    """

    module: str = Field(description="An installed name, package.module:Class or path/file.py:Class")
    weights: str | None = Field(None, description="The exported file, or with --precision and --optimize any weights")
    reference: str | None = Field(
        None, description="The weights that the file was exported from; default: --weights itself"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Run the compared side in this precision; auto is fp32"
    )
    optimize: Literal["off", "auto", "full"] = Field(
        "off", description="The form of its network: auto is channels-last, full compiles it too"
    )
    max_batch: int = Field(64, description="The largest batch that is compared", ge=1, le=4096)
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    images: Path | None = Field(None, description="A folder of pictures like those of production; default: drawn ones")
    as_json: bool = Field(False, description="Print the figures as JSON, and nothing else on stdout")

    def main(self) -> int:
        from rich.console import Console

        from cvworker import weights
        from cvworker.export.verify import Variant, exported_of, reference_of, tolerance_of, verify
        from cvworker.loading import load
        from cvworker.modules.metadata import is_exported
        from cvworker.net import AddressGuard

        cls, device, guard = load(self.module), device_of(self.device), AddressGuard()
        console = Console(highlight=False)
        with Bar() as bar:
            bar.say("loading", 0, 0)
            given = weights.local(self.weights, guard)
            path = Path(given) if given and is_exported(Path(given)) else None
            if path is not None and self.reference is None:
                raise StartupError(
                    "reference: an exported file is compared with what it was made from: --reference FILE"
                )
            original = weights.local(self.reference or self.weights, guard)
            if original and is_exported(Path(original)):
                raise StartupError(f"reference: {original} is exported itself; give the weights that it was made from")
            reference = reference_of(cls, original, device)
            module = exported_of(cls, path, original, device) if path else reference_of(cls, given, device)
            precision = "fp32" if self.precision == "auto" else self.precision
            name = path.name if path else f"{precision} {self.optimize}".removesuffix(" off")
            limits = tolerance_of(path, precision, device)
            variant = Variant(name, module, precision, self.optimize, self.max_batch, limits)
            report = verify(reference, variant, device, self.images, bar.say)
        if self.as_json:
            print(json.dumps(report.as_json(), indent=1))
        else:
            show(console, report)
        return 0 if report.passed else 1


class Bar:
    """What is being done, and how far it is."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        console = Console(file=sys.stderr)  # this very stream, also while exporters are kept quiet
        self._progress = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=total or None)


def device_of(name: str) -> torch.device:
    """The device of that name; auto is the GPU where there is one. Raises StartupError where there is none."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise StartupError(f"device: there is no {name} that PyTorch can use here")
    return device


def show(console: Console, report: Report) -> None:
    """The table, the limits and what is wrong."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not sys.stdout.isatty():
        console.width = PIPE_WIDTH
    used = [each for each in COLUMNS if any(getattr(group, each[1]) is not None for group in report.groups)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{report.name} beside fp32", no_wrap=True)
    for column in ("pictures", "batch", *(head for head, _, _ in used), ""):
        table.add_column(column, justify="right", no_wrap=True)
    for group in report.groups:
        cells = [_cell(name, getattr(group, name)) for _, name, _ in used]
        verdict = Text("ok", "green") if group.passed else Text("differs", "red")
        table.add_row(group.group, str(group.pictures), str(group.batch), *cells, verdict)
    table.add_section()
    limits = [_cell(name, getattr(report.tolerance, limit)) if limit else "" for _, name, limit in used]
    table.add_row(f"limits for {report.tolerance_name}", "", "", *limits, "")
    console.print(table)
    for problem in [*report.problems, *(f"{g.group}: {each}" for g in report.groups for each in g.problems)]:
        console.print(f"differs    {problem}", style="red", markup=False, soft_wrap=True)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name in SHARES else f"{value:.2g}"
