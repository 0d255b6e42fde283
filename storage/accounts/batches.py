"""Batches: requests submitted together under one name, their tasks and their progress.

Queries and inserts only. Sessions are passed in and callers own the transaction.
"""

from __future__ import annotations

import unicodedata
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, case, func, insert, update
from sqlmodel import Session, col, select

from storage import states
from storage.accounts.accepted_creates import WAS_ACCEPTED
from storage.database.clock import db_now
from storage.database.sessions import insert_or_ignore
from storage.rows.deliveries import rematch
from storage.rows.events import EventName, with_person
from storage.rows.models import Asset, Batch, Callback, Event, Task
from storage.rows.task_conditions import not_dismissed
from storage.states import ArchiveState, AssetState, CallbackState, Step, TaskState

# Rows of one insert. SQLite allows 32,766 values in a statement, and a task has about fifty. One insert takes about 50
# ms, in which no one else can write on SQLite.
CHUNK = 200

STAGES = ("archived", "archiving", "running", "sending", "queued", "incomplete", "failed", "deleted")


@dataclass(frozen=True)
class Known:
    """An existing task whose external id occurs in a batch's file."""

    id: uuid.UUID
    request_hash: str
    batch_id: uuid.UUID | None
    batch_line: int | None
    deleted_at: datetime | None


@dataclass(frozen=True)
class Counts:
    """Numbers of tasks of a batch by progress. All but `silent` add up to the whole batch.

    `queued`: wait for slots. `sending`: create not settled. `running`: accepted by the provider. `archiving`: ended,
    files not yet archived. `incomplete`: ended, some files given up. `deleted`: removed by `receiver delete`. `silent`:
    those of `running` whose slots were given back because the provider reported nothing for 24 h.
    """

    queued: int = 0
    sending: int = 0
    running: int = 0
    archiving: int = 0
    archived: int = 0
    incomplete: int = 0
    failed: int = 0
    deleted: int = 0
    silent: int = 0

    @property
    def stages(self) -> list[tuple[str, int, float, float]]:
        """Name and count of each stage that has tasks, with its begin and width in a bar of 100."""
        found, begin = [], 0.0
        for name, count in ((name, getattr(self, name)) for name in STAGES):
            if count:
                found.append((name, count, begin, width := count / self.total * 100))
                begin += width
        return found

    @property
    def total(self) -> int:
        return self.over + self.queued + self.sending + self.running + self.archiving

    @property
    def over(self) -> int:
        return self.archived + self.incomplete + self.failed + self.deleted


def find(session: Session, name: str) -> Batch | None:
    """The batch of that name, else one whose name reads the same: macOS decomposes the accents of a file's name."""
    forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    found = session.exec(select(Batch).where(col(Batch.name).in_(set(forms))))
    return min(found, key=lambda batch: forms.index(batch.name), default=None)


def make(session: Session, name: str) -> Batch:
    """The batch of that name, which is created if it does not exist."""
    insert_or_ignore(session, Batch, {"id": uuid.uuid4(), "name": name, "created_at": db_now()})
    return session.exec(select(Batch).where(Batch.name == name)).one()


def known(session: Session, external_ids: Sequence[str]) -> dict[str, Known]:
    """Existing tasks with these external ids, by external id. `external_ids`: at most some thousand."""
    columns: Any = (Task.external_task_id, Task.id, Task.request_hash, Task.batch_id, Task.batch_line, Task.deleted_at)
    found = session.execute(select(*columns).where(col(Task.external_task_id).in_(external_ids)))
    return {external_id: Known(*rest) for external_id, *rest in found}


def insert_queued(session: Session, rows: Sequence[Task]) -> set[uuid.UUID]:
    """Insert queued tasks, at most `CHUNK`, unless their external ids are taken. Returns the ids of the new rows.

    Like `tasks.insert_new` for many tasks: records their events and makes their unmatched deliveries due.
    """
    names = [column.key for column in Task.__table__.columns]  # type: ignore[attr-defined]
    # Sorted, because two transactions that insert the same ids in different orders would deadlock.
    values = [
        {name: getattr(row, name) for name in names} for row in sorted(rows, key=lambda row: row.external_task_id)
    ]
    new = set(insert_or_ignore(session, Task, values))
    made = {row.external_task_id: row for row in rows if row.id in new}
    moment = session.execute(select(db_now())).scalar_one()
    facts = [
        {
            "task_id": row.id,
            "name": EventName.TASK_CREATED.value,
            "at": moment,
            "data": with_person({"external_task_id": each}),
        }
        for each, row in made.items()
    ]
    if facts:
        session.execute(insert(Event), facts)
    waits = (col(Callback.external_task_id).in_(made), col(Callback.state) == CallbackState.UNMATCHED)
    for external_id in set(session.scalars(select(Callback.external_task_id).where(*waits))):
        row = made[str(external_id)]
        rematch(session, row.id, row.provider, external_task_id=row.external_task_id)
    return new


def place(session: Session, batch_id: uuid.UUID, lines: Sequence[tuple[uuid.UUID, int]]) -> None:
    """Assign tasks, each given as (id, line of the batch's file), to the batch."""
    for task_id, line in sorted(lines, key=lambda pair: str(pair[0])):  # every writer of several tasks locks by id
        placed = update(Task).where(col(Task.id) == task_id).values(batch_id=batch_id, batch_line=line)
        session.execute(placed.execution_options(synchronize_session=False))


def counts(session: Session, batch_id: uuid.UUID) -> Counts:
    """The progress of the batch. Reads all of its tasks."""
    over = col(Task.state).in_(states.TERMINAL)
    silent = and_(~over, col(Task.queued_at).is_(None), col(Task.slots) == 0, col(Task.step) != Step.CREATE)
    where = case(
        (col(Task.deleted_at).is_not(None), "deleted"),
        (col(Task.archive) == ArchiveState.ARCHIVED, "archived"),
        (col(Task.archive) == ArchiveState.INCOMPLETE, "incomplete"),
        (col(Task.state) == TaskState.FAILED, "failed"),
        (over, "archiving"),
        (col(Task.queued_at).is_not(None), "queued"),
        (col(Task.state) == TaskState.CREATED, "sending"),
        else_="running",
    )
    is_silent = case((silent, 1), else_=0)
    found = session.execute(
        select(where, func.count(), func.sum(is_silent)).where(Task.batch_id == batch_id).group_by(where)
    ).all()
    return Counts(**{name: count for name, count, _ in found}, silent=sum(int(each) for _, _, each in found))


def page(session: Session, batch_id: uuid.UUID, after: tuple[int, str] | None) -> list[Task]:
    """The next `CHUNK` tasks of the batch in the order of their lines. `after`: (line, external id) of the last one."""
    found = select(Task).where(Task.batch_id == batch_id)
    if after is not None:
        line, external_id = after
        later = (col(Task.batch_line) == line) & (col(Task.external_task_id) > external_id)
        found = found.where((col(Task.batch_line) > line) | later)
    return list(session.exec(found.order_by(col(Task.batch_line), Task.external_task_id).limit(CHUNK)))


def not_kept(session: Session, batch_id: uuid.UUID, *, dismissed: bool = True) -> list[uuid.UUID]:
    """Ids of tasks that failed or lost a file, in the order of their lines. `dismissed`: include dismissed ones."""
    lost = select(Asset.task_id).where(Asset.task_id == Task.id, Asset.state == AssetState.FAILED)
    ended = (col(Task.state) == TaskState.FAILED) | (col(Task.archive) == ArchiveState.INCOMPLETE)
    if not dismissed:
        lost, ended = lost.where(not_dismissed(Asset.error)), ended & not_dismissed(Task.note)
    # An archived task has lost no file. A query that also read its files took ten times as long.
    lost_one = (col(Task.archive) != ArchiveState.ARCHIVED) & lost.exists()
    found = select(Task.id).where(Task.batch_id == batch_id, ended | lost_one, col(Task.deleted_at).is_(None))
    return list(session.exec(found.order_by(col(Task.batch_line), Task.external_task_id)))


def failed_at_provider(session: Session, batch_id: uuid.UUID) -> list[uuid.UUID]:
    """Ids of tasks that the provider accepted and failed, in the order of their lines, without dismissed ones."""
    failed = (Task.state == TaskState.FAILED, WAS_ACCEPTED)
    found = select(Task.id).where(Task.batch_id == batch_id, *failed, not_dismissed(Task.note))
    found = found.where(col(Task.deleted_at).is_(None))
    return list(session.exec(found.order_by(col(Task.batch_line), Task.external_task_id)))


def refused(session: Session, batch_id: uuid.UUID) -> list[dict[str, Any]]:
    """The requests of creates that the provider refused, without dismissed ones."""
    failed = (Task.state == TaskState.FAILED, ~WAS_ACCEPTED, col(Task.request) != {})
    found: Any = select(Task.request).where(Task.batch_id == batch_id, *failed, not_dismissed(Task.note))
    return list(session.exec(found.where(col(Task.deleted_at).is_(None))))
