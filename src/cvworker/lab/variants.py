"""Ways to run one network: number formats, and forms of it. Which of them there are here, and how one is put on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from cvworker.errors import StartupError
from cvworker.lab.results import EXPORTED
from cvworker.lab.subject import Subject
from cvworker.model.optimize import ChannelsLast, Compiled, Form, Graphs, has_compiler, has_images
from cvworker.model.precision import PRECISIONS, lower_precisions

PRECISION_NAMES = ("fp32", "tf32", "bf16", "fp16")
FORMAT_NAMES = ("eager", "channels-last", "compiled", "graphs")
TF32_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Variant:
    """A precision and a format; a format may be several forms, joined by ``+``."""

    precision: str
    format: str

    def __str__(self) -> str:
        return f"{self.precision} {self.format}"


@dataclass
class Worn:
    """A variant that is on a network; ``for_batch`` is called before each other batch size."""

    _network: nn.Module | None
    _graphs: bool
    _forms: list[Form] = field(default_factory=list)

    def for_batch(self, batch: int) -> None:
        """A recording belongs to one batch size, and would keep its memory while others are measured."""
        if not self._graphs:
            return
        assert self._network is not None
        self.take_off()
        self._forms.append(Graphs(self._network, batch))
        self._forms[-1].on()

    def take_off(self) -> None:
        while self._forms:
            self._forms.pop().off()


def variants(
    network: nn.Module | None, device: torch.device, precisions: Sequence[str], formats: Sequence[str]
) -> list[Variant]:
    """Every precision in every format, those wanted or, where none are, all that make sense here.

    A module that keeps no network with weights in ``self.model`` has no other format than eager. Raises StartupError
    for a name that is none.
    """
    for kind, names, known in (("precisions", precisions, PRECISION_NAMES), ("formats", formats, FORMAT_NAMES)):
        for name in names:
            if any(part not in known for part in name.split("+" if kind == "formats" else "\0")):
                raise StartupError(f"{kind}: there is no {name!r}; give some of {', '.join(known)}")
    precisions = precisions or usual_precisions(device)
    if network is None or not any(True for _ in network.parameters()):  # what holds none is run by another library
        formats = ["eager"]
    formats = formats or usual_formats(network, device)
    return [Variant(precision, format_) for precision in precisions for format_ in formats]


def usual_precisions(device: torch.device) -> list[str]:
    """fp32, and what the device has arithmetic for besides."""
    tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY
    return ["fp32", *(["tf32"] if tf32 else []), *lower_precisions(device)]


def usual_formats(network: nn.Module | None, device: torch.device) -> list[str]:
    """Eager, and each form that this network and this machine can have."""
    found = ["eager"]
    if network is not None and has_images(network):
        found.append("channels-last")
    if device.type == "cuda" or has_compiler():
        found.append("compiled")
    if device.type == "cuda":
        found.append("graphs")
    return found


@contextmanager
def wearing(subject: Subject, variant: Variant) -> Iterator[Worn]:
    """Put a variant on the subject's network for as long as the context lasts. Raises where that cannot be."""
    device, names = subject.device, variant.format.split("+") if variant.precision != EXPORTED else []
    if variant.precision == "tf32" and device.type != "cuda":
        raise RuntimeError("tf32 is a format of GPUs")
    if "graphs" in names and device.type != "cuda":
        raise RuntimeError("graphs are recorded by CUDA")
    runner = subject.runner
    before = runner.precision
    runner.precision = variant.precision if variant.precision in PRECISIONS else "fp32"
    with ExitStack() as stack:
        stack.callback(setattr, runner, "precision", before)
        stack.enter_context(_tf32(variant.precision))
        for name in names:
            if form := _form(name, subject.network, runner.precision):
                form.on()
                stack.callback(form.off)
        worn = Worn(subject.network, "graphs" in names)
        stack.callback(worn.take_off)
        yield worn
        if "compiled" in names:
            torch.compiler.reset()


def _form(name: str, network: nn.Module | None, precision: str) -> Form | None:
    if name in ("eager", "graphs"):
        return None
    assert network is not None
    return Compiled(network) if name == "compiled" else ChannelsLast(network, PRECISIONS[precision])


@contextmanager
def _tf32(precision: str) -> Iterator[None]:
    """On for ``tf32``, off for ``fp32``: PyTorch's own default is to let convolutions use it. Else as it is."""
    if precision not in ("fp32", "tf32") or not torch.cuda.is_available():
        yield
        return
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before
