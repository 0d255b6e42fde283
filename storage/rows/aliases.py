"""Aliases: every id that the provider, or a gateway in front of it, uses for a task. Callers own the transaction."""

from __future__ import annotations

import uuid

import sqlalchemy
from sqlalchemy import Connection, bindparam
from sqlmodel import Session

from storage.database.prepared import execute
from storage.database.sessions import INSERTS
from storage.rows.deliveries import rematch
from storage.rows.models import TaskAlias, TaskColumns

_ALIASES = TaskAlias.__table__.c  # type: ignore[attr-defined]
_OWNER = sqlalchemy.select(_ALIASES.task_id)
_OWNER = _OWNER.where(
    _ALIASES.provider == bindparam("by"), _ALIASES.provider_task_id == bindparam("wanted"), ~_ALIASES.unsigned
)


def by_provider_id(session: Session, provider: str, provider_task_id: str) -> uuid.UUID | None:
    """Our task for which the provider, or a gateway in front of it, uses this id."""
    owners = execute(session, _OWNER, {"by": provider, "wanted": provider_task_id}).rows
    return owners[0].task_id if owners else None


_ALIASES_OF = sqlalchemy.select(_ALIASES.provider_task_id).where(_ALIASES.task_id == bindparam("of"))
_ALIASES_OF = _ALIASES_OF.order_by(_ALIASES.provider_task_id)


def aliases_of(place: Session | Connection, task_id: uuid.UUID) -> list[str]:
    """Every id that the provider has used for the task."""
    return [row.provider_task_id for row in execute(place, _ALIASES_OF, {"of": task_id}).rows]


_INSERT_ALIAS = {name: insert(TaskAlias.__table__) for name, insert in INSERTS.items()}  # type: ignore[attr-defined]
_NEW_ALIAS = {
    name: statement.on_conflict_do_update(
        index_elements=["provider", "provider_task_id"],
        set_={"task_id": statement.excluded.task_id, "unsigned": False},
        where=_ALIASES.unsigned,
    ).returning(_ALIASES.task_id)
    for name, statement in _INSERT_ALIAS.items()
}


def note_alias(session: Session, task: TaskColumns, provider_task_id: str) -> None:
    """Store an id that the provider uses for the task. An id of another task stays with that task.

    Unmatched deliveries under a new id become due.
    """
    values = {"provider": task.provider, "provider_task_id": provider_task_id, "task_id": task.id, "unsigned": False}
    if execute(session, _NEW_ALIAS[session.get_bind().dialect.name], values).rows:
        rematch(session, task.id, task.provider, provider_task_id=provider_task_id)
