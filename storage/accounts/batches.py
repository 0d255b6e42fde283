"""Requests submitted together under one name: their rows, how they stand, and what they brought.

Queries and inserts alone: sessions are passed in, callers own the transaction.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, case, func, insert, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col, select

from storage import states
from storage.rows.database import db_now
from storage.rows.events import EventName, with_person
from storage.rows.inbox import rematch
from storage.rows.models import Asset, Batch, Callback, Event, Task
from storage.rows.task_conditions import not_dismissed
from storage.states import ArchiveState, AssetState, CallbackState, Step, TaskState

# Rows of one insert. SQLite takes 32,766 values in a statement, and a task has some fifty; it takes about 50 ms, in
# which nobody else writes.
CHUNK = 200


@dataclass(frozen=True)
class Known:
    """A task row that has an external id of a batch's file."""

    id: uuid.UUID
    request_hash: str
    batch_id: uuid.UUID | None
    batch_line: int | None


@dataclass(frozen=True)
class Counts:
    """How many tasks of a batch stand where; together they are all of it. `pictures`: files archived.

    `queued`: wait for slots; `sending`: on their way to the provider, or in doubt; `running`: accepted;
    `archiving`: made, being kept; `incomplete`: over, and not all of it kept; `deleted`: over, by `receiver delete`,
    whatever was kept of it. `silent`: those of `running` whose slots were given back, as nothing was heard for 24 h.
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
    def total(self) -> int:
        return self.over + self.queued + self.sending + self.running + self.archiving

    @property
    def over(self) -> int:
        return self.archived + self.incomplete + self.failed + self.deleted


def find(session: Session, name: str) -> Batch | None:
    return session.exec(select(Batch).where(Batch.name == name)).one_or_none()


def make(session: Session, name: str) -> Batch:
    """The batch of that name, made if it is new."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    values = {"id": uuid.uuid4(), "name": name, "created_at": db_now()}
    session.execute(dialect.insert(Batch).values(values).on_conflict_do_nothing(index_elements=["name"]))
    return session.exec(select(Batch).where(Batch.name == name)).one()


def newest(session: Session, limit: int) -> list[Batch]:
    """The newest batches, newest first."""
    return list(session.exec(select(Batch).order_by(col(Batch.created_at).desc(), Batch.name).limit(limit)))


def known(session: Session, external_ids: Sequence[str]) -> dict[str, Known]:
    """The rows that have these external ids, by external id. At most some thousand at once."""
    columns: Any = (Task.external_task_id, Task.id, Task.request_hash, Task.batch_id, Task.batch_line)
    found = session.execute(select(*columns).where(col(Task.external_task_id).in_(external_ids)))
    return {external_id: Known(*rest) for external_id, *rest in found}


def insert_queued(session: Session, rows: Sequence[Task]) -> set[uuid.UUID]:
    """Insert tasks that wait for their turn, at most `CHUNK`, unless their external ids are taken. Returns those new.

    What `tasks.insert_new` does, for many: their facts, and unmatched deliveries of them are due.
    """
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    table = Task.__table__  # type: ignore[attr-defined]
    # In the order of their ids: two that insert the same ids in different orders would wait for each other.
    names = [column.key for column in table.columns]
    values = [
        {name: getattr(row, name) for name in names} for row in sorted(rows, key=lambda row: row.external_task_id)
    ]
    statement: Any = dialect.insert(table).on_conflict_do_nothing(index_elements=["external_task_id"])
    # As a list of parameters, not of VALUES: the statement is compiled once, not for every chunk.
    new = set(session.scalars(statement.returning(table.c.id), values))
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
    """Say of tasks (id, line) that they belong to the batch, at that line of its file."""
    for task_id, line in sorted(lines, key=lambda pair: str(pair[0])):  # the order in which others lock several
        placed = update(Task).where(col(Task.id) == task_id).values(batch_id=batch_id, batch_line=line)
        session.execute(placed.execution_options(synchronize_session=False))


def counts(session: Session, batch_id: uuid.UUID) -> Counts:
    """How the tasks of the batch stand. Reads all of them once."""
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
    """The next tasks of the batch in the order of their lines, at most `CHUNK`; `after`: (line, external id)."""
    found = select(Task).where(Task.batch_id == batch_id)
    if after is not None:
        line, external_id = after
        later = (col(Task.batch_line) == line) & (col(Task.external_task_id) > external_id)
        found = found.where((col(Task.batch_line) > line) | later)
    return list(session.exec(found.order_by(col(Task.batch_line), Task.external_task_id).limit(CHUNK)))


def files_of(session: Session, task_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[Asset]]:
    """The files of these tasks, by task, in reading order."""
    found = select(Asset).where(col(Asset.task_id).in_(task_ids))
    files = defaultdict(list)
    for asset in session.exec(found.order_by(Asset.kind, Asset.original, col(Asset.index))):
        files[asset.task_id].append(asset)
    return files


def not_kept(session: Session, batch_id: uuid.UUID, *, dismissed: bool = True) -> list[uuid.UUID]:
    """Tasks of the batch that failed, or of which a file was given up, in the order of their lines.

    `dismissed` False: without what the operator dismissed.
    """
    lost = select(Asset.task_id).where(Asset.task_id == Task.id, Asset.state == AssetState.FAILED)
    ended = (col(Task.state) == TaskState.FAILED) | (col(Task.archive) == ArchiveState.INCOMPLETE)
    if not dismissed:
        lost, ended = lost.where(not_dismissed(Asset.error)), ended & not_dismissed(Task.note)
    found = select(Task.id).where(Task.batch_id == batch_id, ended | lost.exists(), col(Task.deleted_at).is_(None))
    return list(session.exec(found.order_by(col(Task.batch_line), Task.external_task_id)))
