"""Whether the provider accepted a task's create: it has named its id, or has called back since this request was made.

Such a create may have been charged, so nothing sends it again.
"""

from __future__ import annotations

from sqlalchemy import and_, or_
from sqlmodel import col

from storage.rows.models import Task

WAS_ACCEPTED = or_(col(Task.provider_task_id).is_not(None), col(Task.called_back_at) >= Task.created_at)
WAS_NOT_ACCEPTED = and_(
    col(Task.provider_task_id).is_(None),
    or_(col(Task.called_back_at).is_(None), col(Task.called_back_at) < Task.created_at),
)


def was_accepted(task: Task) -> bool:
    was_called_back = task.called_back_at is not None and task.called_back_at >= task.created_at
    return task.provider_task_id is not None or was_called_back
