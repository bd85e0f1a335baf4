"""Why a network cannot be exported, for its author: the operator, and the line of the module that calls it."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import symbolic_shapes

from cvworker.errors import StartupError

Place = tuple[str, int, str]
"""A file, a line, and the expression there."""

TOOLS = tuple(str(Path(each).parent) for each in (torch.__file__, __file__))
"""Where lines of code are not the module's: PyTorch's, and these."""
OPERATOR = re.compile(r"\b((?:aten|torchvision|prims|prim|quantized)(?:\.|::)\w+(?:\.\w+)?)")
PLACE = re.compile(r'File "([^"]+)", line (\d+)')
LONGEST = 200

FIXED = ("Constraints violated", "specialized")
HINTS = {
    ("data-dependent", "DataDependent"): "it depends on values that are known only when it runs: use torch.where or "
    "torch.cond in place of if, and no .item() or .tolist()",
    ("numpy",): "it leaves PyTorch: use a function of torch, or do it in preprocess or process",
    FIXED: "here the batch size becomes a constant: no int(), len() or loop over the batch",
}
"""What to do, by what the error says."""


def cannot(name: str, format_name: str, error: BaseException) -> StartupError:
    """One line: the module, the format, the operator, the line of code, and what to do about it."""
    chain = list(_chain(error))
    text = " ".join(str(each) for each in chain)
    place = _of_shapes(chain, text) or _of_frames(chain) or _of_text(chain) or _of_nodes(chain)
    found = OPERATOR.search(text)
    what = f"the operator {found[1]}" if found else f"the operator in {place[2]!r}" if place else "PyTorch stopped"
    where = f" at {place[0]}:{place[1]}" + (f" ({place[2]})" if found and place[2] else "") if place else ""
    hint = next((hint for said, hint in HINTS.items() if any(each in text for each in said)), None)
    return StartupError(
        f"module: {name!r} cannot be exported as {format_name} because of {what}{where}; {hint or _said(chain)}"
    )


@contextmanager
def noting_lines() -> Iterator[None]:
    """While a network is followed, PyTorch notes the module's lines for what it finds out of shapes, not its own."""
    before = symbolic_shapes.uninteresting_files
    symbolic_shapes.uninteresting_files = lambda: _Tools()  # type: ignore[assignment]
    try:
        yield
    finally:
        symbolic_shapes.uninteresting_files = before


class _Tools:
    def __contains__(self, file: str) -> bool:
        return _is_tool(file)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _of_shapes(chain: list[BaseException], text: str) -> Place | None:
    """Where a dimension became a number: what PyTorch noted of it, which its message leaves out."""
    if not any(each in text for each in FIXED):
        return None
    for environment in _locals(chain, "ShapeEnv"):
        for guard in environment.guards:
            origin = guard.sloc.framework_loc
            is_equation = type(guard.expr).__name__ == "Equality"  # of sympy
            if is_equation and guard.expr.rhs.is_number and hasattr(origin, "lineno") and not _is_tool(origin.filename):
                return origin.filename, origin.lineno, _line(origin.filename, origin.lineno)
    return None


def _of_frames(chain: list[BaseException]) -> Place | None:
    """The last line of the module's that an error passed through."""
    for error in chain:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_tool(frame.filename)]
        if frames:
            return frames[-1].filename, frames[-1].lineno or 0, _expression(frames[-1])
    return None


def _of_text(chain: list[BaseException]) -> Place | None:
    """What an error says of its origin."""
    return next((place for error in chain if (place := _last_place(str(error)))), None)


def _of_nodes(chain: list[BaseException]) -> Place | None:
    """The origin of the node that an exporter or a compiler was at."""
    nodes = _locals(chain, "Node")
    return next((place for node in nodes if (place := _last_place(node.meta.get("stack_trace") or ""))), None)


def _locals(chain: list[BaseException], kind: str) -> Iterator[Any]:
    """Local variables of this type in the frames that errors passed through, the innermost first."""
    for error in reversed(chain):
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            yield from (value for value in list(frame.f_locals.values()) if type(value).__name__ == kind)


def _last_place(text: str) -> Place | None:
    places = [(file, int(line)) for file, line in PLACE.findall(text) if not _is_tool(file)]
    return (*places[-1], _line(*places[-1])) if places else None


def _expression(frame: traceback.FrameSummary) -> str:
    """The part of the line that was being run."""
    line = linecache.getline(frame.filename, frame.lineno or 0).rstrip("\n")
    if frame.colno is not None and frame.end_colno is not None and frame.end_lineno == frame.lineno:
        line = line.encode()[frame.colno : frame.end_colno].decode(errors="replace")
    return line.strip()[:LONGEST]


def _line(file: str, number: int) -> str:
    return linecache.getline(file, number).strip()[:LONGEST]


def _is_tool(file: str) -> bool:
    return file.startswith((*TOOLS, "<")) or "/onnxscript/" in file or "/onnx_ir/" in file


def _said(chain: list[BaseException]) -> str:
    """The first line that says something, of the error closest to the cause."""
    for error in reversed(chain):
        for line in str(error).splitlines():
            if len(line.strip()) > len("Error:") and not line.startswith(("#", "=", "-")):
                return f"{type(error).__name__}: {' '.join(line.split())}"[:LONGEST]
    return type(chain[0]).__name__
