"""The short form of the fuzzer: every request is answered in order, and every delivery ends in a named state."""

from __future__ import annotations

import asyncio
import random

import pytest

from receiver.app.wiring import Parts
from tests import fuzz

SETTLED = {"applied", "unmatched", "unreadable", "rejected"}


@pytest.mark.databases("postgresql")  # which refuses more texts than SQLite
def test_hostile_bodies_end_in_a_named_state(parts: Parts) -> None:
    answers = asyncio.run(fuzz.send(parts, random.Random(20_261_123), 300))
    assert set(answers) <= {200, 404, 413, 503}
    assert answers[200] > 150
    ends = fuzz.drain(parts)
    assert ends.pop("retried") == 0
    assert set(ends) <= SETTLED
    assert {"applied", "rejected", "unreadable"} <= set(ends)


def test_fuzzer_reaches_every_state() -> None:
    grown = list(fuzz.bodies(random.Random(1), 2_000))
    assert len(set(grown)) > 1_500
    assert any(b"\\u0000" in body for body in grown)
    assert any(b"\\ud800" in body for body in grown)
