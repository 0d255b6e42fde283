"""Whether the provider may have accepted the create of a failed task: it has named its id, the task was silent for its
result lifetime, or the create ended here before it was known whether it arrived.

Such a create may have been charged, so nothing sends it again. A callback alone is no proof, because a refused create's
URL may be known to others. It causes a read, and until that is made the create is not sent again either.
"""

from __future__ import annotations

from sqlalchemy import and_, func, or_
from sqlmodel import Session, col, select

from storage.rows.models import Callback, Task
from storage.rows.task_conditions import DISMISSED
from storage.states import CallbackState

# The error of an accepted task that no report ended.
NEVER_REPORTED = "never_reported"
# In the errors of creates that ended here. Such a create may have arrived if it was sent.
ENDED_ITS_WORKER, NO_ANSWER = "ended its worker", "there was no answer whether it arrived"

_ERROR = func.coalesce(Task.error, "")
_IS_IN_DOUBT = or_(
    _ERROR.startswith(DISMISSED, autoescape=True),
    _ERROR.startswith(ENDED_ITS_WORKER, autoescape=True),
    _ERROR.contains(NO_ANSWER, autoescape=True),
)
# No answer of the provider ended it, so a read may still find it.
ENDED_WITHOUT_ANSWER = or_(_ERROR == NEVER_REPORTED, and_(col(Task.sent_at).is_not(None), _IS_IN_DOUBT))
WAS_ACCEPTED = or_(col(Task.provider_task_id).is_not(None), ENDED_WITHOUT_ANSWER)


def may_prove_accepted(session: Session, task: Task) -> bool:
    """Whether a read or a delivery waits that may still show that the provider accepted this create."""
    waits = select(Callback.id).where(Callback.task_id == task.id, Callback.state == CallbackState.RECEIVED)
    return task.step is not None or session.exec(waits.limit(1)).first() is not None


def was_accepted(task: Task) -> bool:
    error = task.error or ""
    is_in_doubt = error.startswith((DISMISSED, ENDED_ITS_WORKER)) or NO_ANSWER in error
    return task.provider_task_id is not None or error == NEVER_REPORTED or (task.sent_at is not None and is_in_doubt)
