"""Inputs of an attack or a mistake: each is answered, and none with 500."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
import pytest

from receiver.app.wiring import Parts
from tests.pipeline import Web
from tests.receiver.gateway.test_gateway import (
    CHANGES,
    KEY,
    ON_SQLITE,
    PATH,
    PLAIN,
    call,
    create,
    rows,
    status_and_code,
)

ORIGINS = [
    b"http://[",
    b"http://[::1",
    b"null",
    b"http://a b",
    b"\xff\xfe",
    b"http://x:99999999",
    b"",
    b"http://[v1.x]",
]
ENDS = ["/healthz", "/assets/x.png", "/console/login", "/console", "/events?after=99", "/callbacks/kling/x", PATH]
CORS = {**CHANGES, "cors_origins": "https://app.example.com", "console_keys": "me=" + "k" * 24}


@pytest.fixture
def changes() -> dict[str, Any]:
    return dict(CHANGES)


@pytest.mark.parametrize("name", ['""""', '"', "'", "\\", "%", "/", "$(x)", "-rf", " ", "null"])
def test_an_odd_id_makes_a_task_that_is_found_by_it(web: Web, parts: Parts, name: str) -> None:
    assert status_and_code(create(web, {**PLAIN, "external_task_id": name})) == (200, 0)
    assert [task.external_task_id for task in rows(parts)] == [name]
    assert call(web, "GET", f"{PATH}/{quote(name, safe='')}").json()["code"] == 0


@ON_SQLITE
@pytest.mark.parametrize("changes", [CORS])
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_malformed_origin_is_answered(web: Web, origin: bytes) -> None:
    headers = {b"Origin": origin, b"Access-Control-Request-Method": b"GET", b"Authorization": f"Bearer {KEY}".encode()}
    for path in ENDS:
        for method in ("HEAD", "POST", "OPTIONS"):
            answer = httpx.request(method, web.url + path, headers=headers, timeout=30)
            assert answer.status_code < 500, (method, path)
