"""``cvworker pack``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cvworker.errors import StartupError
from cvworker.settings import CommandLine, TextList


class Pack(CommandLine):
    """Turn a torchvision-style checkpoint into a weights file that describes itself, for the modules threat, scene and
    detect: a state dict (.pt, .pth or .safetensors), its classes and its preprocessing. The architecture is recognised
    by the tensors' names and shapes; what is not said is taken from the checkpoint, or is what torchvision's own
    weights use. The file is tried before it is kept, and code in a pickle is never run.

    examples: cvworker pack model.pth --classes classes.txt --output model.safetensors

              cvworker pack threat.pt --module threat --classes labels.json --meta '{"thresholds": {"gun": 0.4}}'

              cvworker pack resnet50-imagenet.pth --input-size 224 --output resnet50.safetensors
    """

    checkpoint: CliPositionalArg[Path] = Field(description="What was saved: .pt, .pth, .bin or .safetensors")
    output: Path | None = Field(None, description="The file to write, .safetensors; default: the checkpoint's own name")
    module: str | None = Field(None, description="The module it is for; default: detect for a detector, else scene")
    architecture: str | None = Field(None, description="torchvision's name of the network, such as resnet50")
    classes: Path | None = Field(
        None, description="A file with the classes in the order of the outputs: a JSON list or object, or one a line"
    )
    input_size: int | None = Field(None, description="The side of the network's square input, in pixels", ge=1)
    mean: TextList = Field([], description="Three numbers, for red, green and blue from 0 to 1")
    std: TextList = Field([], description="Three numbers, for red, green and blue from 0 to 1")
    meta: str | None = Field(None, description="A JSON object with what the module needs besides, such as thresholds")
    force: bool = Field(False, description="Replace the output if it is there")

    def main(self) -> int:
        from rich.console import Console
        from rich.table import Table

        from cvworker.packing.pack import Wishes, pack

        output = self.output or self.checkpoint.with_suffix(".safetensors")
        if output.exists() and not self.force:
            raise StartupError(f"output: {output} exists; give another --output, or --force to replace it")
        wishes = Wishes(
            architecture=self.architecture,
            classes=_classes(self.classes) if self.classes else None,
            input_size=self.input_size,
            mean=_numbers("mean", self.mean),
            std=_numbers("std", self.std),
            module=self.module,
            extra=_object(self.meta) if self.meta else {},
        )
        console = Console(highlight=False)
        with console.status("") as status:
            packed = pack(self.checkpoint, output, wishes, say=status.update)
        table = Table("", "understood", "from", box=None, pad_edge=False)
        for row in packed.understood:
            table.add_row(*row)
        console.print(table)
        console.print(f"example    {json.dumps(packed.example)[:300]}", markup=False, soft_wrap=True)
        console.print(
            f"written to {packed.path} ({packed.path.stat().st_size / 1e6:.1f} MB, {packed.sha256})", soft_wrap=True
        )
        console.print(f"next       cvworker check --module {packed.module} --weights {packed.path}", soft_wrap=True)
        return 0


def _classes(path: Path) -> list[str]:
    from cvworker.packing.checkpoint import class_names

    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise StartupError(f"classes: {path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise StartupError(f"classes: {path} is not text") from None
    if text.startswith(("[", "{")):
        try:
            names = class_names(json.loads(text))
        except ValueError as error:
            raise StartupError(f"classes: {path} is not JSON: {error}") from None
    else:
        names = class_names([line.strip() for line in text.splitlines() if line.strip()])
    if names is None:
        raise StartupError(
            f"classes: {path} must hold a JSON list of names, an object of names and indices, or one a line"
        )
    return names


def _numbers(name: str, given: list[str]) -> list[float] | None:
    try:
        numbers = [float(each) for each in given]
    except ValueError:
        numbers = []
    if given and len(numbers) != 3:
        raise StartupError(f"{name}: three numbers are needed, such as 0.485,0.456,0.406")
    return numbers or None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StartupError(f"meta: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StartupError('meta: must be a JSON object, such as {"top_k": 3}')
    return value
