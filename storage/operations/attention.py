"""Finds what may need a person and has no measure of its own: a bounded number of rows, by their indexes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import func, union_all
from sqlmodel import Session, col, select

from storage.operations import lists
from storage.rows import tasks
from storage.rows.models import Batch, Callback, Task
from storage.states import Step

# A batch of which no task has ended for this long counts as stopped.
STILL = timedelta(minutes=30)
SHOWN_BATCHES = 3
MANY = 10_000


def waiting_files(session: Session) -> int:
    """Files that failed and wait for their next try."""
    return int(session.execute(select(func.count()).select_from(lists.waiting_files().subquery())).scalar_one())


def refused_lately(session: Session) -> int:
    """Deliveries that were refused within a day."""
    recent = col(Callback.received_at) > tasks.now(session) - timedelta(days=1)
    newest = select(Callback.state).where(recent).order_by(col(Callback.received_at).desc()).limit(MANY).subquery()
    refused = newest.c.state.in_(lists.REFUSED)
    return session.execute(select(func.count()).select_from(newest).where(refused)).scalar_one() or 0


def still_batches(session: Session) -> Iterator[tuple[uuid.UUID, str, int]]:
    """Batches with waiting tasks of which none has ended lately. Reads the waiting tasks, and the last end of a few
    batches.
    """
    waits = (col(Task.step).in_(Step) & col(Task.due_at).is_not(None), col(Task.queued_at).is_not(None))
    # Two statements, because SQLite reads the whole table for one condition with "or": 0.3 s with a million tasks. The
    # condition on the batch is in the outer query. In the inner ones it would make SQLite read all tasks of all
    # batches.
    parts = [select(Task.batch_id).where(each).limit(MANY).subquery() for each in waits]
    some = union_all(*(select(part.c.batch_id).where(part.c.batch_id.is_not(None)) for part in parts)).subquery()
    counted = select(some.c.batch_id, func.count()).group_by(some.c.batch_id).limit(SHOWN_BATCHES)
    long_ago = tasks.now(session) - STILL
    for batch_id, count in session.execute(counted).all():
        batch = session.get_one(Batch, batch_id)
        if batch.created_at < long_ago and not _has_ended_since(session, batch_id, long_ago):
            yield batch.id, batch.name, count


def _has_ended_since(session: Session, batch_id: uuid.UUID, moment: datetime) -> bool:
    """Whether one of the newest `MANY` ends is one of this batch. To find the last end of a batch directly, all of its
    tasks would have to be read.
    """
    newest = select(Task.batch_id).where(col(Task.completed_at) > moment).order_by(col(Task.completed_at).desc())
    ended = newest.limit(MANY).subquery()
    return session.execute(select(ended.c.batch_id).where(ended.c.batch_id == batch_id).limit(1)).first() is not None
