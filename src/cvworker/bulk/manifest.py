"""What is to be looked at: a Parquet, CSV or JSON-lines file, a folder of images, or an ``s3://`` prefix.

Each row becomes the body of a request as the worker would receive it, so that one set of rules (``messages.parse``)
says what is wrong with it. The order of the rows is what partitions and a restart go by.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError

from cvworker import aws
from cvworker.errors import StartupError, UrlNotAllowed
from cvworker.messages import is_s3_url, split_s3_url
from cvworker.send import CSV_COLUMNS, IMAGE_SUFFIXES, list_images, read_csv, read_lines

FIELDS = ("image_url", "id", "task", "metadata")
PARQUET = (".parquet", ".pq")
FILES = (*PARQUET, ".csv", ".jsonl", ".ndjson", ".json", ".txt")
"""What the name of an object that is a manifest ends with; any other ``s3://`` URL is a prefix of images."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The rows of ``source`` in order, each the JSON of a request without ``callback_url``.

    ``base`` is the folder that relative paths start from, None where the manifest is in S3. ``buckets`` are those that
    the operator has named by ``source``. ``digest`` is the ``sha256:…`` of all rows.
    """

    source: str
    bodies: list[str]
    digest: str
    base: Path | None
    buckets: frozenset[str]

    def __len__(self) -> int:
        return len(self.bodies)


def read(source: str) -> Manifest:
    """Read the whole manifest.

    Raises StartupError, naming the line where there is one: it does not exist, cannot be read, is empty, or has no
    ``image_url``. A row that is readable and yet no valid request is not refused here: it is answered with an error.
    """
    base = None if is_s3_url(source) else _base(Path(source))
    digest = hashlib.sha256()
    bodies, urls = [], 0
    for row in _rows(source):
        urls += "image_url" in row
        body = json.dumps({name: row[name] for name in FIELDS if name in row}, default=str, separators=(",", ":"))
        digest.update(body.encode() + b"\n")
        bodies.append(body)
    if not bodies:
        raise StartupError(f"input: {source} is empty: it names no image")
    if not urls:
        raise StartupError(f"input: {source} has no image_url in any row")
    buckets = {source[len("s3://") :].partition("/")[0]} if is_s3_url(source) else set()
    return Manifest(source, bodies, f"sha256:{digest.hexdigest()}", base, frozenset(buckets))


def _base(path: Path) -> Path:
    return (path if path.is_dir() else path.parent).resolve()


def _rows(source: str) -> Iterator[Mapping[str, Any]]:
    try:
        if is_s3_url(source):
            yield from _from_s3(source)
        elif (path := Path(source)).is_dir():
            yield from _from_folder(path)
        else:
            with path.open("rb") as file:
                yield from _reader(path.suffix)(file, source)
    except StartupError as error:
        raise StartupError(f"input: {str(error).removeprefix('input: ')}") from None
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
        raise StartupError(f"input: {source} {why}") from None


def _from_folder(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Its images, folders in it included, in the order of their names; else the rows of its Parquet files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        yield from ({"image_url": str(path.relative_to(folder))} for path in images)
        return
    for path in files:
        if path.suffix.lower() in PARQUET:
            with path.open("rb") as file:
                yield from _from_parquet(file, str(path))


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _from_s3(source: str) -> Iterator[Mapping[str, Any]]:
    suffix = PurePosixPath(source).suffix
    if suffix.lower() not in FILES:
        yield from list_images(source)
        return
    try:
        bucket, key = split_s3_url(source)
        data = aws.session().client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    except UrlNotAllowed as error:
        raise StartupError(f"{source} {error}") from None
    except (BotoCoreError, ClientError) as error:
        raise StartupError(f"{source} could not be read from S3: {' '.join(str(error).split())}") from None
    yield from _reader(suffix)(io.BytesIO(data), source)


def _reader(suffix: str) -> Callable[[IO[bytes], str], Iterable[Mapping[str, Any]]]:
    return _from_parquet if suffix.lower() in PARQUET else _from_csv if suffix.lower() == ".csv" else _from_lines


def _from_lines(file: IO[bytes], name: str) -> Iterator[Mapping[str, Any]]:
    yield from read_lines(io.TextIOWrapper(file, encoding="utf-8-sig"), name)


def _from_csv(file: IO[bytes], name: str) -> Iterator[Mapping[str, Any]]:
    for row in read_csv(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), name):
        yield {column: value for column, value in row.items() if value != {} and column in CSV_COLUMNS}


def _from_parquet(file: IO[bytes], name: str) -> Iterator[Mapping[str, Any]]:
    try:
        parquet = pq.ParquetFile(file)
        columns = [column for column in FIELDS if column in parquet.schema_arrow.names]
        if "image_url" not in columns:
            found = ", ".join(parquet.schema_arrow.names[:10])
            raise StartupError(f"{name} has no column image_url (its columns: {found})")
        for batch in parquet.iter_batches(columns=columns):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                yield {column: _plain(column, value) for column, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        raise StartupError(f"{name} cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _plain(column: str, value: Any) -> Any:
    """A cell as a message has it: ids are often numbers in tables, and metadata may be a struct or its JSON."""
    if column == "id" and isinstance(value, int):
        return str(value)
    if column == "metadata" and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value  # the row's own error: metadata must be an object
    return value
