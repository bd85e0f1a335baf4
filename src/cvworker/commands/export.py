"""``cvworker export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cvworker.errors import StartupError, WorkerFailed
from cvworker.settings import CommandLine


class Export(CommandLine):
    """Write a module's network in another format, with everything it needs to know inside: 'run --weights FILE' takes
    it. The file is compared with the module it came from, as 'verify' does, and only kept if it answers the same.

    Formats: torch-export (PyTorch), onnx (ONNX Runtime), aotinductor (machine code for this machine), tensorrt (an
    engine for this GPU), int8 (8-bit ONNX for CPUs; for GPUs --format tensorrt --precision int8).

    examples: cvworker export --module threat --weights demo --format onnx

              cvworker export --module scene --weights scene.safetensors --format int8 --images photos/

              cvworker export --module my_model.py:MyModel --weights my.safetensors --format aotinductor --device cuda
    """

    module: str = Field(description="An installed name, package.module:Class or path/file.py:Class")
    weights: str | None = Field(None, description="What the module runs with: a file, s3:// or https://, or 'demo'")
    format: Literal["torch-export", "onnx", "aotinductor", "tensorrt", "int8"] = Field(
        description="The format to write"
    )
    output: Path | None = Field(None, description="The file to write; default: named after the weights, in this folder")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="What the network computes in; auto is fp32, for tensorrt fp16, for int8 int8"
    )
    opset: int = Field(20, description="ONNX: the version of its operators")
    max_batch: int = Field(
        64, description="The largest batch that is verified; an engine of TensorRT is built for it", ge=1, le=4096
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    images: Path | None = Field(
        None,
        description="A folder of pictures like those of production, to verify and to calibrate int8 with; "
        "default: drawn ones",
    )
    square: bool = Field(False, description="detect: stretch pictures to squares where the weights have 'max_size'")
    verify: bool = Field(True, description="Compare it with the original, and keep it only if it answers the same")
    force: bool = Field(False, description="Replace the output if it is there")

    def main(self) -> int:
        import torch
        from rich.console import Console

        from cvworker import weights
        from cvworker.commands.verify import Bar, device_of, show
        from cvworker.export import export as exporting
        from cvworker.loading import load
        from cvworker.net import AddressGuard

        wishes = exporting.Wishes(
            format=self.format,
            precision=None if self.precision == "auto" else self.precision,
            opset=self.opset,
            max_batch=self.max_batch,
            device=device_of("cpu" if (self.format, self.device) == ("int8", "auto") else self.device),
            images=self.images,
            square=self.square,
            verify=self.verify,
        )
        precision = exporting.check(wishes)
        output = self.output or exporting.default_output(self.module, self.weights, wishes, precision)
        if output.exists() and not self.force:
            raise StartupError(f"output: {output} exists; give another --output, or --force to replace it")
        cls = load(self.module)
        console = Console(highlight=False)
        with Bar() as bar:
            done = exporting.export(cls, weights.local(self.weights, AddressGuard()), output, wishes, bar.say)
        if done.report is not None:
            show(console, done.report)
            if not done.report.passed:
                raise WorkerFailed(f"{self.format} answers differently, so {output} was not written; see the table")
        versions = f"torch {torch.__version__}" + (
            f", opset {done.metadata['opset']}" if "opset" in done.metadata else ""
        )
        console.print(f"written to {output} ({done.size / 1e6:.1f} MB, {precision}, {versions})", soft_wrap=True)
        named = f"'{output}#sha256={done.sha256.removeprefix('sha256:')}'"
        console.print(f"next       cvworker run --module {self.module} --weights {named}", soft_wrap=True)
        return 0
