"""Row 16: a claim, an admission and the checks of idle lanes with 100,000 waiting rows, and with 100."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from sqlalchemy import text
from sqlmodel import Session, col

from storage.accounts.slots import Slots
from storage.database.sessions import Database
from storage.rows import claims, migrations
from storage.rows.models import Asset, Callback, Task
from storage.states import CallbackState, Step
from tests.bench import stage
from tests.bench.claims import CLAIMED, PAST, fill, quartile
from tests.bench.table import Sample
from tests.postgres import FAST

FEW, MANY, SMALL_MANY = 100, 100_000, 500
ROUNDS, SMALL_ROUNDS, WARM_UP = 100, 5, 5
UNMATCHED = (col(Callback.state) == CallbackState.UNMATCHED,)


def _claim(session: Session) -> None:
    assert len(claims.claim(session, Asset, limit=CLAIMED, lease_seconds=60)) == CLAIMED


def _admission(session: Session) -> None:
    slots = Slots("kling", 20)
    assert not slots.reserve(session, 20)
    assert slots.admit(session, 4) == 4


def _looks(session: Session) -> None:
    """The checks of a lane with work, of one without beside it, and for rows in quarantine."""
    connection = session.connection()
    assert connection.execute(claims.any_due(Task, where=(Task.step == Step.READ,))).first()
    assert not connection.execute(claims.any_due(Callback, where=UNMATCHED)).first()
    assert not connection.execute(claims.any_due(Asset, alone=True)).first()


STEPS: dict[str, Callable[[Session], None]] = {"claim": _claim, "admission": _admission, "looks": _looks}


def prepared(url: str, count: int) -> Database:
    """A database with this many waiting rows of each kind."""
    database = Database(url)
    migrations.upgrade(database)
    fill(database, Asset, count, due_at=PAST)
    fill(database, Callback, count, due_at=PAST)
    fill(database, Task, count, due_at=PAST, step=Step.READ)
    fill(database, Task, count, step=Step.CREATE, queued_at=PAST, slots=-1)
    if not database.is_sqlite:  # the server does it by itself within a minute
        with database.write() as session:
            session.execute(text("ANALYZE"))
    return database


def slowest(small: bool) -> Sample:
    """Milliseconds of the step that grows most, on the database where it does."""
    counts = {"many": SMALL_MANY if small else MANY, "few": FEW}
    worst: list[Sample] = []
    with stage.folder() as place, ExitStack() as ending:
        for kind in ("sqlite", "postgresql"):
            url = ending.enter_context(stage.databases(kind, place, FAST))
            databases = {name: prepared(url(name), count) for name, count in counts.items()}
            for database in databases.values():
                ending.callback(database.close)
            rounds = SMALL_ROUNDS if small else ROUNDS
            worst += [_in_turns(databases, step, rounds) for step in STEPS.values()]
    return max(worst, key=lambda sample: sample.figure)


def _in_turns(databases: dict[str, Database], step: Callable[[Session], None], rounds: int) -> Sample:
    seconds: dict[str, list[float]] = {name: [] for name in databases}
    for number in range(rounds + WARM_UP):
        for name, database in databases.items():
            with database.write() as session:
                session.connection()
                started = time.perf_counter()
                step(session)
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - started)
                session.rollback()
    return Sample(quartile(seconds["many"]) * 1e3, quartile(seconds["few"]) * 1e3)
