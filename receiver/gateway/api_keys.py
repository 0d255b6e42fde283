"""API keys of clients, and the fingerprints by which rows know their holders.

An entry of RECEIVER_API_KEYS is a plain key or ACCESS_KEY:SECRET_KEY. With a pair the client sends a JWT as Kling's own
samples make it (KLING §1): HS256 with the secret key, `iss` the access key, `exp` and `nbf` around now.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from pydantic import SecretStr

from receiver.gateway.answers import Refused

SALT = b"kling-receiver client"
# How far a client's clock may be ahead. Kling's samples allow for the same 5 s and set `nbf` to now - 5.
CLOCK_TOLERANCE_SECONDS = 5


class ApiKeys:
    """The keys of RECEIVER_API_KEYS.

    `own_only`: a client sees the tasks that it asked for itself; otherwise each key sees all of the account.
    """

    def __init__(self, entries: Sequence[SecretStr], *, own_only: bool = False) -> None:
        self._own_only = own_only
        keys = [entry.get_secret_value() for entry in entries]
        self._clients = [(_digest(key), client_of(key)) for key in keys]
        self._secret_keys: dict[str, list[str]] = {}
        for access_key, secret_key in filter(None, map(pair_in, keys)):
            self._secret_keys.setdefault(access_key, []).append(secret_key)

    def __len__(self) -> int:
        return len(self._clients)

    def sees(self, client: str) -> str | None:
        """The client whose tasks this one may see; None: everybody's."""
        return client if self._own_only else None

    def client(self, authorization: str) -> str:
        """The fingerprint of the key in an Authorization header. Raises `Refused`."""
        scheme, _, key = authorization.partition(" ")
        if not scheme or (scheme.lower() == "bearer" and not key.strip()):
            raise Refused(401, 1001, "Authorization is empty")
        shown = _digest(key.strip())
        # All are compared, so the time does not depend on which key matched.
        found = [client for known, client in self._clients if hmac.compare_digest(shown, known)]
        if scheme.lower() != "bearer" or not (found or self._secret_keys):
            raise _invalid()
        return found[0] if found else fingerprint(self._issuer(key.strip()))

    def _issuer(self, token: str) -> str:
        """The access key whose secret key signed this JWT. Raises `Refused`."""
        import jwt  # imports cryptography: 0.1 s that plain keys do not need

        # `iat` is not checked: jsonwebtoken (npm) sets it by its own clock. PyJWT's leeway is for `nbf` and `exp`.
        options: jwt.types.Options = {"require": ["iss", "exp"], "verify_iat": False}
        try:
            issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
            secret_keys = self._secret_keys.get(issuer, []) if isinstance(issuer, str) else []
            for secret_key in secret_keys:
                with suppress(jwt.InvalidSignatureError):
                    claims = jwt.decode(
                        token, secret_key, ["HS256"], options, issuer=issuer, leeway=CLOCK_TOLERANCE_SECONDS
                    )
                    if int(claims["exp"]) <= time.time():
                        raise jwt.ExpiredSignatureError
                    return str(issuer)
        except jwt.ImmatureSignatureError:
            raise Refused(401, 1003, "Authorization is not valid yet") from None
        except jwt.ExpiredSignatureError:
            raise Refused(401, 1004, "Authorization has expired") from None
        except (jwt.PyJWTError, ValueError, OverflowError, RecursionError):
            raise _invalid() from None
        raise _invalid()


def _invalid() -> Refused:
    return Refused(401, 1002, "Authorization is invalid")


def pair_in(entry: str) -> tuple[str, str] | None:
    """Access key and secret key of an entry; None for a plain key."""
    access_key, _, secret_key = entry.partition(":")
    return (access_key, secret_key) if access_key and secret_key else None


def client_of(entry: str) -> str:
    """The name of an entry's client in rows. It stays the same when the secret key of a pair changes."""
    pair = pair_in(entry)
    return fingerprint(pair[0] if pair else entry)


@cache
def fingerprint(key: str) -> str:
    """The name of a key's holder in rows: 64 hex digits, the same as long as the key is.

    scrypt (RFC 7914) with 16 MB and some 40 ms makes guessing keys from a copy of the database expensive. No secret is
    mixed in: its rotation would rename every client, and a repeated Idempotency-Key would then pay twice.
    """
    return hashlib.scrypt(_digest(key).hex().encode(), salt=SALT, n=2**14, r=8, p=1, dklen=32).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
