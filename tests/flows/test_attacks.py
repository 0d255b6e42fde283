"""The short form of `tests/attacks.py`: beside every attack honest deliveries are stored and clients called back.

Outside CI there is one attack by each kind of attacker. Each defence has tests of its own: see SECURITY.md.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests import attacks
from tests.attackers import ATTACKS

OF_EACH_KIND = {holds: name for name, (holds, _) in ATTACKS.items()}.values()
CHOSEN = [*ATTACKS] if "CI" in os.environ else [*OF_EACH_KIND]


def test_honest_traffic_continues_beside_each_attack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An honest delivery without a 200 ends it, and so does a callback that does not come. Durations are for people."""
    only = [word for name in CHOSEN for word in ("--only", name)]
    monkeypatch.setattr(sys, "argv", ["attacks", "--seconds", "0.3", "--rate", "10", "--smoke", *only])
    attacks.main()
    printed = capsys.readouterr().out
    assert [name for name in CHOSEN if f"{name}\n   attack" not in printed] == []
