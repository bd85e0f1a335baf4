"""Files that hold a network, as networks: one class or function for each of the libraries that run them."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from cvworker.errors import StartupError
from cvworker.modules.metadata import (
    ENGINE,
    ONNX,
    first_line,
    is_native,
    is_script,
    read_length,
    read_metadata,
    refuse,
)

Outputs = Any
"""A tensor, or a tuple of tensors: what the network gives."""

SAME = {"AOTI_PLATFORM": "system", "AOTI_MACHINE": "architecture", "AOTI_COMPUTE_CAPABILITY": "GPU architecture"}
"""What must be the same where it was compiled and where it runs; elsewhere it would crash, or never start."""
ONNX_TYPES = {
    "tensor(float)": (torch.float32, numpy.float32),
    "tensor(float16)": (torch.float16, numpy.float16),
    "tensor(uint8)": (torch.uint8, numpy.uint8),
    "tensor(int64)": (torch.int64, numpy.int64),
    "tensor(int32)": (torch.int32, numpy.int32),
    "tensor(bool)": (torch.bool, numpy.bool_),
}
"""Of inputs, as ONNX Runtime, PyTorch and numpy call them."""


def load_network(path: Path, device: torch.device) -> nn.Module:
    """The network in a file that was exported, on ``device``; called like the one it came from, with tensors.

    ``.pt2`` is a ``torch.export`` program or an AOTInductor package, ``.onnx`` runs in ONNX Runtime, ``.engine`` in
    TensorRT, and TorchScript is read as well. Programs, packages, engines and TorchScript can run code when they are
    loaded: whoever calls this has made sure of the file, as ``--weights FILE#sha256=…`` does.

    Raises:
        StartupError: one line with the file, what is wrong with it and the way out.
    """
    if path.suffix == ONNX:
        return _OnnxNetwork(path, device)
    if path.suffix == ENGINE:
        return _TensorRtNetwork(path, device)
    if is_script(path):
        return _script(path, device)
    return _Package(path, device) if is_native(path) else _program(path, device)


def _program(path: Path, device: torch.device) -> nn.Module:
    import torchvision  # noqa: F401 - programs of detectors have its operators
    from torch.export.passes import move_to_device_pass

    try:
        program = torch.export.load(path)
        return move_to_device_pass(program, device).module()
    except Exception as error:  # whatever is in the archive, it is the file's fault
        raise refuse(
            path,
            f"cannot be loaded as an exported program ({first_line(error)[:160]}); export it with this PyTorch "
            f"({torch.__version__})",
        ) from error


def _script(path: Path, device: torch.device) -> nn.Module:
    """TorchScript, which PyTorch no longer develops: read for those who have such files, and never written."""
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            script: nn.Module = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
            return script.eval()
    except Exception as error:
        raise refuse(
            path,
            f"cannot be loaded as TorchScript ({first_line(error)[:160]}); export the network with cvworker export",
        ) from error


class _Package(nn.Module):
    """What AOTInductor compiled: machine code for one kind of device, and its weights."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        import torchvision  # noqa: F401 - detectors call its operators

        again = "export it again on a machine like this one, with its PyTorch"
        made_with = read_metadata(path).get("torch", torch.__version__)
        if made_with != torch.__version__:
            raise refuse(path, f"was compiled with PyTorch {made_with}, and this is {torch.__version__}; {again}")
        try:
            loader: Any = torch._C._aoti.AOTIModelPackageLoader
            found = loader.load_metadata_from_package(str(path), "model")
        except Exception as error:
            raise refuse(
                path, f"cannot be loaded as an AOTInductor package ({first_line(error)[:160]}); {again}"
            ) from None
        if (compiled_for := found.get("AOTI_DEVICE_KEY", device.type)) != device.type:
            raise refuse(
                path, f"was compiled for {compiled_for}, not for {device.type}: --device {compiled_for}, or {again}"
            )
        self._check_machine(path, device, found, again)
        try:
            self._compiled = torch._inductor.aoti_load_package(
                str(path), device_index=_index(device) if device.type == "cuda" else -1
            )
        except Exception as error:
            raise refuse(
                path, f"cannot be loaded as an AOTInductor package ({first_line(error)[:160]}); {again}"
            ) from None

    def _check_machine(self, path: Path, device: torch.device, found: dict[str, str], again: str) -> None:
        from torch._inductor.codecache import get_device_information

        same = SAME | ({"AOTI_CPU_ISA": "CPU instructions"} if device.type == "cpu" else {})
        here = get_device_information(device.type)
        for key, what in same.items():
            if key in found and found[key] != here.get(key):
                raise refuse(path, f"was compiled for another {what}: {found[key]}, this is {here.get(key)}; {again}")

    def forward(self, *inputs: Tensor) -> Outputs:
        return self._compiled(*inputs)


class _OnnxNetwork(nn.Module):
    """An ONNX Runtime session, called like a network; its small outputs come by way of the CPU."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        if find_spec("onnxruntime") is None:
            raise StartupError("weights: an ONNX model needs ONNX Runtime: pip install 'cvworker[onnx]'")
        import onnxruntime

        self._device = device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise StartupError(
                    f"weights: the ONNX Runtime that is installed cannot use {device}: install onnxruntime-gpu, or "
                    "run with --device cpu"
                )
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": _index(device)}))
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # of a class of its own for each kind of trouble
            raise refuse(
                path, f"cannot be loaded by ONNX Runtime ({first_line(error)[:160]}); export it again"
            ) from None
        self._inputs = [(each.name, *self._type(path, each)) for each in self._session.get_inputs()]
        self._outputs = [output.name for output in self._session.get_outputs()]

    def _type(self, path: Path, each: Any) -> tuple[torch.dtype, Any]:
        if each.type not in ONNX_TYPES:
            raise refuse(path, f"has the input {each.name!r} of type {each.type}; export a network that takes numbers")
        return ONNX_TYPES[each.type]

    def forward(self, *tensors: Tensor) -> Outputs:
        if len(tensors) != len(self._inputs):
            raise TypeError(f"the ONNX model takes {len(self._inputs)} inputs, and was called with {len(tensors)}")
        place = self._device.type, _index(self._device)
        binding = self._session.io_binding()
        held = []  # until the session has run
        for tensor, (name, dtype, kind) in zip(tensors, self._inputs, strict=True):
            held.append(tensor.to(dtype).contiguous())
            binding.bind_input(name, *place, kind, held[-1].shape, held[-1].data_ptr())
        for name in self._outputs:
            binding.bind_output(name, *place)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes on a stream of its own
        self._session.run_with_iobinding(binding)
        outputs = tuple(torch.from_numpy(each).to(self._device) for each in binding.copy_outputs_to_cpu())
        return outputs if len(outputs) > 1 else outputs[0]


class _TensorRtNetwork(nn.Module):
    """A TensorRT engine of ``cvworker export``, run on the current stream.

    Written for TensorRT 10, and not tried on a GPU yet.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        if find_spec("tensorrt") is None:
            raise StartupError(
                "weights: an engine needs TensorRT, on a machine with an NVIDIA GPU: pip install tensorrt"
            )
        if device.type != "cuda":
            raise refuse(path, f"is a TensorRT engine, which does not run on {device}: --device cuda")
        tensorrt: Any = import_module("tensorrt")

        self._device = device
        with path.open("rb") as file:
            file.seek(read_length(file), 1)
            engine_bytes = file.read()
        with torch.cuda.device(device):
            self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
            self._engine = self._runtime.deserialize_cuda_engine(engine_bytes)
            if self._engine is None:
                raise refuse(
                    path,
                    f"cannot be loaded by TensorRT {tensorrt.__version__} here; an engine is for the version and "
                    "the GPU it was built with: export it again on this one",
                )
            self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = tensorrt.TensorIOMode.INPUT
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == inputs]
        self._outputs = [name for name in names if name not in self._inputs]
        self._types = {name: _torch_type(tensorrt, self._engine.get_tensor_dtype(name)) for name in names}
        self._largest = int(self._engine.get_tensor_profile_shape(self._inputs[0], 0)[2][0])

    def forward(self, *tensors: Tensor) -> Outputs:
        count = len(tensors[0])
        if count <= self._largest:
            return self._run(tensors)
        parts = [self._run(part) for part in zip(*(torch.split(each, self._largest) for each in tensors), strict=True)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def _run(self, tensors: tuple[Tensor, ...]) -> Outputs:
        held = []
        for name, tensor in zip(self._inputs, tensors, strict=True):
            held.append(tensor.to(self._types[name]).contiguous())
            self._context.set_input_shape(name, tuple(held[-1].shape))
            self._context.set_tensor_address(name, held[-1].data_ptr())
        outputs = []
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            outputs.append(torch.empty(shape, dtype=self._types[name], device=self._device))
            self._context.set_tensor_address(name, outputs[-1].data_ptr())
        stream = torch.cuda.current_stream(self._device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT could not run a batch of {len(tensors[0])}")
        return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _torch_type(tensorrt: Any, kind: Any) -> torch.dtype:
    types = {
        tensorrt.DataType.FLOAT: torch.float32,
        tensorrt.DataType.HALF: torch.float16,
        tensorrt.DataType.BF16: torch.bfloat16,
        tensorrt.DataType.INT64: torch.int64,
        tensorrt.DataType.INT32: torch.int32,
        tensorrt.DataType.INT8: torch.int8,
        tensorrt.DataType.UINT8: torch.uint8,
        tensorrt.DataType.BOOL: torch.bool,
    }
    return types[kind]


def _index(device: torch.device) -> int:
    return device.index or 0
