"""Signatures of Standard Webhooks 1.0.0. Every listed secret signs, so a receiver may change its own at any time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from datetime import datetime

from pydantic import SecretStr

PREFIX = "whsec_"
# The specification's bounds.
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64


class Signer:
    """Makes the three headers; none without secrets. Raises ValueError for an invalid secret."""

    def __init__(self, secrets: Sequence[SecretStr]) -> None:
        self._keys = [key_of(secret) for secret in secrets]

    def headers(self, message_id: str, body: bytes, now: datetime) -> dict[str, str]:
        """`message_id`: the same at every try. `now`: aware; receivers refuse a time that is more than some minutes
        off.
        """
        if not self._keys:
            return {}
        moment = str(int(now.timestamp()))
        signed = b".".join((message_id.encode(), moment.encode(), body))
        macs = [base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in self._keys]
        signatures = " ".join(f"v1,{mac}" for mac in macs)
        return {"webhook-id": message_id, "webhook-timestamp": moment, "webhook-signature": signatures}


def client_secret(secret: SecretStr, client: str) -> SecretStr:
    """The secret that signs one client's callbacks, derived from one of ours. It proves nothing about events or other
    clients.

    `client`: its fingerprint.
    """
    key = hmac.new(key_of(secret), f"client callback v1/{client}".encode(), hashlib.sha256).digest()
    return SecretStr(PREFIX + base64.b64encode(key).decode())


def key_of(secret: SecretStr) -> bytes:
    """The key in `whsec_` + Base64. Raises ValueError, whose message shows nothing of the secret."""
    text = secret.get_secret_value()
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True) if text.startswith(PREFIX) else b""
    except (binascii.Error, ValueError):
        key = b""
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"each is whsec_ followed by the Base64 of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} random bytes")
    return key
