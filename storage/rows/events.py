"""Events, each written in the transaction that makes it true."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import bindparam, func, insert, text, update
from sqlmodel import Session, col, select

from storage.database.clock import db_now
from storage.database.prepared import execute
from storage.database.sessions import insert_or_ignore, run
from storage.rows.models import Asset, Counter, Event, Task
from storage.states import FREQUENT_EVENTS, RARE_EVENT

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


# An act of a person at the console. The row is stored beside the events and never leaves the receiver.
PERSON_ACTED = "person.acted"
_IS_EVENT = col(Event.name) != PERSON_ACTED

# The events of a task that ends well. The other names are rare and have their own index.
FREQUENT = frozenset(FREQUENT_EVENTS)
# Events that one page reads: 8 ms on SQLite and 5 on PostgreSQL with 8 million. Rare ones are read from their index.
SCANNED = 5_000

_UNNUMBERED = col(Event.seq).is_(None)
_INSERT = insert(Event.__table__).values(  # type: ignore[attr-defined]
    task_id=bindparam("task_id"), name=bindparam("name"), data=bindparam("data"), at=db_now()
)


# In a session's notes: events were written.
RECORDED = "recorded"
# The person at the console on whose behalf this thread acts. None: no person.
_PERSON: ContextVar[str | None] = ContextVar("person", default=None)


@contextmanager
def by(person: str) -> Iterator[None]:
    """Add the person's name, as `by`, to the data of every event that is written in this block."""
    before = _PERSON.set(person)
    try:
        yield
    finally:
        _PERSON.reset(before)


def with_person(data: dict[str, Any]) -> dict[str, Any]:
    """The data of an event, with `by` if a person caused it."""
    person = _PERSON.get()
    return data if person is None else {**data, "by": person}


def record(session: Session, name: EventName, task_id: uuid.UUID | None, data: dict[str, Any] | None = None) -> None:
    """Write one event. It exists once the caller's transaction commits."""
    values = {"task_id": task_id, "name": name.value, "data": with_person(data or {})}
    execute(session, _INSERT, values)
    session.info[RECORDED] = True


def held_until(session: Session, task_id: uuid.UUID) -> datetime | None:
    """When the last lease would have ended that the task's dismissal took from a worker."""
    told = select(Event.data).where(Event.task_id == task_id, Event.name == EventName.TASK_INCOMPLETE)
    fact = session.exec(told.order_by(col(Event.id).desc()).limit(1)).first() or {}
    return datetime.fromisoformat(fact["held_until"]) if "held_until" in fact else None


def record_act(
    session: Session, person: str, action: str, subject: str, task_ids: Collection[uuid.UUID | None],
    *, once: Mapping[str, Any] | None = None, **data: Any,
) -> int:  # fmt: skip
    """Store what a person did to these tasks, or to something else if the id is None. Returns the last row's id.

    `data` is in the row of each task. `once`: data about all of them, in the last row alone.
    """
    facts = {"by": person, "action": action, "subject": subject, **data}
    *others, last = [{"task_id": each, "name": PERSON_ACTED, "data": facts} for each in task_ids]
    if others:
        session.execute(_INSERT, others)
    last["data"] = facts | dict(once or {})
    return int(session.execute(_INSERT.returning(col(Event.id)), [last]).scalar_one())


def acts_of(session: Session, task_id: uuid.UUID) -> list[Event]:
    """The acts of people on a task, oldest first."""
    found = select(Event).where(Event.task_id == task_id, Event.name == PERSON_ACTED)
    return list(session.exec(found.order_by(col(Event.id))))


def newest_acts(session: Session, limit: int) -> list[tuple[Event, str | None]]:
    """The latest acts of people, newest first, each with its task's external id, from the newest rare events."""
    rare = (
        select(Event.id, Event.name).where(text(RARE_EVENT)).order_by(col(Event.seq).desc()).limit(SCANNED).subquery()
    )
    numbered = select(rare.c.id).where(rare.c.name == PERSON_ACTED).limit(limit)
    fresh = select(Event.id).where(col(Event.seq).is_(None), Event.name == PERSON_ACTED).limit(limit)
    ids = [*session.execute(numbered).scalars(), *session.execute(fresh).scalars()]
    found = select(Event, Task.external_task_id).outerjoin(Task, col(Task.id) == col(Event.task_id))
    found = found.where(col(Event.id).in_(ids)).order_by(col(Event.id).desc()).limit(limit)
    return [(event, name) for event, name in session.exec(found)]


def file_facts(asset: Asset) -> dict[str, Any]:
    """An archived file as events describe it, enough to fetch and verify it. `original`: only of a watermarked copy."""
    facts = {name: getattr(asset, name) for name in ("kind", "index", "key", "sha256", "size", "media_type")}
    return {**facts, "original": asset.original} if asset.original else facts


def of_task(session: Session, task_id: uuid.UUID) -> list[Event]:
    """The task's events, oldest first."""
    return list(session.exec(select(Event).where(Event.task_id == task_id, _IS_EVENT).order_by(col(Event.id))))


def timelines(session: Session, task_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[tuple[str, datetime]]]:
    """Names and times of the events of many tasks at once, each task's oldest first."""
    found: dict[uuid.UUID, list[tuple[str, datetime]]] = {task_id: [] for task_id in task_ids}
    rows = select(Event.task_id, Event.name, Event.at).where(col(Event.task_id).in_(task_ids), _IS_EVENT)
    rows = rows.order_by(col(Event.id))
    for task_id, name, at in session.exec(rows):
        if task_id is not None:
            found[task_id].append((name, at))
    return found


def after(session: Session, seq: int, limit: int) -> list[tuple[Event, str | None]]:
    """The next events by their numbers, each with its task's external id.

    A worker numbers an event after its commit, so a reader that goes by numbers misses none.
    """
    found = select(Event, Task.external_task_id).outerjoin(Task, col(Task.id) == col(Event.task_id))
    found = found.where(col(Event.seq) > seq, _IS_EVENT).order_by(col(Event.seq)).limit(limit)
    return [(event, external_id) for event, external_id in session.exec(found)]


@dataclass(frozen=True)
class Page:
    """Some events with their tasks' external ids. `until`: all events up to this number were read."""

    events: Sequence[tuple[Event, str | None]]
    until: int


def page(session: Session, seq: int, limit: int, names: Collection[str], *, of_client: str | None = None) -> Page:
    """The next events of these names among the next `SCANNED` events, as in `after`. The next page begins at `until`.
    `of_client`: only of tasks that this client of the gateway asked for; None = of all, and of none.

    Without that bound one statement searched 8 million events for a name that none had: 4 to 8 s, and 64 such readers
    delayed acknowledgements by 5 s. Names that are all rare are searched among rare events alone.
    """
    is_next = [col(Event.seq) > seq]
    if names and FREQUENT.isdisjoint(names):
        is_next.append(text(RARE_EVENT))  # type: ignore[arg-type]
    read: list[Any] = [Event.seq, Event.name]  # the columns of the index of rare events
    if of_client is not None:
        read.append(Event.task_id)
    window = select(*read).where(*is_next).order_by(col(Event.seq)).limit(SCANNED).subquery()
    chosen = select(window.c.seq).where(window.c.name.in_(names)).order_by(window.c.seq).limit(limit)
    if of_client is not None:
        chosen = chosen.join(Task, col(Task.id) == window.c.task_id).where(Task.client == of_client)
    seqs = session.execute(chosen).scalars().all()
    found = select(Event, Task.external_task_id).outerjoin(Task, col(Task.id) == col(Event.task_id))
    found = found.where(col(Event.seq).in_(seqs)).order_by(col(Event.seq))
    events = session.exec(found).all() if seqs else []
    if len(seqs) == limit:
        return Page(events, events[-1][0].seq or seq)
    last = select(Event.seq).where(*is_next).order_by(col(Event.seq)).offset(SCANNED - 1).limit(1)
    return Page(events, session.exec(last).first() or max(seq, newest_seq(session)))


def newest_seq(session: Session) -> int:
    """The highest number so far, 0 for none. Its event may have been pruned since."""
    return session.exec(select(Counter.value).where(Counter.name == COUNTER)).one_or_none() or 0


def skip_numbers(session: Session) -> None:
    """Number later events from the current time in milliseconds: above all that a lost copy of the database gave away.

    A reader's position would otherwise be the number of another event. Numbers grow by less than 1,000 a second.
    """
    insert_or_ignore(session, Counter, {"name": COUNTER, "value": 0})
    now = int(session.execute(select(db_now())).scalar_one().timestamp() * 1_000)
    run(session, update(Counter).where(col(Counter.name) == COUNTER, col(Counter.value) < now).values(value=now))


def unnumbered(session: Session) -> tuple[int, float]:
    """Events without a number, which no sink and no reader gets: how many, and the age of the oldest in seconds."""
    oldest = select(Event.at).where(_UNNUMBERED).order_by(col(Event.id)).limit(1).scalar_subquery()
    count, at, now = session.execute(select(func.count(), oldest, db_now()).where(_UNNUMBERED)).one()
    return count, (now - at).total_seconds() if at else 0.0


def count_after(session: Session, seq: int) -> tuple[dict[str, int], int]:
    """How many events of each name have a number above `seq`, and the highest number. One range of the index."""
    until = newest_seq(session)
    counted = select(Event.name, func.count()).where(col(Event.seq) > seq, col(Event.seq) <= until, _IS_EVENT)
    return dict(session.exec(counted.group_by(Event.name)).all()), until
