"""The slot columns of one task: giving slots back, and the note on a task that is silent.

`storage/accounts/slots.py` decides which task gets slots. A task gives its slots back when it ends.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import case
from sqlmodel import col

from storage.rows.models import Task

SILENT = "silent for 24 h: its slots were given back"


def give_back(task: Task) -> None:
    """Give back the slots that the locked task holds or waits for, and clear its note of silence."""
    task.slots, task.queued_at = 0, None
    heard_of(task)


def heard_of(task: Task) -> None:
    """Clear the locked task's note of silence."""
    if _is_silent(task.note):
        task.note = None


def keep_silent(task: Task) -> None:
    """Clear the locked task's note, unless it is the note of silence."""
    task.note = SILENT if _is_silent(task.note) else None


def note_beside(note: str) -> Any:
    """`note` as an SQL value, behind the note of silence where the task has one."""
    return case((col(Task.note).startswith(SILENT), f"{SILENT}; {note}"), else_=note)


def _is_silent(note: str | None) -> bool:
    return (note or "").startswith(SILENT)
