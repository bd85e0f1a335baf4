"""Where results go: a folder or an ``s3://`` prefix, with files that are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from botocore.exceptions import BotoCoreError, ClientError

from cvworker import aws
from cvworker.errors import StartupError, UrlNotAllowed, WorkerFailed
from cvworker.messages import is_s3_url, split_s3_url

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PART = ".part-"
"""Begins the name of a file that is being written; readers of Parquet folders pass over names with a dot."""


class Store(Protocol):
    """Files by name in one place."""

    place: str

    def names(self) -> set[str]:
        """The files that are there; StartupError where the place cannot be used."""
        ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears once it is whole; WorkerFailed where it cannot be written."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """Keep a second run out for as long as this one writes."""
        ...


def open_store(place: str) -> Store:
    """The store at ``place``. Nothing is made or written yet."""
    return S3Store(place) if is_s3_url(place) else FolderStore(Path(place))


class FolderStore:
    """A folder, made at the first write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.place = str(folder)

    def names(self) -> set[str]:
        nearest = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise StartupError(
                f"output: {self.place} cannot be written: {nearest} is no folder that this user can write to"
            )
        if nearest != self._folder:
            return set()
        return {path.name for path in self._folder.iterdir() if not path.name.startswith(".")}

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        part = self._folder / f"{PART}{os.getpid()}-{name}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # the name must not outlive the bytes in a power cut
                part.replace(self._folder / name)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise WorkerFailed(f"output: {self.place}/{name} could not be written: {error.strerror or error}") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second run out, and sweep up what a killed one was writing. Raises StartupError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StartupError(f"output: another run is writing to {self.place}; wait for it, or stop it") from None
            except OSError:
                pass  # a file system without locks
            for part in self._folder.glob(f"{PART}*"):
                part.unlink(missing_ok=True)
            yield


class S3Store:
    """A prefix in a bucket; an object appears once it is whole, as S3 has it."""

    def __init__(self, url: str) -> None:
        self.place = url.rstrip("/")
        try:
            self._bucket, below = split_s3_url(f"{self.place}/.")
        except UrlNotAllowed as error:
            raise StartupError(f"output: {url} {error}") from None
        self._prefix = below.removesuffix(".")
        self._client: S3Client = aws.session().client("s3")

    def names(self) -> set[str]:
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            keys = [str(entry["Key"]) for page in pages for entry in page.get("Contents", [])]
        except (BotoCoreError, ClientError) as error:
            raise StartupError(f"output: {self.place} cannot be listed: {' '.join(str(error).split())}") from None
        return {key.removeprefix(self._prefix) for key in keys}

    def read(self, name: str) -> bytes:
        answer: Any = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
        return bytes(answer["Body"].read())

    def write(self, name: str, data: bytes) -> None:
        try:
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)
        except (BotoCoreError, ClientError) as error:
            what = " ".join(str(error).split())
            raise WorkerFailed(f"output: {self.place}/{name} could not be written: {what}") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """S3 has no lock: two runs at once would do the same work, and write the same names."""
        yield
