"""Conditions on tasks that several rooms use: whether a task is over, and whether a person dismissed it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import and_, func
from sqlmodel import col

from storage import states
from storage.rows.models import Task
from storage.states import ArchiveState

# The note of a dismissed task and the error of its files start with this. `retry --all-failed` skips them.
DISMISSED = "dismissed: "

IS_OVER = and_(
    col(Task.due_at).is_(None), col(Task.state).in_(states.TERMINAL), col(Task.archive) != ArchiveState.ARCHIVING
)


def is_dismissed(task: Task) -> bool:
    return (task.note or "").startswith(DISMISSED)


def not_dismissed(column: Any) -> Any:
    """The condition that a task's note, or a file's error, was not written by `receiver dismiss`."""
    return func.coalesce(column, "").not_like(f"{DISMISSED}%")
