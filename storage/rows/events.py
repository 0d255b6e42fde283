"""Events, each written in the transaction that makes it true."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from sqlalchemy import bindparam, insert
from sqlmodel import Session, col, select

from storage.database.clock import db_now
from storage.rows.models import Asset, Counter, Event, Task

# The row of the counter from which `storage/operations/outbox.py` numbers events.
COUNTER = "event"


class EventName(StrEnum):
    TASK_CREATED = "task.created"
    TASK_SUBMITTED = "task.submitted"
    TASK_PROCESSING = "task.processing"
    TASK_SUCCEEDED = "task.succeeded"
    TASK_FAILED = "task.failed"
    TASK_CONTRADICTED = "task.contradicted"
    TASK_DEADLINE_NEAR = "task.deadline_near"
    TASK_ARCHIVED = "task.archived"
    TASK_INCOMPLETE = "task.incomplete"
    ASSET_ARCHIVED = "asset.archived"
    ASSET_FAILED = "asset.failed"
    CALLBACK_REJECTED = "callback.rejected"
    CALLBACK_UNMATCHED = "callback.unmatched"
    ACCOUNT_PAUSED = "account.paused"
    ACCOUNT_RESUMED = "account.resumed"


_INSERT = insert(Event.__table__).values(  # type: ignore[attr-defined]
    task_id=bindparam("task_id"), name=bindparam("name"), data=bindparam("data"), at=db_now()
)


# Who does what this thread does now, where it is a person at the console.
_PERSON: ContextVar[str | None] = ContextVar("person", default=None)


@contextmanager
def by(person: str) -> Iterator[None]:
    """Let every fact that is written in this block have the person's name in its data, as `by`."""
    before = _PERSON.set(person)
    try:
        yield
    finally:
        _PERSON.reset(before)


def with_person(data: dict[str, Any]) -> dict[str, Any]:
    """A fact's data, with who did it where a person did."""
    person = _PERSON.get()
    return data if person is None else {**data, "by": person}


def record(session: Session, name: EventName, task_id: uuid.UUID | None, data: dict[str, Any] | None = None) -> None:
    """Write one event. It exists once the caller's transaction commits."""
    # Not through `run`: an event needs no flush of the session's other changes.
    values = {"task_id": task_id, "name": name.value, "data": with_person(data or {})}
    session.connection().execute(_INSERT, values)


def file_facts(asset: Asset) -> dict[str, Any]:
    """An archived file as events describe it, enough to fetch and verify it. `original`: only of a watermarked copy."""
    facts = {name: getattr(asset, name) for name in ("kind", "index", "key", "sha256", "size", "media_type")}
    return {**facts, "original": asset.original} if asset.original else facts


def of_task(session: Session, task_id: uuid.UUID) -> list[Event]:
    """The task's events, oldest first."""
    return list(session.exec(select(Event).where(Event.task_id == task_id).order_by(col(Event.id))))


def after(
    session: Session, seq: int, limit: int, names: Collection[str] | None = None, *, of_client: str | None = None
) -> list[tuple[Event, str | None]]:
    """The next events by their numbers, each with its task's external id. `names`: only these; None = all.
    `of_client`: only of tasks that this client of the gateway asked for; None = of all, and of none.

    A worker numbers an event after its commit, so a reader that goes by numbers misses none.
    """
    found = select(Event, Task.external_task_id).outerjoin(Task, col(Task.id) == col(Event.task_id))
    found = found.where(col(Event.seq) > seq)
    if names is not None:
        found = found.where(col(Event.name).in_(names))
    if of_client is not None:
        found = found.where(Task.client == of_client)
    return [(event, external_id) for event, external_id in session.exec(found.order_by(col(Event.seq)).limit(limit))]


def newest_seq(session: Session) -> int:
    """The highest number so far, 0 for none. Its event may have been pruned since."""
    return session.exec(select(Counter.value).where(Counter.name == COUNTER)).one_or_none() or 0


def names_matching(patterns: Iterable[str]) -> frozenset[EventName]:
    """The names that match patterns like `task.*`; no pattern = all. Raises ValueError for one that matches none."""
    chosen: set[EventName] = set()
    for pattern in patterns:
        matching = {name for name in EventName if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"no event is called {pattern[:40]!r}; the events are {', '.join(EventName)}")
        chosen |= matching
    return frozenset(chosen or EventName)
