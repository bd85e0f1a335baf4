"""Networks that were exported: a ``torch.export`` program, or an ONNX model run by ONNX Runtime.

Either takes ``float32 [N, 3, S, S]``, normalised, for any N. A classifier gives ``float32 [N, classes]``; a detector
boxes ``float32 [N, K, 4]`` in pixels of its input, scores ``float32 [N, K]`` and labels ``int64 [N, K]``, where K may
depend on the pictures and places without an object have the score 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from cvworker.errors import StartupError
from cvworker.modules.metadata import ONNX, PROGRAM, first_line
from cvworker.modules.spec import Spec
from cvworker.modules.weighted import normalisation

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
    network = _load(spec, device)
    for count, outputs in _tried(network, spec, device):
        if _shapes(outputs) != [[count, len(spec.classes)]]:
            wanted = f"[[{count}, {len(spec.classes)}]] for {len(spec.classes)} classes"
            raise _other_outputs(spec, outputs, wanted)
    return network


def load_detector(spec: Spec, device: torch.device, score_threshold: float) -> nn.Module:
    """The same for a detector, called like one of torchvision's, but with ``uint8 [3, S, S]`` in the list."""
    network = _load(spec, device)
    for count, outputs in _tried(network, spec, device):
        shapes = _shapes(outputs)
        most = shapes[1][1] if len(shapes) == 3 and len(shapes[1]) == 2 else 0
        if shapes != [[count, most, 4], [count, most], [count, most]]:
            raise _other_outputs(spec, outputs, f"boxes [{count}, K, 4], scores [{count}, K] and labels [{count}, K]")
    return _Detector(network, spec, device, score_threshold)


class _Detector(nn.Module):
    def __init__(self, network: nn.Module, spec: Spec, device: torch.device, score_threshold: float) -> None:
        super().__init__()
        self._network = network
        self._scale, self._shift = normalisation(spec, device)
        self._threshold = score_threshold

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        found = self._network(self._shift + torch.stack(list(images)).float() * self._scale)
        kept = (found[1] >= self._threshold) & (found[1] > 0)
        return [
            {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
            for boxes, scores, labels, keep in zip(*found, kept, strict=True)
        ]


def _load(spec: Spec, device: torch.device) -> nn.Module:
    return _OnnxNetwork(spec, device) if spec.path.suffix == ONNX else _program(spec, device)


def _tried(network: nn.Module, spec: Spec, device: torch.device) -> Iterator[tuple[int, Sequence[Any]]]:
    """Batch sizes, and what the network gives for batches of zeros."""
    side = spec.input_size
    for count in BATCHES:
        try:
            with torch.inference_mode():
                outputs = network(torch.zeros(count, 3, side, side, device=device))
        except Exception as error:
            way_out = "export it with a dynamic batch dimension and the input_size of its metadata"
            shape = [count, 3, side, side]
            raise spec.refuse(f"does not run on {shape} ({first_line(error)[:160]}); {way_out}") from error
        yield count, outputs if isinstance(outputs, tuple | list) else (outputs,)


def _shapes(outputs: Sequence[Any]) -> list[Any]:
    return [list(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in outputs]


def _other_outputs(spec: Spec, outputs: Sequence[Any], wanted: str) -> StartupError:
    return spec.refuse(f"gives {_shapes(outputs)} where its metadata means {wanted}; export it again with those")


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
    """An ONNX Runtime session, called like a network; its small outputs come by way of the CPU."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        super().__init__()
        if find_spec("onnxruntime") is None:
            raise StartupError("weights: an ONNX model needs ONNX Runtime: pip install 'cvworker[onnx]'")
        import onnxruntime

        self._device = device
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
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise spec.refuse(f"has {len(inputs)} inputs; export a network with one, or write a module (docs/examples)")
        self._input = inputs[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def forward(self, batch: Tensor) -> Any:
        batch = batch.float().contiguous()
        place = self._device.type, self._device.index or 0
        binding = self._session.io_binding()
        binding.bind_input(self._input, *place, numpy.float32, batch.shape, batch.data_ptr())
        for name in self._outputs:
            binding.bind_output(name, *place)
        if batch.is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes on a stream of its own
        self._session.run_with_iobinding(binding)
        outputs = tuple(torch.from_numpy(each).to(self._device) for each in binding.copy_outputs_to_cpu())
        return outputs if len(outputs) > 1 else outputs[0]
