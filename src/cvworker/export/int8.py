"""Post-training quantisation by ONNX Runtime: 8-bit weights, and activations of ranges measured on pictures."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from cvworker.errors import StartupError

if TYPE_CHECKING:
    from torch import Tensor

    from cvworker.export.formats import Order

WHOLE_RANGE = ("avx512_vnni", "avx_vnni", "asimddp")
"""What Linux calls arithmetic that adds products of bytes without overflow; weights have 7 bits on other x86."""
OF_DETECTORS = ("Conv", "Clip", "Relu", "Add", "MaxPool")
"""In a detector only these are quantised: scores and boxes need more than 256 steps."""


def quantised(model: Any, order: Order, *, symmetric: bool = False) -> Any:
    """``model`` (an ``onnx.ModelProto``) with Q/DQ nodes around what computes in 8 bits.

    Weights are quantised by channel. Activations are unsigned on x86, as ONNX Runtime advises, else signed;
    ``symmetric`` is what TensorRT takes. The ranges come from the order's calibration pictures.

    Raises:
        StartupError: ONNX Runtime cannot quantise it.
    """
    signed = symmetric or platform.machine() not in ("x86_64", "AMD64")
    with tempfile.TemporaryDirectory(prefix="cvworker-int8-") as folder:
        source, prepared, target = (str(Path(folder, name)) for name in ("model.onnx", "prepared.onnx", "int8.onnx"))
        onnx.save(model, source)
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                _Pictures(model, order),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OF_DETECTORS) if order.boxes else None,
                per_channel=True,
                reduce_range=not signed and not _has_whole_range(),
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
            )
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise StartupError(
                f"module: {order.name!r} cannot be quantised by ONNX Runtime: {type(error).__name__}: {text}"
            ) from error
        return onnx.load(target)


class _Pictures(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    """Calibration batches, by the names of the model's inputs."""

    def __init__(self, model: Any, order: Order) -> None:
        self._names = [each.name for each in model.graph.input]
        self._batches: Iterator[tuple[Tensor, ...]] = order.calibration()

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        return {name: each.cpu().numpy() for name, each in zip(self._names, batch, strict=True)}


def _has_whole_range() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return any(flag in line.split() for flag in WHOLE_RANGE)
