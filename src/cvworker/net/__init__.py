"""Which addresses may be spoken to, and speaking HTTP to them: the one way out for downloads, callbacks and weights.

:class:`AddressGuard` decides about URLs and addresses, one for all threads. Each event loop has a
:class:`GuardedSession` of its own: names are resolved in ``lookups``, every answer is checked, and ``pool`` dials
addresses that were checked and nothing else. The same holds again for each redirect.
"""

from cvworker.net.failures import BadResponse, BodyCut, ConnectionFailed, HttpFailed, NameUnknown, TlsFailed
from cvworker.net.guard import AddressGuard, Url, display_url
from cvworker.net.lookups import Lookup, look_up
from cvworker.net.session import GuardedSession, Response

__all__ = [
    "AddressGuard",
    "BadResponse",
    "BodyCut",
    "ConnectionFailed",
    "GuardedSession",
    "HttpFailed",
    "Lookup",
    "NameUnknown",
    "Response",
    "TlsFailed",
    "Url",
    "display_url",
    "look_up",
]
