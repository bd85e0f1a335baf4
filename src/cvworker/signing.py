"""Signatures on callbacks, by the Standard Webhooks scheme, so that receivers can tell them from anybody's."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence

_PREFIX = "whsec_"
_KEY_BYTES = range(24, 65)


class Signer:
    """Signs callback bodies with every secret it holds, so that receivers can change over from one to the next.

    ``secrets`` are ``whsec_`` and the base64 of 24 to 64 bytes. Raises ValueError, with a text that can be logged,
    for one that is not.
    """

    __slots__ = ("_keys",)

    def __init__(self, secrets: Sequence[str]) -> None:
        if isinstance(secrets, str) or not secrets:
            raise ValueError("callback secrets must be a list of at least one")
        self._keys = [_key(secret, f"callback secret {n} of {len(secrets)}") for n, secret in enumerate(secrets, 1)]

    def headers(self, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """The headers for ``body`` as sent at ``timestamp`` (Unix seconds): one signature per secret, in their order.

        A repeat keeps its ``webhook_id`` and takes a new timestamp, as receivers refuse old ones.
        """
        signed = f"{webhook_id}.{timestamp}.".encode() + body
        digests = (hmac.digest(key, signed, "sha256") for key in self._keys)
        return {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join("v1," + base64.b64encode(digest).decode() for digest in digests),
        }

    def __repr__(self) -> str:
        return f"<Signer with {len(self._keys)} secret(s)>"


def _key(secret: str, name: str) -> bytes:
    encoded = secret.removeprefix(_PREFIX)
    if encoded == secret:
        raise ValueError(f"{name} must begin with {_PREFIX}")
    try:
        # Some generators leave the padding out, and receivers' libraries accept that.
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} must be base64 after {_PREFIX}") from None
    if len(key) not in _KEY_BYTES:
        raise ValueError(f"{name} must be {_KEY_BYTES[0]} to {_KEY_BYTES[-1]} bytes long; it is {len(key)}")
    return key
