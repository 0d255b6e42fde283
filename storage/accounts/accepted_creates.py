"""Whether the provider accepted a task's create: it has named its id, or the task was silent for its result lifetime.

Such a create may have been charged, so nothing sends it again. A callback alone is no sign, because a refused create's
URL may be known to others.
"""

from __future__ import annotations

from sqlalchemy import func, or_
from sqlmodel import col

from storage.rows.models import Task

# The error of an accepted task that no report ended.
NEVER_REPORTED = "never_reported"

_IS_SILENT = func.coalesce(Task.error, "") == NEVER_REPORTED
WAS_ACCEPTED = or_(col(Task.provider_task_id).is_not(None), _IS_SILENT)


def was_accepted(task: Task) -> bool:
    return task.provider_task_id is not None or task.error == NEVER_REPORTED
