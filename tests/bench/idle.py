"""Row 17: the cost of an idle `receiver serve` with eight workers on PostgreSQL."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

from tests.bench import stage
from tests.bench.table import Sample
from tests.harness import wait_until

WORKERS, SMALL_WORKERS = 8, 1
# By then the pools have shrunk and the checks of the start are over.
SETTLE_SECONDS, SECONDS = 20.0, 40.0
SMALL_SETTLE_SECONDS, SMALL_SECONDS = 0.0, 1.0
TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = 'bench'"
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'bench'"
# A figure that may be zero in the short form.
LEAST = 0.001


class Idle:
    """The figures of four rows. The first row makes the run for all of them."""

    def __init__(self) -> None:
        self._found: dict[str, float] = {}

    def figure(self, name: str, goal: float) -> Callable[[bool], Sample]:
        def measure(small: bool) -> Sample:
            if name not in self._found:
                self._found = _measured(small)
            found = max(self._found.pop(name), LEAST)
            return Sample(found, goal, value=found)

        return measure


def _measured(small: bool) -> dict[str, float]:
    """Transactions a second, the most connections of all, the workers' CPU seconds a minute, and the own MB of the
    largest.
    """
    count = SMALL_WORKERS if small else WORKERS
    settle, seconds = (SMALL_SETTLE_SECONDS, SMALL_SECONDS) if small else (SETTLE_SECONDS, SECONDS)
    with stage.folder() as place, stage.seaweed(place) as store, stage.database("postgresql", place) as url:
        with stage.served(stage.environment(url, **store), place, workers=count):
            ids = _process_ids(url, count)
            time.sleep(settle)
            with psycopg.connect(url.replace("/bench", "/postgres"), autocommit=True) as looking:

                def ask(statement: str) -> int:
                    found = looking.execute(statement).fetchone()
                    assert found is not None
                    return int(found[0])

                before, cpu, started = ask(TRANSACTIONS), sum(map(stage.cpu_seconds, ids)), time.monotonic()
                connections = [ask(CONNECTIONS)]
                while time.monotonic() < started + seconds:
                    time.sleep(1)
                    connections.append(ask(CONNECTIONS))
                passed = time.monotonic() - started
                return {
                    "transactions": (ask(TRANSACTIONS) - before) / passed,
                    "connections": max(connections),
                    "cpu": (sum(map(stage.cpu_seconds, ids)) - cpu) / passed * 60,
                    "memory": max(map(_own_megabytes, ids)),
                }


def _process_ids(url: str, count: int) -> list[int]:
    """The process ids of the workers, once all are registered."""
    with psycopg.connect(url, autocommit=True) as looking:
        found: list[tuple[int]] = wait_until(
            lambda: len(rows := looking.execute("SELECT pid FROM worker").fetchall()) == count and rows,
            seconds=stage.START_SECONDS,
        )
        return [process_id for (process_id,) in found]


def _own_megabytes(process_id: int) -> float:
    """Memory of the process that it shares with no other."""
    lines = Path(f"/proc/{process_id}/smaps_rollup").read_text()
    return sum(int(kilobytes) for kilobytes in re.findall(r"Private_\w+: +(\d+) kB", lines)) / 1024
