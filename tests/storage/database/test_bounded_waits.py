"""A command waits for a limited time for a lock of another PostgreSQL session."""

from __future__ import annotations

from typing import Any

import pytest
from sqlmodel import select

from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows.models import Task

pytestmark = pytest.mark.parametrize("database_kind", ["postgresql"])


def test_a_command_gives_up_a_lock_of_another_session(database: Database, database_url: str) -> None:
    command = Database(database_url)
    command.bound_waits(0.3)
    with database.write() as stranger:
        stranger.connection().exec_driver_sql("LOCK TABLE task")
        with pytest.raises(DatabaseUnavailable, match=r"pg_blocking_pids\(\) name it"), command.read() as session:
            session.exec(select(Task)).all()
        with pytest.raises(DatabaseUnavailable, match="another session holds the lock"), command.write() as session:
            session.exec(select(Task)).all()
    with command.write() as session:
        assert session.exec(select(Task)).all() == []
    command.close()


def test_a_read_without_a_transaction_sets_nothing(database_url: str) -> None:
    """The server wrote a warning to its log for each."""
    command, said = Database(database_url), list[str]()
    command.bound_waits()
    with command.autocommit_reader() as connection:
        driver: Any = connection.connection.driver_connection
        driver.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
    with command.autocommit_reader() as connection:
        assert connection.connection.driver_connection is driver
        connection.execute(select(1))
    command.close()
    assert said == []
