"""Clients that authenticate like Kling's own samples, with a JWT from access key and secret key."""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import Any

import httpx
import jwt
import pytest

from receiver.app.wiring import Parts
from receiver.gateway.api_keys import fingerprint
from tests.pipeline import Web, task_of
from tests.receiver.gateway.test_gateway import ID, KEY, ON_SQLITE, PATH, PLAIN, call, create, status_and_code

ACCESS, SECRET, NEW_SECRET = "AccessKeyOfAClient", "s" * 64, "n" * 64
OTHER_ACCESS, OTHER_SECRET = "AnotherAccessKey", "o" * 64
ENTRIES = (f"{ACCESS}:{SECRET}", f"{ACCESS}:{NEW_SECRET}", f"{OTHER_ACCESS}:{OTHER_SECRET}", KEY)


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"api_keys": ",".join(ENTRIES)}


def token(key: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """A JWT of Kling's samples; a claim of None is left out."""
    now = int(time.time())
    every = {"iss": ACCESS, "exp": now + 1_800, "nbf": now - 5, **claims}
    return jwt.encode({name: value for name, value in every.items() if value is not None}, key, algorithm=algorithm)


def coded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).decode().rstrip("=")


def forged(algorithm: str, *, is_signed: bool = True) -> str:
    """A JWT whose header names another algorithm than its signature, which is HS256 with our secret, or missing."""
    parts = ({"alg": algorithm, "typ": "JWT"}, {"iss": ACCESS, "exp": int(time.time()) + 1_800})
    text = ".".join(coded(json.dumps(part).encode()) for part in parts)
    return f"{text}.{coded(hmac.digest(SECRET.encode(), text.encode(), 'sha256')) if is_signed else ''}"


@ON_SQLITE
def test_jwt_is_accepted_like_a_key(web: Web, parts: Parts) -> None:
    soon = int(time.time()) + 4  # a client's clock that is a little ahead
    assert jwt.decode(forged("HS256"), SECRET, algorithms=["HS256"])
    assert status_and_code(create(web, {**PLAIN, "external_task_id": ID}, key=token(iat=soon))) == (200, 0)
    for shown in (token(NEW_SECRET), token(nbf=None), token(OTHER_SECRET, iss=OTHER_ACCESS), KEY, ENTRIES[0]):
        assert call(web, "GET", f"{PATH}/{ID}", key=shown).status_code == 200
    assert task_of(parts, ID).client == fingerprint(ACCESS)


@ON_SQLITE
def test_jwt_outside_its_time_is_refused_with_the_reason(web: Web) -> None:
    now = int(time.time())
    assert status_and_code(call(web, "GET", key=token(exp=now - 1))) == (401, 1004)
    assert status_and_code(call(web, "GET", key=token(nbf=now + 60))) == (401, 1003)


@ON_SQLITE
def test_a_clock_that_is_ahead_is_tolerated_for_the_beginning_alone(web: Web) -> None:
    now = int(time.time())
    assert status_and_code(call(web, "GET", key=token(nbf=now + 3))) == (200, 0)
    assert status_and_code(call(web, "GET", key=token(nbf=now + 3, exp=now - 1))) == (401, 1004)


FORGED = {
    "none": lambda: forged("none", is_signed=False),
    "none, signed": lambda: forged("none"),
    "no signature": lambda: forged("HS256", is_signed=False),
    "HS512": lambda: token(algorithm="HS512"),
    "RS256 with the secret as key": lambda: forged("RS256"),
    "ES256 with the secret as key": lambda: forged("ES256"),
    "unknown issuer": lambda: token(iss="nobody"),
    "another's secret": lambda: token(OTHER_SECRET),
    "no issuer": lambda: token(iss=None),
    "no end": lambda: token(exp=None),
    "an end that is none": lambda: jwt.encode({"iss": ACCESS, "exp": "soon"}, SECRET),
    "an end without end": lambda: jwt.encode({"iss": ACCESS, "exp": float("inf")}, SECRET),
    "signed with the access key": lambda: token(ACCESS * 2),
    "no token": lambda: "a.b.c",
    "deep": lambda: f"a.{coded(b'[' * 9_000)}.c",
    "the secret alone": lambda: SECRET,
    "the access key alone": lambda: ACCESS,
}


@ON_SQLITE
def test_a_forged_jwt_is_refused(web: Web) -> None:
    for name, forge in FORGED.items():
        assert status_and_code(call(web, "GET", key=forge())) == (401, 1002), name


@ON_SQLITE
def test_a_jwt_opens_the_stream_of_events(web: Web) -> None:
    """Only the head is read: a stream has no end."""
    for shown, status in ((token(), 200), (KEY, 200), (token("x" * 64), 401)):
        headers = {"Authorization": f"Bearer {shown}"}
        with httpx.stream("GET", f"{web.url}/events", headers=headers, timeout=10) as answer:
            assert answer.status_code == status
