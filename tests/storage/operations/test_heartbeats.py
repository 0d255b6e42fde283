"""Heartbeats: how many workers are alive."""

from __future__ import annotations

import uuid

from sqlmodel import col, update

from storage.database.clock import db_now
from storage.database.sessions import Database
from storage.operations import heartbeats
from storage.rows.models import Worker
from tests.rows import LONG_AGO


def test_heartbeat_counts_itself_and_the_others_that_are_alive(database: Database) -> None:
    first, second, _ = (heartbeats.register(database, 8) for _ in range(3))
    with database.write() as session:
        session.execute(update(Worker).where(col(Worker.id) != second).values(seen_at=LONG_AGO))
    assert heartbeats.beat(database, first) == 2
    assert heartbeats.count_alive(database) == 2
    heartbeats.unregister(database, second)
    assert heartbeats.beat(database, first) == 1


def test_heartbeat_tells_that_its_row_is_gone(database: Database) -> None:
    heartbeats.register(database, 8)
    assert heartbeats.beat(database, uuid.uuid4()) == 0
    assert heartbeats.count_alive(database) == 1


def test_worker_that_died_while_the_clock_was_ahead_is_not_alive(database: Database) -> None:
    alive, dead = heartbeats.register(database, 8), heartbeats.register(database, 8)
    with database.write() as session:
        session.get_one(Worker, dead).seen_at = db_now(86_400)  # type: ignore[assignment]
    assert heartbeats.beat(database, alive) == 1
    assert heartbeats.count_alive(database) == 1
    with database.read() as session:
        assert [worker.id for worker in heartbeats.alive(session)] == [alive]
