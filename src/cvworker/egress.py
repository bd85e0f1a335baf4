"""The operator's own word on what leaves this machine: which ports may be dialled, and by which proxy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

PORTS = ("80", "443", "1025-65535")
"""Dialled unless a setting says otherwise: what the web uses, and what no system service listens on."""


def port_ranges(entries: Iterable[str]) -> tuple[range, ...]:
    """The ports that ``entries`` (``443`` or ``8000-8999``) name; ValueError for one that names none."""
    found = []
    for entry in entries:
        parts = re.fullmatch(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?", entry.strip())
        first, last = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
        if not 0 < first <= last < 65536:
            raise ValueError(f"{entry!r} is neither a port nor a range such as 8000-8999")
        found.append(range(first, last + 1))
    return tuple(found)


def check_proxy(url: str) -> None:
    """ValueError, with a text that shows nothing of it, unless ``url`` is ``http://[user:password@]host:port``."""
    wrong = ValueError("must be http://host:port, or http://user:password@host:port")
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "http" and parts.hostname and parts.port
    except ValueError:
        raise wrong from None
    if not usable or parts.path not in ("", "/") or parts.query or parts.fragment or re.search(r"[\s\x00-\x1f]", url):
        raise wrong


def without_credentials(url: str) -> str:
    """A proxy's URL as it may be shown."""
    return re.sub(r"//.*@", "//***@", url)
