"""Tokens in callback URLs and asset links: signed, checked in constant time and without a query.

    base64url( version 1 byte │ id 16 bytes │ HMAC-SHA256(secret, purpose, version, provider, id)[:24] ) = 55 characters

A MAC of 192 bits cannot be guessed. A token has at most 64 characters, which is documented for the path segment.
"""

from __future__ import annotations

import base64
import hmac
import uuid
from collections.abc import Sequence

from pydantic import SecretStr

VERSION = 1
MAC_BYTES = 24
# The token of the account URL names no task.
NO_TASK = uuid.UUID(int=0)
TASK_PURPOSE = "callback"
ASSET_PURPOSE = "asset"


class Tokens:
    """Signs with the first secret and accepts every listed one."""

    def __init__(self, secrets: Sequence[SecretStr]) -> None:
        self._secrets = [secret.get_secret_value().encode() for secret in secrets]

    def sign(self, provider: str, task_id: uuid.UUID | None, *, purpose: str = TASK_PURPOSE) -> str:
        """The token for a task, or for the account when `task_id` is None. Raises IndexError without a secret."""
        return _token(self._secrets[0], purpose, provider, task_id or NO_TASK)

    def read(self, provider: str, token: str, *, purpose: str = TASK_PURPOSE) -> uuid.UUID | None:
        """The id that the token names, `NO_TASK` for the account, or None if no listed secret signed it for this
        provider and purpose.
        """
        try:
            named = uuid.UUID(bytes=base64.urlsafe_b64decode(token + "=")[1:17])
        except ValueError:  # not in base64, or too short
            return None
        # As text, because the decoder skips characters outside its alphabet, and the last one has two unused bits.
        matches = [hmac.compare_digest(token, _token(each, purpose, provider, named)) for each in self._secrets]
        return named if any(matches) else None


def _token(secret: bytes, purpose: str, provider: str, named: uuid.UUID) -> str:
    version = bytes([VERSION])
    message = b"\0".join((purpose.encode(), version, provider.encode(), named.bytes))
    raw = version + named.bytes + hmac.digest(secret, message, "sha256")[:MAC_BYTES]
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
