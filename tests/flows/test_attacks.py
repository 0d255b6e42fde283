"""The short form of `tests/attacks.py`: beside every attack honest deliveries are stored and clients called back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.attackers import ATTACKS
from tests.bench.stage import here

SECONDS = 480


def test_honest_traffic_continues_beside_each_attack(tmp_path: Path) -> None:
    """An honest delivery without a 200 ends the command. The durations are for people to read."""
    command = [sys.executable, "-m", "tests.attacks", "--seconds", "0.5", "--rate", "10", "--no-limit"]
    done = subprocess.run(command, env=here(), cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert [name for name in ATTACKS if f"{name}\n   alone" not in done.stdout] == []
    assert "did not come" not in done.stdout
