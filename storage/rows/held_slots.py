"""The slot columns of one task's row: what it holds of its account, given back, and the note that it fell silent.

Whose turn it is decides `storage.accounts.slots`; the apply step gives slots back when a task ends.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import case
from sqlmodel import col

from storage.rows.models import Task

SILENT = "silent for 24 h: its slots were given back"


def give_back(task: Task) -> None:
    """Free what the locked task holds or waits for, and clear the note that it was silent."""
    task.slots, task.queued_at = 0, None
    heard_of(task)


def heard_of(task: Task) -> None:
    """Clear the locked task's note that it was silent."""
    if _is_silent(task.note):
        task.note = None


def keep_silent(task: Task) -> None:
    """Clear the locked task's note, except that it gave its slots back."""
    task.note = SILENT if _is_silent(task.note) else None


def note_beside(note: str) -> Any:
    """`note` as a value for a task's row, appended to the note that it gave its slots back where that is set."""
    return case((col(Task.note).startswith(SILENT), f"{SILENT}; {note}"), else_=note)


def _is_silent(note: str | None) -> bool:
    return (note or "").startswith(SILENT)
