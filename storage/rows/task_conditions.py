"""Conditions on tasks that several rooms use: whether a task is over, and whether a person dismissed it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import and_, func, literal_column, select, text
from sqlmodel import col

from storage import states
from storage.rows.models import Asset, Task, TaskColumns
from storage.states import PARKED, ArchiveState

# The note of a dismissed task and the error of its files start with this. `retry --all-failed` skips them.
DISMISSED = "dismissed: "

# Some of its files came unusable and are still tried, so its archive may change, even if it is reported as incomplete.
HAS_UNUSABLE = col(Task.id).in_(select(col(Asset.task_id)).where(col(Asset.unusable_since).is_not(None)))

IS_OVER = and_(
    col(Task.due_at).is_(None),
    col(Task.state).in_(states.TERMINAL),
    col(Task.archive) != ArchiveState.ARCHIVING,
    ~HAS_UNUSABLE,
)


# The task waits for a person: neither due nor queued, and not at its end. SQLite needs the exact text of the index
# `task_parked`.
IS_PARKED: Any = text(PARKED)


def is_dismissed(task: TaskColumns) -> bool:
    return (task.note or "").startswith(DISMISSED)


def not_dismissed(column: Any) -> Any:
    """The condition that `receiver dismiss` did not write a note or a file's error, as partial indexes say it."""
    beginning = func.substr(column, literal_column("1"), literal_column(f"{len(DISMISSED)}"))
    return func.coalesce(beginning, literal_column("''")) != literal_column(f"'{DISMISSED}'")
