"""What the samples say: a table, a chart of bars, and everything as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from load.compare.ceiling import Ceiling
from load.compare.report import PACKAGES, commit, machine
from load.device.alone import CPU_DECODE, DEVICE_DECODE, MODEL, Alone
from load.device.run import STAGES, Plan, Sample
from rich.table import Table

GOAL = 0.9
"""Of the smallest limit: what is to be reached on a GPU."""
WIDTH, NAMES, BAR, STEP = 860, 330, 14, 22
OPTIONAL = ("torchcodec",)


@dataclass(slots=True)
class Report:
    """A whole run."""

    device: str
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    limits: list[Alone] = field(default_factory=list)
    ceiling: Ceiling | None = None
    notes: list[str] = field(default_factory=list)
    """What failed, was left out, or stands in the way of a conclusion."""

    def limits_of(self, plan: Plan) -> dict[str, float]:
        """What a run of this plan cannot exceed."""
        decode = DEVICE_DECODE if plan.decode == "device" else CPU_DECODE
        return {
            each.name: each.images_s
            for each in self.limits
            if each.name == decode
            or (each.name == MODEL and (each.batch, each.optimize) == (plan.batch, plan.optimize))
        }

    def add(self, sample: Sample) -> None:
        """Take in a run, with the limits that are known for it and what it shows of itself."""
        sample.limits = self.limits_of(sample.plan)
        self.samples.append(sample)
        title = sample.plan.title
        if sample.decoded_on != sample.plan.decode:
            self.notes.append(f"{title}: decoded on the {sample.decoded_on}; its worker's log says why")
        if sample.errors or sample.repeats or sample.restarts:
            counted = f"{sample.errors} errors, {sample.repeats} repeats, {sample.restarts} restarts"
            self.notes.append(f"{title}: {counted}")
        if self.ceiling and sample.images_s > 0.8 * self.ceiling.images_s:
            self.notes.append(f"{title}: near what the world (queue, host, receiver) serves; the limit may be there")

    def table(self) -> Table:
        """For people."""
        table = Table(box=None, pad_edge=False)
        for name in (
            "decode",
            "optimize",
            "batch",
            "processes",
            "images/s",
            "of limit",
            "smallest limit",
            "device busy",
        ):
            table.add_column(name, justify="left" if name in ("decode", "optimize", "smallest limit") else "right")
        for name in ("CPU ms", "batch got", *STAGES[1:], "to device"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.samples:
            plan = each.plan
            least = min(each.limits, key=each.limits.__getitem__) if each.limits else ""
            table.add_row(
                plan.decode,
                each.tuned or plan.optimize,
                str(plan.batch),
                str(plan.processes),
                f"{each.images_s:.1f}",
                "" if each.ratio is None else f"{each.ratio:.2f}",
                f"{least} {each.limits[least]:.0f}" if least else "",
                "" if each.busy is None else f"{each.busy:.0f}%",
                f"{each.cpu_ms:.2f}",
                f"{each.batch_mean:.1f}",
                *(f"{each.stage_ms[name]:.1f}" for name in STAGES[1:]),
                f"{each.to_device_ms:.2f}",
            )
        return table

    def limit_lines(self) -> list[str]:
        """The parts alone."""
        lines = []
        for each in self.limits:
            told = (each.batch and f"batch {each.batch}", each.optimize and f"optimize {each.optimize}", each.how)
            lines.append(f"limit: {each.name}: {each.images_s:.1f} images/s ({', '.join(filter(None, told))})")
        if self.ceiling:
            lines.append(f"the world (queue, host, receiver) serves {self.ceiling.images_s:.0f} images/s")
        return lines

    def write(self, folder: Path) -> list[Path]:
        """``device.json`` and ``device.svg`` in ``folder``."""
        files = {"device.json": json.dumps(self.json(), indent=1) + "\n", "device.svg": self.chart()}
        for name, text in files.items():
            part = folder / f"{name}.part"
            part.write_text(text)
            part.replace(folder / name)
        return [folder / name for name in files]

    def json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "machine": machine() | {"device": self.device, "gpu": _gpu(), "cuda": _cuda()},
            "versions": _versions(),
            "seconds": self.seconds,
            "goal": GOAL,
            "limits": [asdict(each) for each in self.limits],
            "ceiling": asdict(self.ceiling) if self.ceiling else None,
            "notes": self.notes,
            "samples": [asdict(each) | {"busy": each.busy, "ratio": each.ratio} for each in self.samples],
        }

    def chart(self) -> str:
        """A bar for each run, with the smallest of its limits as a line, as an SVG without scripts."""
        most = max((max(each.images_s, *each.limits.values(), 1e-9) for each in self.samples), default=1.0)
        scale = (WIDTH - NAMES - 130) / most
        parts, y = [], 16
        for each in self.samples:
            least = min(each.limits.values(), default=0.0)
            x = NAMES + each.images_s * scale
            said = f"{each.images_s:.0f}/s" + ("" if each.ratio is None else f", {each.ratio:.2f} of the limit")
            parts += [
                _text(NAMES - 8, y + 11, each.plan.title, "end"),
                f"<rect x='{NAMES}' y='{y}' width='{x - NAMES:.1f}' height='{BAR}' rx='2' fill='#2563eb'/>",
                f"<path d='M{NAMES + least * scale:.1f} {y - 2}v{BAR + 4}' stroke='#dc2626' stroke-width='2'/>",
                _text(max(x, NAMES + least * scale) + 6, y + 11, said, "start"),
            ]
            y += STEP
        size = f"width='{WIDTH}' height='{y + 12}' viewBox='0 0 {WIDTH} {y + 12}'"
        head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'><title>images a second</title>"
        return "\n".join([head, f"<rect width='{WIDTH}' height='{y + 12}' fill='#ffffff'/>", *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    font = "font-family='system-ui, sans-serif' font-size='12' fill='#0f172a'"
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {font}>{escape(text)}</text>"


def _gpu() -> list[str]:
    """Name, driver and memory of each."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run([program, *query], capture_output=True, text=True).stdout.splitlines()


def _cuda() -> str | None:
    import torch

    return torch.version.cuda


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
