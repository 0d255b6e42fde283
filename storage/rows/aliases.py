"""Aliases: every id that the provider, or a gateway in front of it, uses for a task. Callers own the transaction."""

from __future__ import annotations

import uuid

import sqlalchemy
from sqlalchemy import bindparam
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session

from storage.database.prepared import execute
from storage.database.sessions import run
from storage.rows.deliveries import rematch
from storage.rows.models import Task, TaskAlias

# A gateway rewrites the provider's id once or twice. A sender with a callback URL may write any id.
MAX_UNSIGNED_ALIASES = 3

_ALIASES = TaskAlias.__table__.c  # type: ignore[attr-defined]
_OWNER = sqlalchemy.select(_ALIASES.task_id)
_OWNER = _OWNER.where(_ALIASES.provider == bindparam("by"), _ALIASES.provider_task_id == bindparam("wanted"))


def by_provider_id(session: Session, provider: str, provider_task_id: str) -> uuid.UUID | None:
    """Our task for which the provider, or a gateway in front of it, uses this id."""
    session.flush()
    owners = execute(session, _OWNER, {"by": provider, "wanted": provider_task_id}).rows
    return owners[0].task_id if owners else None


_ALIASES_OF = sqlalchemy.select(_ALIASES.provider_task_id).where(_ALIASES.task_id == bindparam("of"))
_ALIASES_OF = _ALIASES_OF.order_by(_ALIASES.provider_task_id)


def aliases_of(session: Session, task_id: uuid.UUID) -> list[str]:
    """Every id that the provider has used for the task."""
    return [row.provider_task_id for row in execute(session, _ALIASES_OF, {"of": task_id}).rows]


_INSERT_ALIAS = {
    dialect.__name__.rpartition(".")[2]: dialect.insert(TaskAlias.__table__)  # type: ignore[attr-defined]
    for dialect in (sqlite, postgresql)
}
_NEW_ALIAS = {
    name: statement.on_conflict_do_nothing().returning(_ALIASES.task_id) for name, statement in _INSERT_ALIAS.items()
}
_SURE_ALIAS = {
    name: statement.on_conflict_do_update(
        index_elements=["provider", "provider_task_id"],
        set_={"task_id": statement.excluded.task_id, "unsigned": False},
        where=_ALIASES.unsigned,
    ).returning(_ALIASES.task_id)
    for name, statement in _INSERT_ALIAS.items()
}
_UNSIGNED = sqlalchemy.select(sqlalchemy.func.count()).where(_ALIASES.task_id == bindparam("of"), _ALIASES.unsigned)


def note_alias(session: Session, task: Task, provider_task_id: str, *, unsigned: bool = False) -> None:
    """Store an id that the provider uses for the task. An id of another task stays with that task.

    `unsigned`: only an unsigned delivery names it. Three such ids are stored, and each moves to the task for which the
    provider uses it. Unmatched deliveries under a new id become due.
    """
    values = {"provider": task.provider, "provider_task_id": provider_task_id, "task_id": task.id}
    statement = (_NEW_ALIAS if unsigned else _SURE_ALIAS)[session.get_bind().dialect.name]
    session.flush()
    if not execute(session, statement, {**values, "unsigned": unsigned}).rows:
        return
    if unsigned and run(session, _UNSIGNED, {"of": task.id}).scalar_one() > MAX_UNSIGNED_ALIASES:
        mine = (_ALIASES.provider == task.provider, _ALIASES.provider_task_id == provider_task_id)
        session.execute(sqlalchemy.delete(TaskAlias).where(*mine))
        return
    rematch(session, task.id, task.provider, provider_task_id=provider_task_id)


_IS_UNSIGNED = sqlalchemy.select(_ALIASES.unsigned).where(
    _ALIASES.provider == bindparam("by"), _ALIASES.provider_task_id == bindparam("wanted")
)


def is_alias_unsigned(session: Session, provider: str, provider_task_id: str) -> bool:
    """Whether only an unsigned delivery says which task has this id."""
    return bool(run(session, _IS_UNSIGNED, {"by": provider, "wanted": provider_task_id}).scalar())
