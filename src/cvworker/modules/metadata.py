"""The metadata in a weights file, of whichever format, read without torch and without running anything in the file."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from cvworker.errors import StartupError

PROGRAM, ONNX, ENGINE = ".pt2", ".onnx", ".engine"
"""Files that hold a network: PyTorch's (``torch.export`` and AOTInductor), ONNX, and TensorRT's engines."""
SCRIPT = (".pt", ".pth", ".ts", ".torchscript")
"""What TorchScript is called, and often a pickle."""
EXTRA_FILE = "cvworker.json"
"""In the archive of a program or a TorchScript, among what PyTorch calls extra files: the metadata as a JSON object."""
NATIVE = "/data/aotinductor/"
"""Where a ``.pt2`` has machine code, compiled by AOTInductor."""
ENGINE_HEAD = struct.Struct("<i")
"""An engine's file begins with the length of its metadata, which follow as a JSON object; then comes the engine."""

_LONGEST = 64 * 1024 * 1024  # bytes of metadata: an engine that was made by others begins with any number
_ONNX_METADATA_PROPS = 14  # the number of ModelProto.metadata_props in onnx.proto


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of one that holds a network: see :func:`is_exported`.

    Raises:
        StartupError: one line with the file, what is wrong with it and the way out.
    """
    try:
        with path.open("rb") as file:  # OSErrors have better texts than safe_open's
            start = file.read(4)
            if path.suffix == PROGRAM or is_script(path):
                return _of_program(file)
            if path.suffix == ONNX:
                return dict(_of_onnx(file))
            if path.suffix == ENGINE:
                file.seek(0)
                return _texts(json.loads(file.read(read_length(file))))
        with safe_open(path, framework="numpy") as tensors:
            return tensors.metadata() or {}
    except OSError as error:
        reason = error.strerror or error
        raise refuse(path, f"cannot be opened ({reason}); set --weights to a safetensors file") from error
    except SafetensorError as error:
        if start.startswith((b"PK\x03\x04", b"\x80")):  # torch.save's zip, or a bare pickle
            raise refuse(
                path, "is a pickle, which could run code when loaded; convert it to safetensors ('cvworker pack')"
            ) from error
        reason = first_line(error)
        raise refuse(path, f"is no safetensors file, or a damaged one ({reason}); copy or download it again") from error
    except (zipfile.BadZipFile, ValueError) as error:
        kind = {PROGRAM: "exported program", ENGINE: "TensorRT engine of 'cvworker export'"}.get(
            path.suffix, "ONNX model"
        )
        raise refuse(path, f"is no {kind}, or a damaged one; copy or download it again") from error


def is_exported(path: Path) -> bool:
    """Whether the file holds a network rather than the tensors of one."""
    return path.suffix in (PROGRAM, ONNX, ENGINE) or is_script(path)


def is_script(path: Path) -> bool:
    """Whether the file is TorchScript's, and no pickle of the same name."""
    return path.suffix in SCRIPT and any("/code/" in name for name in _members(path))


def is_native(path: Path) -> bool:
    """Whether the file holds machine code, which runs once it is loaded, on the kind of machine it was made on."""
    return path.suffix == ENGINE or (path.suffix == PROGRAM and any(NATIVE in name for name in _members(path)))


def runs_code(path: Path) -> bool:
    """Whether loading the file may run what somebody has put there: it must then be named with its digest."""
    return path.suffix in (PROGRAM, ENGINE) or is_script(path)


def read_length(file: BinaryIO) -> int:
    """The length in bytes of the metadata that come next in an engine's file. Raises ValueError if there are none."""
    try:
        (length,) = ENGINE_HEAD.unpack(file.read(ENGINE_HEAD.size))
    except struct.error as error:
        raise ValueError("cut off") from error
    if not 0 < length < _LONGEST:
        raise ValueError("no metadata")
    return int(length)


def refuse(path: Path, problem: str) -> StartupError:
    """The error that names the file, what is wrong with it and (in ``problem``) the way out."""
    return StartupError(f"weights: {path} {problem}")


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


def _of_program(file: BinaryIO) -> dict[str, str]:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{EXTRA_FILE}")]
        values = json.loads(archive.read(names[0])) if names else {}
    return _texts(values)


def _texts(values: object) -> dict[str, str]:
    if not isinstance(values, dict):
        raise ValueError("the metadata are no JSON object")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _of_onnx(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """``metadata_props``: the top-level fields are walked over, so that gigabytes of weights are not read for it."""
    file.seek(0)
    while (key := _varint(file)) is not None:
        number, kind = key >> 3, key & 7
        if kind == 0:
            _varint(file)
        elif kind == 2:
            length = _varint(file)
            if length is None:
                raise ValueError("cut off")
            if number == _ONNX_METADATA_PROPS:
                yield _entry(file.read(length))
            else:
                file.seek(length, 1)
        else:
            raise ValueError("a field that ModelProto does not have")


def _entry(data: bytes) -> tuple[str, str]:
    """A StringStringEntryProto: its key is field 1, its value field 2."""
    found, part = {}, io.BytesIO(data)
    while (key := _varint(part)) is not None:
        found[key >> 3] = part.read(_varint(part) or 0).decode()
    return found.get(1, ""), found.get(2, "")


def _varint(file: BinaryIO) -> int | None:
    """A protocol buffer's variable-length number; None at the end of the file."""
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    if shift:
        raise ValueError("cut off in a number")
    return None
