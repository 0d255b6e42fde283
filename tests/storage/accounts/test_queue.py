"""The queue for slots with many tasks: each admission reads only the first task of each queue."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text, update
from sqlmodel import Session, col, select

from storage.accounts.pauses import pause
from storage.accounts.slots import Slots
from storage.database.sessions import Database
from storage.errors import ModelRefused
from storage.rows.models import Task
from tests.bench.claims import PAST, fill
from tests.storage.rows.test_claim_plans import rows_read_postgresql, rows_read_sqlite

A, B = uuid.UUID(int=1), uuid.UUID(int=2)
MANY = 3_000


def queue(database: Database, count: int, **values: Any) -> None:
    fill(database, Task, count, **{"slots": -1, "queued_at": PAST, **values})


def admitted(session: Session, limit: int | None, at_most: int = 10) -> list[tuple[Any, ...]]:
    """Batch and model of the admitted tasks."""
    Slots("kling", limit).admit(session, at_most)
    found = session.execute(select(Task.batch_id, Task.model).where(col(Task.slots) > 0))
    return sorted(((batch.int if batch else 0), model) for batch, model in found)


def test_long_queue_is_not_read_to_its_end(database: Database) -> None:
    long = MANY if database.is_sqlite else 5 * MANY  # PostgreSQL prefers a scan of a table of a few megabytes
    for batch in (None, A, B):
        queue(database, long, batch_id=batch)
    with database.write() as session:
        session.execute(text("SELECT 1" if database.is_sqlite else "ANALYZE"))
    read = rows_read_sqlite if database.is_sqlite else rows_read_postgresql
    mine = Slots("kling", 20)
    for ask in (lambda: mine.reserve(session, 1), lambda: mine.admit(session, 4), lambda: mine.is_any_next(session)):
        with database.write() as session:
            assert read(session, ask) < MANY / 5
            session.rollback()


def test_batches_take_turns_however_many_wait_in_each(database: Database) -> None:
    queue(database, MANY, batch_id=A)
    queue(database, 3, batch_id=B, created_at=PAST + timedelta(days=1))
    with database.write() as session:
        assert admitted(session, 4) == [(1, None)] * 2 + [(2, None)] * 2
        assert admitted(session, 12) == [(1, None)] * 9 + [(2, None)] * 3


def test_tasks_of_a_batch_keep_their_order_across_models(database: Database) -> None:
    for line, model in enumerate(["v3", "v2", "v3", None, "v2", "v3"]):
        queue(database, 1, batch_id=A, batch_line=line, model=model)
    with database.write() as session:
        assert Slots("kling", 4).admit(session, 10) == 4
        found = session.scalars(select(Task.batch_line).where(col(Task.slots) > 0))
        assert sorted(line or 0 for line in found) == [0, 1, 2, 3]


def test_paused_model_holds_back_its_tasks_alone(database: Database) -> None:
    queue(database, MANY, model="paused", batch_id=A)
    for batch in (A, None):
        queue(database, 1, batch_id=batch, model="v3", created_at=PAST + timedelta(days=1))
    with database.write() as session:
        pause(session, "kling", "paused", ModelRefused("no", code=1, http_status=403, said="no"))
        assert admitted(session, 9) == [(0, "v3"), (1, "v3")]


@pytest.mark.parametrize("free", [1, 2])
def test_new_task_waits_behind_those_that_are_queued(database: Database, free: int) -> None:
    queue(database, 1)
    with database.write() as session:
        assert Slots("kling", free).reserve(session, 1) is (free == 2)
        session.execute(update(Task).values(queued_at=None))
        assert Slots("kling", free).reserve(session, 1)
