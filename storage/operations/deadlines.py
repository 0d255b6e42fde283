"""Alerts hours before the provider deletes files that are not archived: one event and one log line per task."""

from __future__ import annotations

from typing import Any

import structlog
from sqlalchemy import ColumnElement, exists, literal_column, update
from sqlmodel import col, select

from storage.database.clock import db_now, db_now_once
from storage.database.sessions import Database
from storage.rows.events import EventName, record
from storage.rows.models import Asset, Task
from storage.rows.task_conditions import HAS_UNUSABLE
from storage.states import ArchiveState, AssetState

log = structlog.get_logger()

# Enough for an operator to repair the bucket. Where the provider keeps files for one day only, a quarter of that day.
LEAD_SECONDS = 6 * 3_600.0
LEAD_SHARE = 0.25
# Tasks per transaction. The next run announces the rest.
BATCH = 500


def lead_seconds(result_lifetime_seconds: float) -> float:
    """How long before the provider deletes the files of an incomplete task the alert is sent."""
    return min(LEAD_SECONDS, LEAD_SHARE * result_lifetime_seconds)


def near(seconds: float) -> tuple[ColumnElement[bool], ...]:
    """SQL conditions, one of which holds: the provider deletes files that are not archived within `seconds`.

    Two, because each has an index of its own: archives under way, and incomplete ones that are still tried.
    """
    due = exists().where(col(Asset.task_id) == col(Task.id), col(Asset.state) == AssetState.DUE)
    archiving = col(Task.archive) == literal_column(f"'{ArchiveState.ARCHIVING}'")  # literal, as in the partial index
    soon = col(Task.files_expire_at) < db_now_once(seconds)
    incomplete = col(Task.archive) == literal_column(f"'{ArchiveState.INCOMPLETE}'")
    return archiving & soon & due, incomplete & soon & HAS_UNUSABLE


def announce(database: Database, seconds: float) -> int:
    """Record `task.deadline_near` for tasks within `seconds` of their deadline. Returns how many.

    Once per task, also with several processes at the same time.
    """
    return sum(_announce(database, each) for each in near(seconds))


def _announce(database: Database, is_near: ColumnElement[bool]) -> int:
    fresh = select(Task.id).where(is_near, col(Task.deadline_near_at).is_(None)).limit(BATCH)
    with database.read() as session:
        if session.execute(fresh.limit(1)).first() is None:
            return 0
    marked: Any = update(Task).where(col(Task.id).in_(fresh), col(Task.deadline_near_at).is_(None))
    marked = marked.values(deadline_near_at=db_now()).execution_options(synchronize_session=False)
    with database.write() as session:
        tasks = session.execute(marked.returning(Task.id, Task.external_task_id, Task.files_expire_at)).all()
        for task_id, _, expires_at in tasks:
            record(session, EventName.TASK_DEADLINE_NEAR, task_id, {"files_expire_at": expires_at.isoformat()})
    for task_id, external_task_id, expires_at in tasks:
        log.error(
            "task.deadline_near", task=external_task_id, task_id=str(task_id), files_expire_at=expires_at.isoformat()
        )
    return len(tasks)
