"""AWS Signature Version 4 of a request whose body's SHA-256 is known, as botocore makes it.

botocore takes 0.15 ms of CPU a put, most of it for header objects; this takes 0.013 ms. A test compares every header.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


class Signer:
    """Signs requests to one host. Thread-safe. The key is derived once a day and for each set of credentials."""

    def __init__(self, credentials: Any, region: str, host: str) -> None:
        self._credentials = credentials
        self._region = region
        self._host = host
        self._derived: tuple[tuple[str, str], bytes] | None = None

    def headers(
        self, method: str, path: str, sha256: str, more: Mapping[str, str], now: datetime | None = None
    ) -> dict[str, str]:
        """`more` with what signs it. `path`: quoted, without a query. `more`: lower-case names; all are signed."""
        found = self._credentials.get_frozen_credentials()
        moment = f"{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        scope = f"{moment[:8]}/{self._region}/s3/aws4_request"
        headers = {"host": self._host, "x-amz-content-sha256": sha256, "x-amz-date": moment, **more}
        if found.token:
            headers["x-amz-security-token"] = found.token
        names = sorted(headers)
        signed = ";".join(names)
        lines = "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in names)
        canonical = hashlib.sha256(f"{method}\n{path}\n\n{lines}\n{signed}\n{sha256}".encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{canonical}"
        signature = hmac.digest(self._key(found.secret_key, moment[:8]), text.encode(), "sha256").hex()
        credential = f"Credential={found.access_key}/{scope}"
        return {
            **headers,
            "authorization": f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={signed}, Signature={signature}",
        }

    def _key(self, secret: str, day: str) -> bytes:
        derived = self._derived
        if derived is None or derived[0] != (secret, day):
            key = b"AWS4" + secret.encode()
            for word in (day, self._region, "s3", "aws4_request"):
                key = hmac.digest(key, word.encode(), "sha256")
            self._derived = derived = (secret, day), key
        return derived[1]
