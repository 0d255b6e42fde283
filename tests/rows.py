"""New rows for tests, and rows as they are stored."""

from __future__ import annotations

import uuid
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import inspect, text
from sqlmodel import Session, SQLModel, select

from storage.database.sessions import Database
from storage.rows import events, tasks
from storage.rows.models import Asset, Task
from storage.states import Step
from tests.harness import wait_until

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def new_task(session: Session, **values: Any) -> Task:
    """A task that is due for its create."""
    start = {"external_task_id": uuid.uuid4().hex, "provider": "kling", "step": Step.CREATE, "due_at": LONG_AGO}
    task = Task(**{**start, "created_at": LONG_AGO, **values})
    assert tasks.insert_new(session, task)
    return task


def new_asset(session: Session, task: Task, index: int, **values: Any) -> Asset:
    """A picture that is due."""
    start = {"id": uuid.uuid4(), "kind": "image", "source_url": f"https://a/{index}", "due_at": LONG_AGO}
    asset = Asset(**{**start, "task_id": task.id, "index": index, "created_at": LONG_AGO, **values})
    session.add(asset)
    session.flush()
    return asset


def new_assets(database: Database, count: int, **values: Any) -> list[Asset]:
    """Pictures of one new task, due, soonest to expire first."""
    with database.write() as session:
        task = new_task(session, due_at=None)
        expiries = [LONG_AGO + timedelta(days=index) for index in range(count)]
        return [new_asset(session, task, index, files_expire_at=expiries[index], **values) for index in range(count)]


def stored(database: Database, row: SQLModel) -> dict[str, Any]:
    """The row as another connection sees it now."""
    model: Any = type(row)
    with database.read() as session:
        found = session.exec(select(model).where(model.id == row.id)).one()  # type: ignore[attr-defined]
        return {column.key: getattr(found, column.key) for column in inspect(model).columns}


def event_names(database: Database, task: Task) -> list[str]:
    with database.read() as session:
        return [event.name for event in events.of_task(session, task.id)]


def is_any_blocked(database: Database) -> bool:
    """Whether a transaction waits for another's lock, on PostgreSQL."""
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name AND wait_event_type = 'Lock'")
    with database.read() as session:
        return bool(session.execute(waiting, {"name": database.url.database}).scalar_one())


def wait_until_blocked(database: Database, other: Future[Any]) -> None:
    """Wait until the other thread waits for our transaction, or is done (which may be the fault under test).

    On SQLite it waits at its first statement, which cannot be observed.
    """
    if not database.is_sqlite:
        wait_until(lambda: other.done() or is_any_blocked(database))
