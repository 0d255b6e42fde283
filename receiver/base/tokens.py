"""Tokens in callback URLs and asset links: signed, checked in constant time and without a query.

    base64url( version 1 byte │ id 16 bytes │ HMAC-SHA256(secret, purpose, version, provider, id)[:24] ) = 55 characters

A MAC of 192 bits cannot be guessed. A token has at most 64 characters, which is documented for the path segment.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import SecretStr

VERSION = 1
MAC_BYTES = 24
CHARACTERS = 55
# The token of the account URL names no task.
NO_TASK = uuid.UUID(int=0)
TASK_PURPOSE = "callback"
ASSET_PURPOSE = "asset"


@dataclass(frozen=True)
class Named:
    """What a valid token names. `task_id` None: the account. `secret_number`: 0 = the secret that signs now."""

    task_id: uuid.UUID | None
    secret_number: int


class Tokens:
    """Signs with the first secret and accepts every listed one."""

    def __init__(self, secrets: Sequence[SecretStr]) -> None:
        self._secrets = [secret.get_secret_value().encode() for secret in secrets]

    def sign(self, provider: str, task_id: uuid.UUID | None, *, purpose: str = TASK_PURPOSE) -> str:
        """The token for a task, or for the account when `task_id` is None. Raises IndexError without a secret."""
        named = task_id or NO_TASK
        return _encode(bytes([VERSION]) + named.bytes + _mac(self._secrets[0], purpose, provider, named))

    def read(self, provider: str, token: str, *, purpose: str = TASK_PURPOSE) -> Named | None:
        """What the token names, or None if no listed secret signed it for this provider and purpose."""
        if len(token) != CHARACTERS:
            return None
        try:
            raw = base64.urlsafe_b64decode(token + "=")
        except (binascii.Error, ValueError):
            return None
        # The decoder skips characters outside its alphabet, and the last character has two unused bits.
        if _encode(raw) != token or raw[0] != VERSION:
            return None
        named, mac = uuid.UUID(bytes=raw[1:17]), raw[17:]
        matches = [hmac.compare_digest(mac, _mac(secret, purpose, provider, named)) for secret in self._secrets]
        if not any(matches):
            return None
        return Named(None if named == NO_TASK else named, matches.index(True))


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _mac(secret: bytes, purpose: str, provider: str, named: uuid.UUID) -> bytes:
    message = b"\0".join((purpose.encode(), bytes([VERSION]), provider.encode(), named.bytes))
    return hmac.digest(secret, message, "sha256")[:MAC_BYTES]
