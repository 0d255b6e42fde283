"""The benchmarks run. Their figures are for people, on an idle machine."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from receiver.local_store.seaweed import Seaweed
from tests.bench import __main__ as bench
from tests.bench import consoles, stage
from tests.bench.stage import here
from tests.forked import Forked
from tests.postgres import MigratedDatabases, Postgres

SECONDS = 240


NAMES = [row.name for row in bench.ROWS]
# Groups of about equal length. A row that shows figures of another's run is with it; 5b runs if its program is
# installed.
PARTS = ["1", "4 6 9", "7 16", "15 15b", "17a 17b 17c 17d"]
# Other references, sizes, databases, numbers of workers, paces and distances.
PARTS_IN_CI = ["1f 2 2f 3 3f", "4f 5 5f 5b 6b 6bf 6f 8", "10 11 11f 14", "12a 13"]
IN_CI = "CI" in os.environ
BY_COMMAND = ["12b"]


def test_every_benchmark_row_is_tested() -> None:
    assert sorted([*" ".join(PARTS + PARTS_IN_CI).split(), *BY_COMMAND]) == sorted({*NAMES, "5b"})


@pytest.fixture
def lent(
    seaweed: Seaweed,
    postgres: Postgres,
    migrated_databases: MigratedDatabases,
    migrated_sqlite: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "lent", stage.Lent(seaweed, postgres, migrated_sqlite, migrated_databases.template))


def options(names: list[str], figures: Path) -> list[str]:
    return ["--smoke", "--rows", ",".join(names), "--json", str(figures)]


def check(names: list[str], figures: Path, printed: str) -> None:
    rows = json.loads(figures.read_text())
    assert [row["row"] for row in rows] == names
    assert all(row["figure"]["median"] > 0 and row["title"] in printed for row in rows)


@pytest.mark.usefixtures("lent")
@pytest.mark.parametrize(
    "names",
    [[name for name in NAMES if name in part.split()] for part in PARTS + PARTS_IN_CI * IN_CI],
    ids=",".join,
)
def test_every_row_is_measured_in_its_small_form(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *options(names, tmp_path / "figures.json")])
    bench.main()
    check(names, tmp_path / "figures.json", capsys.readouterr().out)


def test_the_bench_command_prints_figures(tmp_path: Path) -> None:
    words, out = options(BY_COMMAND, tmp_path / "figures.json"), tmp_path / "out"
    process = Forked(tuple(words), here(), tmp_path, out=out, module="tests.bench")
    assert process.wait(SECONDS) == 0, out.read_text()
    check(BY_COMMAND, tmp_path / "figures.json", out.read_text())


@pytest.mark.skipif(not IN_CI, reason="a benchmark of its own, in CI")
@pytest.mark.usefixtures("lent")
def test_acknowledgements_beside_live_consoles_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["consoles", "--smoke"])
    consoles.main()
    printed = capsys.readouterr().out
    ratios = re.findall(r"consoles: x ([0-9.]+) ", printed)
    assert [float(each) > 0 for each in ratios] == [True] * 6, printed


def window(waits: list[float], *, beside: bool = False) -> consoles.Window:
    return consoles.Window(beside, 0.0, 10.0, waits=[(1.0, each) for each in waits])


def test_spread_is_the_ratio_of_two_halves_of_the_windows() -> None:
    same = [window([0.01] * 200) for _ in range(4)]
    assert "x 1.000 to 1.000" in consoles.spread(same, consoles.pooled_p99)
    assert "x 0.500 to 2.000" in consoles.spread([*same[:3], window([0.02] * 200)], consoles.pooled_p99)


def test_window_keeps_the_waits_that_were_due_in_it() -> None:
    one = consoles.Window(True, 2.0, 4.0)
    one.take({"dues": [1.9, 2.0, 3.9, 4.0], "waits": [1.0, 2.0, 3.0, 4.0]})
    assert [wait for _, wait in one.waits] == [2.0, 3.0] and consoles.rate_of([one]) == 1.0


def test_seconds_of_live_updates_alone_are_taken_from_the_windows_with_consoles() -> None:
    without = consoles.Window(False, 0.0, 60.0, waits=[(float(due), 0.01) for due in range(60)])
    beside = consoles.Window(True, 0.0, 60.0, told=[30.0], waits=[(float(due), 0.5) for due in range(60)])
    assert consoles.spliced([without], [beside], [beside]) == 0.5
    early = consoles.Window(True, 0.0, 60.0, told=[30.0], waits=[(float(due), 0.5) for due in range(29)])
    assert consoles.spliced([without], [early], [early]) == 0.01


def test_six_seconds_of_live_updates_stand_beside_those_without_consoles(capsys: pytest.CaptureFixture[str]) -> None:
    waits = [(due / 10, 0.01) for due in range(600)]
    slow = [(due, 0.03 if 29 <= due < 35 else wait) for due, wait in waits]
    without = [consoles.Window(False, 0.0, 60.0, waits=waits) for _ in range(2)]
    beside = [consoles.Window(True, 0.0, 60.0, told=[30.0], waits=slow) for _ in range(2)]
    consoles.compare_updates([*without, *beside])
    printed = capsys.readouterr().out
    assert "of 2 live updates: median 30.00 ms" in printed and "of 20 without consoles: median 10.00 ms" in printed
    assert "windows with consoles: x 3.000 (other windows without: x 1.000 to 1.000)" in printed
