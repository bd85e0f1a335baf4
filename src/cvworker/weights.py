"""Where weights come from: a path, ``s3://`` or ``https://``, fetched once and checked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
from pathlib import Path

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from cvworker import aws
from cvworker.errors import JobError, StartupError
from cvworker.loading import DEMO
from cvworker.messages import is_s3_url, split_s3_url
from cvworker.net import AddressGuard, GuardedSession, display_url

MAX_BYTES = 20 * 1024**3
FETCH_TIMEOUT_S = 1800.0
BLOCK = 1024 * 1024


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
    place, _, fragment = weights.partition("#")
    digest = _digest(fragment)
    if is_s3_url(place) or re.match(r"https?://", place, re.IGNORECASE):
        path = _fetch(place, digest, guard)
    else:
        path = Path(place).expanduser()
        if not path.is_file():
            raise StartupError(f"weights: {place} does not exist; give a safetensors file, s3://, https:// or 'demo'")
    if digest and sha256_of(path) != f"sha256:{digest}":
        raise StartupError(f"weights: {display_url(place)} is not the file of sha256={digest}")
    return str(path.resolve())


def _digest(fragment: str) -> str | None:
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if match is None:
        raise StartupError("weights: what follows # must be sha256= and 64 hexadecimal digits")
    return match[1].lower()


def _fetch(url: str, digest: str | None, guard: AddressGuard) -> Path:
    """Fetch into the cache, once: a file named after the URL and the digest is there whole or not at all."""
    if url.lower().startswith("http://") and not digest:
        raise StartupError("weights: over plain http the file must be named with its #sha256=…")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cvworker" / "weights"
    key = hashlib.sha256(f"{url}#{digest}".encode()).hexdigest()[:32]
    path = cache / f"{key}{Path(display_url(url)).suffix}"
    if path.is_file() and digest:  # without a digest the URL may have new content
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, prefix=".part-", delete=False) as file:
            part = Path(file.name)
        try:
            if is_s3_url(url):
                _from_s3(url, part)
            else:
                asyncio.run(_from_http(url, part, guard))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StartupError(f"weights: {display_url(url)} could not be kept in {cache}: {error.strerror}") from None
    return path


def _from_s3(url: str, part: Path) -> None:
    bucket, key = split_s3_url(url)
    try:
        client = aws.session().client("s3")
        if client.head_object(Bucket=bucket, Key=key)["ContentLength"] > MAX_BYTES:
            raise StartupError(f"weights: {url} is larger than {MAX_BYTES} bytes")
        client.download_file(bucket, key, str(part))
    except (BotoCoreError, ClientError) as error:
        raise StartupError(f"weights: {url} could not be read from S3: {str(error).splitlines()[0]}") from None


async def _from_http(url: str, part: Path, guard: AddressGuard) -> None:
    try:
        async with GuardedSession(guard) as session, session.get(url, timeout=FETCH_TIMEOUT_S) as response:
            if response.status != 200:
                raise StartupError(f"weights: {display_url(url)} answered {response.status}")
            size = 0
            with part.open("wb") as file:
                async for block in response.content.iter_chunked(BLOCK):
                    size += len(block)
                    if size > MAX_BYTES:
                        raise StartupError(f"weights: {display_url(url)} is larger than {MAX_BYTES} bytes")
                    file.write(block)
    except JobError as error:
        raise StartupError(f"weights: {display_url(url)}: {error}") from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise StartupError(f"weights: {display_url(url)} could not be fetched ({type(error).__name__})") from None
