"""The metadata in a weights file, of whichever format, read without torch and without running anything in the file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from cvworker.errors import StartupError

PROGRAM, ONNX = ".pt2", ".onnx"
EXTRA_FILE = "cvworker.json"
"""In an exported program's archive, for :func:`torch.export.save`'s ``extra_files``: the metadata as a JSON object."""

_ONNX_METADATA_PROPS = 14  # the number of ModelProto.metadata_props in onnx.proto


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, an exported program (``.pt2``) or an ONNX model (``.onnx``).

    Raises:
        StartupError: one line with the file, what is wrong with it and the way out.
    """
    try:
        with path.open("rb") as file:  # OSErrors have better texts than safe_open's
            start = file.read(4)
            if path.suffix == PROGRAM:
                return _of_program(file)
            if path.suffix == ONNX:
                return dict(_of_onnx(file))
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
        kind = "exported program" if path.suffix == PROGRAM else "ONNX model"
        raise refuse(path, f"is no {kind}, or a damaged one; copy or download it again") from error


def refuse(path: Path, problem: str) -> StartupError:
    """The error that names the file, what is wrong with it and (in ``problem``) the way out."""
    return StartupError(f"weights: {path} {problem}")


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _of_program(file: BinaryIO) -> dict[str, str]:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{EXTRA_FILE}")]
        values = json.loads(archive.read(names[0])) if names else {}
    if not isinstance(values, dict):
        raise ValueError(f"{EXTRA_FILE} is no JSON object")
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
