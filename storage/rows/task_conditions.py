"""Conditions on task rows that several rooms ask for: whether a task is over, and whether a person dismissed it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import and_, func
from sqlmodel import col

from storage import states
from storage.rows.models import Task
from storage.states import ArchiveState

# What a dismissed task's note, and the error of its files, begin with: `retry --all-failed` leaves them alone.
DISMISSED = "dismissed: "

IS_OVER = and_(
    col(Task.due_at).is_(None), col(Task.state).in_(states.TERMINAL), col(Task.archive) != ArchiveState.ARCHIVING
)


def is_dismissed(task: Task) -> bool:
    return (task.note or "").startswith(DISMISSED)


def not_dismissed(column: Any) -> Any:
    """The condition that a task's note, or a file's error, is not `dismiss`'s."""
    return func.coalesce(column, "").not_like(f"{DISMISSED}%")
