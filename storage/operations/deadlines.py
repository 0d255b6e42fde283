"""Be loud before files are deleted at the provider: one event and one log line a task, hours ahead."""

from __future__ import annotations

from typing import Any

import structlog
from sqlalchemy import ColumnElement, exists, literal_column, update
from sqlmodel import col, select

from storage.rows.database import Database, db_now, db_now_once
from storage.rows.events import EventName, record
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState

log = structlog.get_logger()

# Long enough for someone to be woken and mend a bucket; where files live a day only, a quarter of it.
LEAD_SECONDS = 6 * 3_600.0
LEAD_SHARE = 0.25
# So many are announced in one transaction; the rest follows with the next look.
BATCH = 500


def lead_seconds(result_lifetime_seconds: float) -> float:
    """How long before the provider deletes its files a task that still misses some is announced."""
    return min(LEAD_SECONDS, LEAD_SHARE * result_lifetime_seconds)


def is_near(seconds: float) -> ColumnElement[bool]:
    """Whether files of a task that are not kept yet are deleted within `seconds`, or were."""
    due = exists().where(col(Asset.task_id) == col(Task.id), col(Asset.state) == AssetState.DUE)
    archiving = col(Task.archive) == literal_column(f"'{ArchiveState.ARCHIVING}'")  # as the partial index says it
    soon = archiving & (col(Task.files_expire_at) < db_now_once(seconds))
    return soon & due


def announce(database: Database, seconds: float) -> int:
    """Record `task.deadline_near` for tasks that come within `seconds` of their deadline. Returns how many.

    Once per task, however many processes look at the same time.
    """
    fresh = select(Task.id).where(is_near(seconds), col(Task.deadline_near_at).is_(None)).limit(BATCH)
    with database.read() as session:
        if session.execute(fresh.limit(1)).first() is None:
            return 0
    marked: Any = update(Task).where(col(Task.id).in_(fresh), col(Task.deadline_near_at).is_(None))
    marked = marked.values(deadline_near_at=db_now()).execution_options(synchronize_session=False)
    with database.write() as session:
        tasks = session.execute(marked.returning(Task.id, Task.external_task_id, Task.files_expire_at)).all()
        for task_id, _, expires_at in tasks:
            record(session, EventName.TASK_DEADLINE_NEAR, task_id, {"files_expire_at": expires_at.isoformat()})
    for _, external_task_id, expires_at in tasks:
        log.error("task.deadline_near", task=external_task_id, files_expire_at=expires_at.isoformat())
    return len(tasks)
