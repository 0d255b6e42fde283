"""Prunes old rows: deliveries, dispatches, events, request bodies, walked by age in bounded parts.

A walk ends where the rows become too young. Each part of a walk is one read of at most `PART` rows. Each write holds
the lock for some 50 ms; its number of rows follows the speed of the last ones. Callers own no transaction here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, exists, func, literal_column, or_, type_coerce, update
from sqlmodel import Session, col, select

from storage.archive.accepted_losses import IS_LOSS_ACT
from storage.database import walk
from storage.database.clock import UtcTime
from storage.database.sessions import Database, run
from storage.operations import outbox
from storage.rows.deleted_callbacks import delete_callbacks
from storage.rows.models import Asset, Callback, Dispatch, Event, Task
from storage.rows.task_conditions import IS_OVER, IS_PARKED
from storage.states import ArchiveState, CallbackState, Step

# Rows that one read looks at: 4 ms of CPU on SQLite with 8 million events.
PART = 500
# The rows of the first write, and the time that each write aims at. The intake waits meanwhile, on SQLite for the only
# lock.
FIRST_ROWS, MOST_ROWS, LOCK_SECONDS = 100, 2_000, 0.05
# Ids are assigned before the times of their rows are committed, so a walk by ids continues this far past the last old
# row.
SLACK = timedelta(hours=1)


@dataclass(frozen=True)
class Prunable:
    """One kind of prunable data: rows of `model` that satisfy `old`. `values`: written to them, None = rows deleted.

    `order`: the columns of the walk, in an index's order. `age`: the time that rises with them.
    """

    name: str
    model: Any
    old: ColumnElement[bool]
    order: tuple[Any, ...]
    age: Any
    values: dict[str, Any] | None = None


def prunable(session: Session, before: datetime) -> list[Prunable]:
    """What may be pruned from before `before`: nothing of a task that is not over, and nothing that waits for work.

    A delivery to the account URL names no task, so it stays while a task is open that existed when it came. An event
    stays until it has a number and every sink has it. The acts of an accepted loss stay. The client's callback URL,
    which may hold a secret, is pruned with the request, after the client has been called back.
    """
    unnamed = col(Callback.received_at) < min(before, _oldest_open(session) or before)
    settled = and_(
        col(Callback.state) != CallbackState.RECEIVED,
        col(Callback.due_at).is_(None),
        col(Callback.received_at) < before,
        or_(col(Callback.task_id).is_not(None), unnamed),
        _is_over(Callback.task_id),
    )
    delivered = and_(
        col(Event.at) < before,
        col(Event.seq).is_not(None),
        ~IS_LOSS_ACT,
        _is_over(Event.task_id),
        ~exists().where(col(Dispatch.event_id) == col(Event.id), outbox.IS_OPEN),
    )
    # The prune of an earlier version could leave dispatches whose event is gone. On SQLite a new event may have its id,
    # and gets no number beside them.
    event_of = col(Event.id) == col(Dispatch.event_id)
    of_delivered = or_(exists().where(event_of, delivered), ~exists().where(event_of, col(Event.seq).is_not(None)))
    ended_at = func.coalesce(Task.archived_at, Task.completed_at, Task.created_at)
    undelivered = or_(
        exists().where(col(Dispatch.task_id) == col(Task.id), outbox.IS_OPEN),
        # Not `seq IS NULL`, because SQLite then reads every event without a number for each task.
        exists().where(col(Event.task_id) == col(Task.id), func.coalesce(Event.seq, 0) == 0),
    )
    filled = or_(col(Task.request) != {}, col(Task.client_callback_url).is_not(None))
    requests = and_(IS_OVER, ended_at < before, filled, ~undelivered)
    emptied: dict[str, Any] = {"request": {}, "client_callback_url": None}
    return [
        Prunable("deliveries", Callback, settled, (Callback.received_at, Callback.id), Callback.received_at),
        Prunable("dispatches", Dispatch, and_(~outbox.IS_OPEN, of_delivered), (Dispatch.id,), Dispatch.created_at),
        Prunable("events", Event, delivered, (Event.id,), Event.at),
        Prunable("requests", Task, requests, (Task.created_at, Task.id), Task.created_at, emptied),
    ]


def _is_over(task_id: Any) -> Any:
    return ~exists().where(col(Task.id) == task_id, ~IS_OVER)


def _oldest_open(session: Session) -> datetime | None:
    """The creation time of the oldest open task. Each way of being open has an index of few rows."""
    waits = col(Task.due_at).is_not(None)
    unusable = select(Asset.task_id).where(col(Asset.unusable_since).is_not(None))
    ways = [
        *(and_(waits, col(Task.step) == literal_column(f"'{step}'")) for step in Step),
        and_(waits, col(Task.step).is_(None)),
        col(Task.queued_at).is_not(None),
        IS_PARKED,
        col(Task.archive) == literal_column(f"'{ArchiveState.ARCHIVING}'"),
        col(Task.id).in_(unusable),
    ]
    # For a plain column SQLite searches the minimum along the index of creation times, through every ended task.
    oldest = type_coerce(func.min(func.coalesce(Task.created_at, Task.created_at)), UtcTime)
    found = [session.execute(select(oldest).where(way)).scalar_one() for way in ways]
    return min((each for each in found if each), default=None)


def count(database: Database, kind: Prunable, before: datetime) -> int:
    """How many rows `prune` would delete or empty."""
    total = 0
    for part in _parts(database, kind, before):
        with database.read() as session:
            total += session.exec(select(func.count()).select_from(kind.model).where(*part, kind.old)).one()
    return total


def prune(database: Database, kind: Prunable, before: datetime) -> int:
    """Delete or empty all of this kind, in short transactions. Returns how many."""
    total, rows, ids = 0, FIRST_ROWS, list[Any]()
    for part in itertools.chain(_parts(database, kind, before), [None]):
        if part is not None:
            with database.read() as session:
                ids += session.exec(select(kind.model.id).where(*part, kind.old))
        while ids and (part is None or len(ids) >= rows):  # one write may be of several parts
            started = time.monotonic()
            with database.write() as session:
                began = time.monotonic()  # the wait for its turn is not part of its own time
                total += _prune_rows(session, kind, ids[:rows])
            del ids[:rows]
            took = time.monotonic() - max(began, started)
            rows = min(max(int(rows * min(LOCK_SECONDS / max(took, 0.001), 2)), FIRST_ROWS // 4), MOST_ROWS)
    return total


def _parts(database: Database, kind: Prunable, before: datetime) -> Iterator[list[Any]]:
    """The conditions of each part of the walk, from the oldest on, until the rows are too young."""
    for part, age in walk.parts(database, kind.order, PART, column=kind.age):
        yield part
        if age is not None and age >= before + SLACK:
            return


def _prune_rows(session: Session, kind: Prunable, ids: Sequence[Any]) -> int:
    """Delete or empty those of these rows that are still prunable. Returns how many."""
    model = kind.model
    if model is Callback:
        return delete_callbacks(session, (col(Callback.id).in_(ids), kind.old))
    statement: Any = delete(model) if kind.values is None else update(model).values(**kind.values)
    changed = run(session, statement.where(model.id.in_(ids), kind.old).returning(model.id)).scalars().all()
    if model is Event:  # dispatches that were sent since theirs were pruned: without its event none is found again
        run(session, delete(Dispatch).where(col(Dispatch.event_id).in_(changed)))
    return len(changed)
