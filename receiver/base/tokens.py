"""Tokens in URLs: stateless, checked in constant time, without a query.

    base64url( version 1 byte │ id 16 bytes │ HMAC-SHA256(secret, purpose, version, provider, id)[:24] ) = 55 characters

192 bits of a MAC are beyond guessing, and the whole stays under the 64 characters that a path segment may promise.
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
# The account URL's token names no task.
NO_TASK = uuid.UUID(int=0)
TASK_PURPOSE = "callback"
ASSET_PURPOSE = "asset"


@dataclass(frozen=True)
class Named:
    """What a good token names. `task_id` None: the account, no task. `secret_number`: 0 = the secret that signs now."""

    task_id: uuid.UUID | None
    secret_number: int


class Tokens:
    """Signs with the first secret, accepts every listed one."""

    def __init__(self, secrets: Sequence[SecretStr]) -> None:
        self._secrets = [secret.get_secret_value().encode() for secret in secrets]

    def sign(self, provider: str, task_id: uuid.UUID | None, *, purpose: str = TASK_PURPOSE) -> str:
        """The token for a task, or for the account when `task_id` is None. Raises IndexError without a secret."""
        named = task_id or NO_TASK
        raw = bytes([VERSION]) + named.bytes + _mac(self._secrets[0], purpose, provider, named)
        return _text(raw)

    def read(self, provider: str, token: str, *, purpose: str = TASK_PURPOSE) -> Named | None:
        """What the token names, or None when no listed secret made it for this provider and purpose."""
        if len(token) != CHARACTERS:
            return None
        try:
            raw = base64.urlsafe_b64decode(token + "=")
        except (binascii.Error, ValueError):
            return None
        if _text(raw) != token or raw[0] != VERSION:  # strange letters are passed over, the last one has bits to spare
            return None
        named, mac = uuid.UUID(bytes=raw[1:17]), raw[17:]
        good = [hmac.compare_digest(mac, _mac(secret, purpose, provider, named)) for secret in self._secrets]
        if not any(good):
            return None
        return Named(None if named == NO_TASK else named, good.index(True))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _mac(secret: bytes, purpose: str, provider: str, named: uuid.UUID) -> bytes:
    message = b"\0".join((purpose.encode(), bytes([VERSION]), provider.encode(), named.bytes))
    return hmac.digest(secret, message, "sha256")[:MAC_BYTES]
