"""Statements that are run by the driver itself."""

from __future__ import annotations

from typing import Any

import sqlalchemy
from sqlalchemy import bindparam, event, literal

from storage.database import prepared
from storage.database.sessions import Database
from storage.rows.models import Task
from storage.states import Step
from tests.rows import new_task

TASKS = Task.__table__.c  # type: ignore[attr-defined]


def test_constants_and_parameters_of_a_statement_arrive_as_they_are(database: Database) -> None:
    constants = ["it's ?", "a ' OR 1=1 --", "", "ü\\ %s", 7]
    columns = [literal(value).label(f"c{place}") for place, value in enumerate(constants)]
    statement = sqlalchemy.select(*columns, bindparam("given", type_=sqlalchemy.Text).label("given"))
    with database.read() as session:
        for given in ("one", "two ? '"):
            (row,) = prepared.execute(session, statement, {"given": given}).rows
            assert list(row) == [*constants, given]


def test_constants_stand_in_the_statement_on_sqlite(database: Database) -> None:
    """SQLite plans a statement again for each value that a partial index is compared with."""
    statement = sqlalchemy.select(TASKS.id).where(TASKS.step == Step.CREATE, TASKS.id == bindparam("wanted"))
    with database.write() as session:
        task = new_task(session)
        assert len(prepared.execute(session, statement, {"wanted": task.id}).rows) == 1
    without = sqlalchemy.select(TASKS.id).where(TASKS.step == Step.CREATE)
    sent = list[tuple[str, Any]]()
    event.listen(database.writer, "before_cursor_execute", lambda *call: sent.append((call[2], call[3])))
    with database.autocommit_writer() as connection:
        assert len(prepared.execute(connection, without).rows) == 1
    sql, values = sent[-1]
    assert ("'create'" in sql and not values) == database.is_sqlite
