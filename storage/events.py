"""Facts, written in the transaction that made them true. Prose for people is made where it is shown."""

from __future__ import annotations

import uuid
from enum import StrEnum
from typing import Any

from sqlalchemy import insert
from sqlmodel import Session, col, select

from storage.database import clock
from storage.models import Event


class EventName(StrEnum):
    TASK_CREATED = "task.created"
    TASK_SUBMITTED = "task.submitted"
    TASK_PROCESSING = "task.processing"
    TASK_SUCCEEDED = "task.succeeded"
    TASK_FAILED = "task.failed"
    TASK_CONTRADICTED = "task.contradicted"
    TASK_DEADLINE_NEAR = "task.deadline_near"
    TASK_ARCHIVED = "task.archived"
    TASK_INCOMPLETE = "task.incomplete"
    ASSET_ARCHIVED = "asset.archived"
    ASSET_FAILED = "asset.failed"
    CALLBACK_REJECTED = "callback.rejected"
    CALLBACK_UNMATCHED = "callback.unmatched"


def record(session: Session, name: EventName, task_id: uuid.UUID | None, data: dict[str, Any] | None = None) -> None:
    """Write one fact; it becomes true when the caller's transaction commits."""
    row = {"task_id": task_id, "name": name.value, "at": clock(), "data": data or {}}
    session.execute(insert(Event).values(row))


def of_task(session: Session, task_id: uuid.UUID) -> list[Event]:
    """The task's facts, oldest first."""
    return list(session.exec(select(Event).where(Event.task_id == task_id).order_by(col(Event.id))))
