"""PostgreSQL's plans in tests do not depend on earlier contents of the database or on its statistics."""

from __future__ import annotations

import pytest
from sqlmodel import select

from storage.database.sessions import Database
from storage.rows.models import Task
from tests.plans import plans
from tests.rows import new_task


def fill(database: Database, tasks: int) -> Task:
    with database.write() as session:
        return [new_task(session) for _ in range(tasks)][-1]


@pytest.mark.parametrize("count", ["ANALYZE", "SELECT 1"])
@pytest.mark.parametrize("earlier", [0, 50])
@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_row_is_found_by_its_own_index(database: Database, earlier: int, count: str) -> None:
    task = fill(database, earlier + 1)
    with database.autocommit_writer() as connection:
        connection.exec_driver_sql(count)
    assert "task_pkey" in plans(database, lambda session: session.get_one(Task, task.id))


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_plan_of_an_empty_table_is_refused(database: Database) -> None:
    with pytest.raises(AssertionError, match="index of task needs a row"):
        plans(database, lambda session: session.exec(select(Task)).all())
