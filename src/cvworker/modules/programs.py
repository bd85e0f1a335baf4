"""Networks that were exported: a ``torch.export`` program, or an ONNX model run by ONNX Runtime.

Either takes ``float32 [N, 3, S, S]``, normalised, for any N, and gives one ``float32 [N, classes]``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from cvworker.errors import StartupError
from cvworker.modules.metadata import ONNX, PROGRAM, first_line
from cvworker.modules.spec import Spec

BATCHES = (1, 3)
"""Tried at start: an export with a fixed batch would fail at the first batch of another size."""


def is_exported(path: Path) -> bool:
    """Whether the file holds a network rather than the tensors of one."""
    return path.suffix in (PROGRAM, ONNX)


def load_classifier(spec: Spec, device: torch.device) -> nn.Module:
    """The exported network, on ``device``, tried with batches of several sizes.

    Raises:
        StartupError: it cannot be loaded, or does not take and give what its metadata says.
    """
    network = _OnnxNetwork(spec, device) if spec.path.suffix == ONNX else _program(spec, device)
    side = spec.input_size
    for count in BATCHES:
        batch = torch.zeros(count, 3, side, side, device=device)
        try:
            with torch.inference_mode():
                output = network(batch)
        except StartupError:
            raise
        except Exception as error:
            way_out = "export it with a dynamic batch dimension and the input_size of its metadata"
            raise spec.refuse(f"does not run on {list(batch.shape)} ({first_line(error)[:160]}); {way_out}") from error
        if not isinstance(output, Tensor) or output.shape != (count, len(spec.classes)):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            wanted = f"{[count, len(spec.classes)]} for {len(spec.classes)} classes"
            raise spec.refuse(f"gives {shape} where its metadata means {wanted}; export it again with the right ones")
    return network


def _program(spec: Spec, device: torch.device) -> nn.Module:
    from torch.export.passes import move_to_device_pass

    try:
        program = torch.export.load(spec.path)
        return move_to_device_pass(program, device).module()
    except Exception as error:  # whatever is in the archive, it is the file's fault
        raise spec.refuse(
            f"cannot be loaded as an exported program ({first_line(error)[:160]}); export it with this PyTorch "
            f"({torch.__version__})"
        ) from error


class _OnnxNetwork(nn.Module):
    """An ONNX Runtime session, called like a network; on CUDA its tensors stay there."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        super().__init__()
        if find_spec("onnxruntime") is None:
            raise StartupError("weights: an ONNX model needs ONNX Runtime: pip install 'cvworker[onnx]'")
        import onnxruntime

        self._device = device
        self._outputs = len(spec.classes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise StartupError(
                    f"weights: the ONNX Runtime that is installed cannot use {device}: install onnxruntime-gpu, or "
                    "run with --device cpu"
                )
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        try:
            self._session = onnxruntime.InferenceSession(spec.path, options, providers=providers)
        except Exception as error:  # of a class of its own for each kind of trouble
            raise spec.refuse(
                f"cannot be loaded by ONNX Runtime ({first_line(error)[:160]}); export it again"
            ) from None
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise spec.refuse(
                f"has {len(inputs)} inputs and {len(outputs)} outputs; export a network with one of each, or write a "
                "module (docs/examples)"
            )
        self._input, self._output = inputs[0].name, outputs[0].name

    def forward(self, batch: Tensor) -> Tensor:
        batch = batch.float().contiguous()
        result = torch.empty(len(batch), self._outputs, device=self._device)
        binding = self._session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, self._input, batch),
            (binding.bind_output, self._output, result),
        ):
            bind(name, self._device.type, self._device.index or 0, numpy.float32, tensor.shape, tensor.data_ptr())
        if batch.is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes on a stream of its own
        self._session.run_with_iobinding(binding)
        return result
