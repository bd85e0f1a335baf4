"""An ONNX file for the example: one convolution, untrained. ``python make_weights.py tiny.onnx``"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = ["day", "dusk", "night"]


def make(path: Path) -> Path:
    """Write uint8 → float → (x - 127.5) / 127.5 → convolution → ReLU → mean → linear → softmax."""
    random = np.random.default_rng(0)
    constants = {
        "middle": np.float32(127.5),
        "kernel": random.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
        "linear": random.normal(0, 1.0, (8, len(CLASSES))).astype(np.float32),
        "bias": np.zeros(len(CLASSES), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "middle"], ["centred"]),
        helper.make_node("Div", ["centred", "middle"], ["normal"]),
        helper.make_node("Conv", ["normal", "kernel"], ["maps"], strides=[2, 2]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "linear", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, 64, 64])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", len(CLASSES)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {"classes": json.dumps(CLASSES)})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
