"""Where weights come from: a path, ``s3://`` or ``https://``, fetched once and checked."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from cvworker.errors import JobError, StartupError, UrlNotAllowed
from cvworker.loading import DEMO
from cvworker.messages import is_s3_url, split_s3_url
from cvworker.modules.metadata import ENGINE, PROGRAM, is_native, runs_code
from cvworker.net import AddressGuard, GuardedSession, HttpFailed, NameUnknown, Response, TlsFailed, display_url
from cvworker.settings import how_to_set

MAX_BYTES = 20 * 1024**3
FETCH_TIMEOUT_S = 1800.0
TRIES = 3
RETRY_BASE_S = 1.0
BLOCK = 1024 * 1024
PART = ".part-"

Fetched = Callable[[str], "Path | None"]
"""Given what tells this version of the file from others ("" if nothing does): the copy that is there, if any."""


class _Passing(Exception):
    """A failure that may be over in a moment."""


def bucket_of(weights: str | None) -> set[str]:
    """The bucket that weights come from: images may be read from there too."""
    return {split_s3_url(weights.partition("#")[0])[0]} if weights and is_s3_url(weights) else set()


def sha256_of(path: Path) -> str:
    """``sha256:…`` of a file, read in blocks."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def local(weights: str | None, guard: AddressGuard) -> str | None:
    """The local path of the weights, fetched if they are elsewhere; ``demo`` and None stay as they are.

    Raises:
        StartupError: missing, not to be fetched, too large, or not of the SHA-256 given.
    """
    if weights is None or weights == DEMO:
        return weights
    place, digest = _place_and_digest(weights)
    if digest is None and place.endswith((PROGRAM, ENGINE)):
        raise _untrusted(place)
    if _is_remote(place):
        fetched = _fetch(place, digest, guard)
        if is_native(fetched):
            raise StartupError(
                f"weights: {display_url(place)} holds machine code, which is only loaded from a local path: fetch it "
                "yourself, and name it with that and its #sha256=…"
            )
        return str(_trusted(fetched, digest, place))
    try:
        path = Path(place).expanduser()
        if not path.is_file():
            raise StartupError(f"weights: {place} does not exist; give a safetensors file, s3://, https:// or 'demo'")
        with path.open("rb"):
            pass
        _check_digest(path, digest, place)
        _trusted(path, digest, place)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        raise StartupError(f"weights: {place} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return str(path.resolve())


def _trusted(path: Path, digest: str | None, place: str) -> Path:
    if digest is None and runs_code(path):
        raise _untrusted(place)
    return path


def _untrusted(place: str) -> StartupError:
    return StartupError(
        f"weights: an exported program can run code when loaded: say which file you trust, {display_url(place)}"
        "#sha256=… (sha256sum prints it)"
    )


def _is_remote(place: str) -> bool:
    return is_s3_url(place) or re.match(r"https?://", place, re.IGNORECASE) is not None


def _place_and_digest(weights: str) -> tuple[str, str | None]:
    """A ``#`` in the name of a file or of an S3 object is part of it; what follows one in a URL must be a digest."""
    place, mark, fragment = weights.rpartition("#")
    if not mark or not (fragment.startswith("sha256=") or re.match("https?:", place, re.IGNORECASE)):
        return weights, None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if match is None:
        raise StartupError("weights: what follows # must be sha256= and 64 hexadecimal digits")
    return place, match[1].lower()


def _check_digest(path: Path, digest: str | None, place: str) -> None:
    if digest and sha256_of(path) != f"sha256:{digest}":
        raise StartupError(f"weights: {display_url(place)} is not the file of sha256={digest}")


def _fetch(url: str, digest: str | None, guard: AddressGuard) -> Path:
    """Fetch into the cache, unless this very file is there: named after its URL and its digest or version (the ETag).

    It gets its name once it is whole and checked, so a file in the cache is never half of one. Workers that start
    together wait for the first of them.
    """
    if url.lower().startswith("http://") and not digest:
        raise StartupError("weights: over plain http the file must be named with its #sha256=…")
    suffix = PurePosixPath(urlsplit(url).path).suffix
    suffix = suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,16}", suffix) else ""
    try:
        cache = _cache()
        _sweep(cache)

        def named(version: str) -> Path:
            key = hashlib.sha256((digest or f"{url}#{version}").encode()).hexdigest()[:32]
            return cache / f"{key}{suffix}"

        def fetched(version: str) -> Path | None:
            path = named(version)
            if not (digest or version) or not path.is_file():
                return None
            return path if digest is None or sha256_of(path) == f"sha256:{digest}" else None

        with _alone(cache / f"{named('').stem}.lock"):
            if digest and (path := fetched("")):
                return path
            return _fetch_now(url, digest, guard, cache, named, fetched)
    except OSError as error:
        why = f"{error.filename or 'the cache'}: {error.strerror or error}"
        raise StartupError(
            f"weights: {display_url(url)} could not be kept: {why}; XDG_CACHE_HOME names another place"
        ) from None


def _fetch_now(
    url: str, digest: str | None, guard: AddressGuard, cache: Path, named: Callable[[str], Path], fetched: Fetched
) -> Path:
    with tempfile.NamedTemporaryFile(dir=cache, prefix=PART, delete=False) as file:
        part = Path(file.name)
    try:
        if is_s3_url(url):
            version = _from_s3(url, part, fetched)
        else:
            version = _from_http(url, part, guard, fetched, https_only=digest is None)
        if isinstance(version, Path):
            return version
        _check_digest(part, digest, url)
        return part.replace(named(version))
    finally:
        part.unlink(missing_ok=True)


def _cache() -> Path:
    """A directory that can be written: the user's cache, else one of this user's in the temporary directory."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(xdg) if Path(xdg).is_absolute() else Path("~/.cache").expanduser()
        usual = caches / "cvworker" / "weights"
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK | os.X_OK):
            return usual
    except (OSError, RuntimeError):  # a file system that is read-only; a user without a home
        pass
    spare = Path(tempfile.gettempdir(), f"cvworker-weights-{os.getuid()}")
    spare.mkdir(mode=0o700, exist_ok=True)
    found = spare.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(1, "belongs to somebody else, or others may write to it", str(spare))
    return spare


def _sweep(cache: Path) -> None:
    """Remove what fetches that were killed have left behind."""
    for part in cache.glob(f"{PART}*"):
        try:
            if time.time() - part.stat().st_mtime > 2 * FETCH_TIMEOUT_S:
                part.unlink()
        except OSError:  # another worker was faster
            pass


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock, where the file system has locks; without, workers that start together fetch one file each."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _from_s3(url: str, part: Path, fetched: Fetched) -> str | Path:
    try:
        bucket, key = split_s3_url(url)
        client = boto3.Session().client("s3")
        head = client.head_object(Bucket=bucket, Key=key)
        _limit(head["ContentLength"], url)
        version = head.get("ETag", "")
        if path := fetched(version):
            return path
        client.download_file(bucket, key, str(part))
        _limit(part.stat().st_size, url)
    except (BotoCoreError, ClientError, Boto3Error, JobError, ValueError) as error:
        raise StartupError(f"weights: {url} could not be read from S3: {' '.join(str(error).split())}") from None
    return version


def _from_http(url: str, part: Path, guard: AddressGuard, fetched: Fetched, *, https_only: bool) -> str | Path:
    shown = display_url(url)
    for tries_left in range(TRIES - 1, -1, -1):
        try:
            return asyncio.run(_get(url, part, guard, fetched, https_only=https_only))
        except UrlNotAllowed as error:
            raise StartupError(f"weights: {shown}: {error}; {how_to_set('allowed_hosts')} exempts a host") from None
        except JobError as error:
            raise StartupError(f"weights: {shown}: {error}") from None
        except _Passing as error:
            if not tries_left:
                raise StartupError(f"weights: {shown} could not be fetched: {error}") from None
            time.sleep(RETRY_BASE_S * 2 ** (TRIES - 1 - tries_left))
    raise AssertionError("the last try returns or raises")


async def _get(url: str, part: Path, guard: AddressGuard, fetched: Fetched, *, https_only: bool) -> str | Path:
    try:
        async with (
            GuardedSession(guard) as session,
            session.get(url, timeout=FETCH_TIMEOUT_S, https_only=https_only) as response,
        ):
            _check(response, url)
            version = response.header("etag")
            version = "" if version.startswith("W/") else version  # a weak one stays when bytes change
            if path := fetched(version):
                return path
            size = 0
            with part.open("wb") as file:
                async for block in response.chunks():
                    size += len(block)
                    _limit(size, url)
                    file.write(block)
            return version
    except NameUnknown as error:
        raise _Passing(f"the name {error.host} does not resolve") from None
    except TlsFailed:
        raise StartupError(f"weights: {display_url(url)}: the host's certificate was not accepted") from None
    except TimeoutError:
        raise StartupError(f"weights: {display_url(url)} took longer than {FETCH_TIMEOUT_S:g} s") from None
    except HttpFailed as error:
        raise _Passing(str(error)) from None


def _check(response: Response, url: str) -> None:
    if response.status == 429 or response.status >= 500:
        raise _Passing(f"HTTP {response.status}")
    if response.status != 200:
        raise StartupError(f"weights: {display_url(url)} answered {response.status}")
    encoding = response.header("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise StartupError(f"weights: {display_url(url)} came with Content-Encoding {encoding[:40]!r}")
    _limit(response.length or 0, url)


def _limit(size: int, url: str) -> None:
    if size > MAX_BYTES:
        raise StartupError(f"weights: {display_url(url)} is larger than {MAX_BYTES} bytes")
