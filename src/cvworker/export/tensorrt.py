"""Engines of TensorRT, by way of ONNX: the ``tensorrt`` package, which ``torch_tensorrt`` brings along as well.

Written for TensorRT 10, and not tried on a GPU yet.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from cvworker.errors import StartupError
from cvworker.export.formats import Order
from cvworker.modules.metadata import ENGINE_HEAD

USUAL_BATCH = 8
"""What kernels are chosen for, where the largest batch is no smaller."""


def build(model: bytes, order: Order, path: Path) -> None:
    """Build an engine for this GPU from an ONNX model, and write it after its metadata.

    The precision is the model's own (a strongly typed network), so what was verified is what runs.

    Raises:
        StartupError: TensorRT cannot build it; the operator is named where the parser says so.
    """
    tensorrt: Any = import_module("tensorrt")

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise _refused(order, parser)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index, (tensor, factors) in enumerate(zip(order.shapes.inputs, order.shapes.factors, strict=True)):
        shapes = [
            tuple(count * factors[at] if at in factors else side for at, side in enumerate(tensor.shape))
            for count in (1, min(USUAL_BATCH, order.max_batch), order.max_batch)
        ]
        profile.set_shape(network.get_input(index).name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise StartupError(
            f"module: {order.name!r} cannot be built by TensorRT {tensorrt.__version__} (it says why above); take "
            "--format aotinductor, or onnx with onnxruntime-gpu"
        )
    metadata = json.dumps(dict(order.metadata)).encode()
    path.write_bytes(ENGINE_HEAD.pack(len(metadata)) + metadata + bytes(engine))


def _refused(order: Order, parser: Any) -> StartupError:
    first = parser.get_error(0) if parser.num_errors else None
    said = f"operator {first.node_operator()} ({first.node_name()}): {first.desc()}" if first else "it does not say why"
    return StartupError(f"module: {order.name!r} cannot be exported as tensorrt: {' '.join(said.split())}")
