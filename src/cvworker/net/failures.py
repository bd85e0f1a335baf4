"""What can go wrong on the way to a host; time limits are TimeoutError, and refusals UrlNotAllowed."""

from __future__ import annotations

from cvworker.errors import CvworkerError


class HttpFailed(CvworkerError):
    """There was no answer, or not all of one."""


class NameUnknown(HttpFailed):
    """The name of the host does not resolve, or not in time."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(f"the name {host} does not resolve: {why}")
        self.host = host


class ConnectionFailed(HttpFailed):
    """The host, or the egress proxy, could not be reached or hung up before it answered."""


class TlsFailed(HttpFailed):
    """The host's certificate or protocol was not accepted."""


class BadResponse(HttpFailed):
    """What came is not HTTP."""


class BodyCut(HttpFailed):
    """The connection ended before the body was complete."""
