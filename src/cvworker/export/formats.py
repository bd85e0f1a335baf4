"""The formats: what each is called, what it needs, and the function that writes it."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from cvworker.errors import StartupError
from cvworker.export.failures import cannot, noting_lines
from cvworker.export.network import Precise, Shapes
from cvworker.model.optimize import COMPILERS, has_compiler
from cvworker.modules.metadata import ENGINE, EXTRA_FILE, ONNX, PROGRAM

OPSET = 20
"""Of ONNX, unless another is asked for."""
OPSETS = range(18, 24)
"""What PyTorch's exporter writes."""
LARGEST_ONNX = 2_000_000_000
"""Bytes; a protocol buffer, which an ONNX file is, ends at 2 GiB."""
LAB = "pip install 'cvworker[lab]'"


@dataclass(frozen=True)
class Order:
    """What is to be written: the network in eval mode on its device, and everything that a format may want to know.

    ``calibration`` gives the network's inputs for pictures, a batch at a time; ``boxes`` is whether it is a detector.
    """

    name: str
    network: nn.Module
    shapes: Shapes
    device: torch.device
    precision: str
    opset: int
    max_batch: int
    boxes: bool
    calibration: Callable[[], Iterator[tuple[Tensor, ...]]]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Format:
    """``precisions`` are those it can have, the first by default; ``missing`` says what it lacks here, if anything."""

    suffix: str
    precisions: tuple[str, ...]
    write: Callable[[Order, Path], None]
    missing: Callable[[torch.device], str | None] = lambda device: None
    has_opset: bool = False


def program_of(order: Order, format_name: str) -> ExportedProgram:
    """The network as a ``torch.export`` program with a dynamic batch, in the precision of the order.

    Raises:
        StartupError: it cannot be followed; the operator and the line of the module are named.
    """
    network = order.network
    if order.precision in ("fp16", "bf16"):
        network = Precise(network, order.precision, order.device)
    with quiet():
        try:
            with torch.no_grad(), noting_lines():
                program = torch.export.export(
                    network.eval(), order.shapes.inputs, dynamic_shapes=_for(network, order.shapes.dynamic)
                )
                return program.run_decompositions({}) if network is not order.network else program
        except Exception as error:
            raise cannot(order.name, format_name, error) from error


def _for(network: nn.Module, dynamic: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamic shapes as the parameters of ``forward`` have it: what ``*inputs`` gathers is one of them."""
    kinds = [each.kind for each in inspect.signature(network.forward).parameters.values()]
    return (dynamic,) if kinds[:1] == [inspect.Parameter.VAR_POSITIONAL] else dynamic


def write_program(order: Order, path: Path) -> None:
    """A ``torch.export`` program, which PyTorch runs as it would the network itself."""
    program = program_of(order, "torch-export")
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would tell where the source lies on this machine
    program._example_inputs = None  # they are somebody's pictures
    with path.open("wb") as file:  # by a path it would note the file's name, which is not the last one
        torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(dict(order.metadata))})


def write_package(order: Order, path: Path) -> None:
    """An AOTInductor package: the program compiled to machine code for this device."""
    from torch.export.pt2_archive._package import package_pt2

    program = program_of(order, "aotinductor")
    with quiet():
        try:
            args, kwargs = program.example_inputs
            files: Any = torch._inductor.aot_compile(
                program.module(), args, kwargs, options={"aot_inductor.package": True}
            )
        except Exception as error:
            raise cannot(order.name, "aotinductor", error) from error
        with path.open("wb") as file:
            package_pt2(file, aoti_files=files, extra_files={EXTRA_FILE: json.dumps(dict(order.metadata))})


def onnx_of(order: Order, format_name: str = "onnx") -> Any:
    """The network as an ``onnx.ModelProto`` of the order's opset, with its metadata."""
    program = program_of(order, format_name)
    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=order.opset,
                verbose=False,
                optimize=order.precision != "fp16",  # it would fold batch norms in float32 into half convolutions
            )
        except Exception as error:
            raise cannot(order.name, format_name, error) from error
    assert exported is not None
    model = exported.model_proto
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]  # where the source lies on this machine, and as many bytes as the graph
    return model


def save_onnx(model: Any, path: Path, order: Order) -> None:
    """Write the model with its metadata. Raises StartupError where it is too large for one file."""
    import onnx

    if model.ByteSize() > LARGEST_ONNX:
        raise StartupError(
            f"module: the network of {order.name!r} has {model.ByteSize() / 1e9:.1f} GB, an ONNX file at most 2; "
            "take --format torch-export or aotinductor"
        )
    onnx.helper.set_model_props(model, dict(order.metadata))
    onnx.save(model, path)


def write_onnx(order: Order, path: Path) -> None:
    """An ONNX model, which ONNX Runtime runs."""
    save_onnx(onnx_of(order), path, order)


def write_int8(order: Order, path: Path) -> None:
    """An ONNX model with 8-bit weights and activations, measured on pictures."""
    from cvworker.export.int8 import quantised

    save_onnx(quantised(onnx_of(order, "int8"), order), path, order)


def write_engine(order: Order, path: Path) -> None:
    """A TensorRT engine, built from the ONNX model; in int8 from the quantised one."""
    from cvworker.export.int8 import quantised
    from cvworker.export.tensorrt import build

    model = onnx_of(order, "tensorrt")
    if order.precision == "int8":
        model = quantised(model, order, symmetric=True)
    build(model.SerializeToString(), order, path)


def _no_onnx(_: torch.device) -> str | None:
    absent = [each for each in ("onnx", "onnxscript", "onnxruntime") if find_spec(each) is None]
    return f"{', '.join(absent)}: {LAB}" if absent else None


def _no_compiler(device: torch.device) -> str | None:
    if has_compiler():
        return None
    return f"a C++ compiler ({', '.join(COMPILERS)}, or CXX): apt-get install g++"


def _no_tensorrt(device: torch.device) -> str | None:
    if find_spec("tensorrt") is None:
        return "the package tensorrt, on the machine with the NVIDIA GPU that will run it: pip install tensorrt"
    if device.type != "cuda":
        return "an NVIDIA GPU: --device cuda, on the machine that will run it"
    return _no_onnx(device)


FORMATS = {
    "torch-export": Format(PROGRAM, ("fp32", "bf16", "fp16"), write_program),
    "onnx": Format(ONNX, ("fp32", "fp16"), write_onnx, _no_onnx, has_opset=True),
    "aotinductor": Format(PROGRAM, ("fp32", "bf16", "fp16"), write_package, _no_compiler),
    "tensorrt": Format(ENGINE, ("fp16", "fp32", "int8"), write_engine, _no_tensorrt, has_opset=True),
    "int8": Format(ONNX, ("int8",), write_int8, _no_onnx, has_opset=True),
}
"""By the names of ``--format``."""


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters speak of their own affairs; what goes wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)
