"""The short form of `tests/attacks.py`: beside every attack honest deliveries are stored and clients called back."""

from __future__ import annotations

import sys

import pytest

from tests import attacks
from tests.attackers import ATTACKS


def test_honest_traffic_continues_beside_each_attack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An honest delivery without a 200 ends it, and so does a callback that does not come. Durations are for people."""
    monkeypatch.setattr(sys, "argv", ["attacks", "--seconds", "0.3", "--rate", "10", "--smoke"])
    attacks.main()
    printed = capsys.readouterr().out
    assert [name for name in ATTACKS if f"{name}\n   attack" not in printed] == []
