"""The ``Retry-After`` header: how long a host asks to be left alone."""

from __future__ import annotations

import time
from datetime import UTC
from email.utils import parsedate_to_datetime

MOST_S = 3600.0
"""More than this is not believed."""


def retry_after(value: str) -> float | None:
    """Seconds from now, from a number or an HTTP date (RFC 9110, 10.2.3); None if there is none that makes sense."""
    value = value.strip()
    if not value:
        return None
    try:
        seconds = float(value) if value.isdigit() else _moment(value) - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), MOST_S)


def _moment(date: str) -> float:
    moment = parsedate_to_datetime(date)
    if moment.tzinfo is None:  # asctime's form names no zone; HTTP's is always GMT
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp()
