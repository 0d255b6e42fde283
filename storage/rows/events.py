"""Facts, written in the transaction that made them true. Prose for people is made where it is shown."""

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

from storage.rows.database import db_now
from storage.rows.models import Asset, Counter, Event, Task

# Counts the numbers given; `storage.operations.outbox` gives them.
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


_FACT = insert(Event.__table__).values(  # type: ignore[attr-defined]
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
    """Write one fact; it becomes true when the caller's transaction commits."""
    # Not through `run`: what the session has changed of other rows need not be written before a fact.
    values = {"task_id": task_id, "name": name.value, "data": with_person(data or {})}
    session.connection().execute(_FACT, values)


def file_facts(asset: Asset) -> dict[str, Any]:
    """What an event says of an archived file: enough to fetch and to verify it. `original`: of a watermarked copy."""
    facts = {name: getattr(asset, name) for name in ("kind", "index", "key", "sha256", "size", "media_type")}
    return {**facts, "original": asset.original} if asset.original else facts


def of_task(session: Session, task_id: uuid.UUID) -> list[Event]:
    """The task's facts, oldest first."""
    return list(session.exec(select(Event).where(Event.task_id == task_id).order_by(col(Event.id))))


def after(
    session: Session, seq: int, limit: int, names: Collection[str] | None = None
) -> list[tuple[Event, str | None]]:
    """The next facts in the order of their numbers, each with its task's external id. `names`: only these.

    A fact has its number a moment after its commit, given by a worker; then no reader who goes by numbers misses it.
    """
    found = select(Event, Task.external_task_id).outerjoin(Task, col(Task.id) == col(Event.task_id))
    found = found.where(col(Event.seq) > seq)
    if names is not None:
        found = found.where(col(Event.name).in_(names))
    return [(event, external_id) for event, external_id in session.exec(found.order_by(col(Event.seq)).limit(limit))]


def newest_seq(session: Session) -> int:
    """The highest number given so far, 0 for none: also where its event has been forgotten since."""
    return session.exec(select(Counter.value).where(Counter.name == COUNTER)).one_or_none() or 0


def names_matching(patterns: Iterable[str]) -> frozenset[EventName]:
    """The names that patterns as `task.*` choose; no pattern = all. Raises ValueError for one that chooses none."""
    chosen: set[EventName] = set()
    for pattern in patterns:
        matching = {name for name in EventName if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"no event is called {pattern[:40]!r}; there are {', '.join(EventName)}")
        chosen |= matching
    return frozenset(chosen or EventName)
