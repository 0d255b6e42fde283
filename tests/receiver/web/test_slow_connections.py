"""The short form of `tests/bench/slow_connections.py`: every delivery is stored beside slow connections."""

from __future__ import annotations

import asyncio
import time

import pytest

from receiver.web import callbacks, http_protocol
from tests.bench.slow_connections import KINDS, Slow, acknowledge, dawdle
from tests.pipeline import Web, callbacks_of

SLOW = 45
RATE, SECONDS = 20, 3


async def beside(port: int) -> tuple[Slow, list[float]]:
    slow = asyncio.ensure_future(dawdle(port, SLOW, time.monotonic() + SECONDS + 2, dribble_seconds=0.2))
    waits = await acknowledge(port, RATE, SECONDS)
    return await slow, waits


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_deliveries_are_stored_while_slow_connections_are_closed(
    web: Web, parts: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 2.5)
    monkeypatch.setattr(callbacks, "BODY_SECONDS", 2.5)
    slow, waits = asyncio.run(beside(int(web.url.rpartition(":")[2])))
    assert len(waits) == RATE * SECONDS == len(callbacks_of(parts))
    assert {kind for kind, _ in slow.closed} == set(KINDS)
    assert {status for _, status in slow.closed} <= {"408", "reset"}  # a byte sent into the close resets it
    assert sum(map(len, slow.closed.values())) >= SLOW and slow.open == 0
