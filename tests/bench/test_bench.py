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
# About equally long. A row that tells of another's run is with it; 5b is there where its program is.
PARTS = ["1 1f 2", "2f 3 3f", "4 4f 6 6f 9 12a 12b", "5 5f 5b 6b 6bf 8", "7 11f 16", "10 11 14", "13 15 15b",
         "17a 17b 17c 17d"]  # fmt: skip


def test_no_row_is_left_out() -> None:
    assert sorted(" ".join(PARTS).split()) == sorted({*NAMES, "5b"})


@pytest.mark.parametrize("names", [[name for name in NAMES if name in part.split()] for part in PARTS], ids=",".join)
def test_every_row_is_measured_in_its_small_form(names: list[str], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "--smoke", "--rows", ",".join(names), "--json", str(figures)]
    done = subprocess.run(command, env=here(), cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())
    assert [row["row"] for row in rows] == names
    assert all(row["figure"]["median"] > 0 and row["title"] in done.stdout for row in rows)
