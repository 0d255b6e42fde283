"""Row 9: rows claimed and settled in a second, with a million finished rows and beside a thousand."""

from __future__ import annotations

import time

from storage.database.sessions import Database
from tests.bench import stage
from tests.bench.claims import CLAIMED, Times, claim_once, prepared
from tests.bench.table import Sample

FEW, MANY, SMALL_MANY = 1_000, 1_000_000, 2_000
TURNS = 6


def per_second(small: bool) -> Sample:
    """Rows a second on SQLite, eight to a claim, each then settled; in turns with many rows and beside few."""
    turn_seconds = 0.05 if small else 1.5
    with stage.folder() as place, stage.databases("sqlite", place) as create:
        counts = {"many": SMALL_MANY if small else MANY, "few": FEW}
        databases = {name: prepared(create(name), "assets", "finished", count) for name, count in counts.items()}
        settled = dict.fromkeys(databases, 0)
        for _ in range(TURNS):
            for name, database in databases.items():
                settled[name] += _settled_in(database, turn_seconds)
        for database in databases.values():
            database.close()
    return Sample(*(count / (TURNS * turn_seconds) for count in settled.values()))


def _settled_in(database: Database, seconds: float) -> int:
    deadline, count, times = time.monotonic() + seconds, 0, Times()
    while time.monotonic() < deadline:
        claim_once(database, "assets", times)
        count += CLAIMED
    return count
