"""Whose request it is: the API keys that clients show, and the names under which rows know them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import cache

from pydantic import SecretStr

from receiver.gateway.answers import Refused

SALT = b"kling-receiver client"


class ApiKeys:
    """The keys of RECEIVER_API_KEYS. Whoever shows one of them sees the one account."""

    def __init__(self, entries: Sequence[SecretStr]) -> None:
        keys = [entry.get_secret_value() for entry in entries]
        self._clients = [(_digest(key), fingerprint(key)) for key in keys]

    def client(self, authorization: str) -> str:
        """The fingerprint of the key in an Authorization header. Raises `Refused`."""
        scheme, _, key = authorization.partition(" ")
        if not scheme or (scheme.lower() == "bearer" and not key.strip()):
            raise Refused(401, 1001, "Authorization is empty")
        shown = _digest(key.strip())
        # All are compared: how long it takes says nothing about which key matched.
        found = [client for known, client in self._clients if hmac.compare_digest(shown, known)]
        if not found or scheme.lower() != "bearer":
            raise Refused(401, 1002, "Authorization is invalid")
        return found[0]


@cache
def fingerprint(key: str) -> str:
    """What rows call the holder of an API key: 64 hex digits that stay the same as long as the key does.

    scrypt (RFC 7914) with 16 MB and some 40 ms, so a copy of the database is no cheap test for guessed keys. No secret
    is mixed in: its rotation would rename every client, and who sends again under an Idempotency-Key would pay twice.
    """
    return hashlib.scrypt(_digest(key).hex().encode(), salt=SALT, n=2**14, r=8, p=1, dklen=32).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
