"""Losses that an operator has accepted: earlier manifests that are gone for good, each with its digest and the reason.

    dismiss --object ──▶ accepted: a note of audit and export ──▶ ended: an audit found the object and verified it,
                                                                  or the task's archive ended with this manifest

Both ends are acts on the task, beside those of the console: `prune` keeps them, no sink and no reader gets them.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import and_
from sqlmodel import Session, col, func, select, text

from storage.rows.events import PERSON_ACTED, EventName, record_act
from storage.rows.models import Event
from storage.states import RARE_EVENT

LOSS_ACCEPTED, LOSS_ENDED = "accept loss", "end loss"
_ACTION = func.coalesce(col(Event.data)["action"].as_string(), "")
# Of the acts that a prune keeps.
IS_LOSS_ACT = and_(col(Event.name) == PERSON_ACTED, _ACTION.in_((LOSS_ACCEPTED, LOSS_ENDED)))
_ENDS_AN_ARCHIVE = (EventName.TASK_ARCHIVED, EventName.TASK_INCOMPLETE)


@dataclass(frozen=True)
class Loss:
    """`digest`: of the lost manifest, as the next one names it; None if that one does not or is lost too."""

    key: str
    digest: str | None
    reason: str
    at: datetime

    @property
    def detail(self) -> str:
        return f"there is no such object; accepted on {self.at:%Y-%m-%d}: {self.reason}"


def record_accepted(session: Session, task_id: uuid.UUID, key: str, digest: str | None, reason: str) -> None:
    """Store that the loss of this object is accepted. The caller owns the transaction and has checked the loss."""
    record_act(session, "receiver dismiss", LOSS_ACCEPTED, key, [task_id], key=key, digest=digest, reason=reason)


def record_ended(session: Session, task_id: uuid.UUID, key: str) -> None:
    """Store that the object is there again, so that another loss of it is a fault."""
    record_act(session, "receiver audit", LOSS_ENDED, key, [task_id], key=key)


def accepted_of(session: Session, task_id: uuid.UUID) -> dict[str, Loss]:
    """The accepted losses of a task that have not ended, by key."""
    of_task = select(Event).where(Event.task_id == task_id).order_by(col(Event.id))
    acts = session.exec(of_task.where(IS_LOSS_ACT)).all()
    losses: dict[str, Loss] = {}
    ends = session.exec(of_task.where(col(Event.name).in_(_ENDS_AN_ARCHIVE))) if acts else ()
    for fact in sorted((*acts, *ends), key=lambda each: each.id or 0):
        if fact.data.get("action") == LOSS_ACCEPTED:
            losses[fact.data["key"]] = Loss(fact.data["key"], fact.data["digest"], fact.data["reason"], fact.at)
        else:
            losses.pop(fact.data.get("key") or fact.data.get("manifest") or "", None)
    return losses


def tasks_with_losses(session: Session) -> set[uuid.UUID]:
    """Ids of all tasks of which a loss was ever accepted, from the index of rare events."""
    return {each for each in session.exec(select(Event.task_id).where(text(RARE_EVENT), IS_LOSS_ACT)) if each}
