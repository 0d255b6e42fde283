"""The benchmarks run. What they measure is for people to read, on a machine that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.__main__ import ROWS
from tests.bench.stage import here

SECONDS = 240


NAMES = [row.name for row in ROWS]


@pytest.mark.parametrize("names", [NAMES[:7], NAMES[7:12], NAMES[12:]], ids=",".join)
def test_every_row_is_measured_in_its_small_form(names: list[str], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "--smoke", "--rows", ",".join(names), "--json", str(figures)]
    done = subprocess.run(command, env=here(), cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())
    assert [row["row"] for row in rows] == names
    assert all(row["figure"]["median"] > 0 and row["title"] in done.stdout for row in rows)
