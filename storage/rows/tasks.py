"""Task rows and their assets: insert, find, lock, and the facts for decisions. Callers own transactions."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import compress
from operator import is_not
from typing import Any, cast

import sqlalchemy
from sqlalchemy import Connection, bindparam
from sqlmodel import Session, col, select

from storage.database.clock import db_now
from storage.database.prepared import execute, unattached
from storage.database.sessions import INSERTS
from storage.errors import LostClaim
from storage.rows import claims
from storage.rows.deliveries import rematch
from storage.rows.events import EventName, record
from storage.rows.models import Asset, Task, TaskColumns
from storage.states import AssetFacts, AssetName, TaskFacts

# The same task, kind and index give the same asset id, also after a rebuild.
ASSET_NAMESPACE = uuid.UUID("5f0f2c1e-6c36-4c55-9f0b-5d8f1f6f3c0a")

_NAMES = tuple(Task.__table__.columns.keys())  # type: ignore[attr-defined]
_INSERT_NEW = {
    name: insert(Task.__table__)  # type: ignore[attr-defined]
    .values({name: bindparam(name) for name in _NAMES})
    .on_conflict_do_nothing(index_elements=["external_task_id"])
    .returning(Task.__table__.c.id)  # type: ignore[attr-defined]
    for name, insert in INSERTS.items()
}


def insert_new(session: Session, task: Task) -> bool:
    """Insert a task unless its external id is taken. Unmatched deliveries of it become due. Returns whether it was
    inserted.
    """
    session.flush()
    values = {name: getattr(task, name) for name in _NAMES}
    if not execute(session, _INSERT_NEW[session.get_bind().dialect.name], values).rows:
        return False
    record(session, EventName.TASK_CREATED, task.id, {"external_task_id": task.external_task_id})
    rematch(session, task.id, task.provider, external_task_id=task.external_task_id)
    return True


_BY_EXTERNAL_ID = select(Task).where(Task.external_task_id == bindparam("wanted"))


def by_external_id(session: Session, external_task_id: str) -> Task | None:
    return session.scalars(_BY_EXTERNAL_ID, {"wanted": external_task_id}).one_or_none()


def by_name(session: Session, name: str) -> Task | None:
    """The task with this external id, else with this own id of the row."""
    if task := by_external_id(session, name):
        return task
    try:
        return session.get(Task, uuid.UUID(name))
    except ValueError:
        return None


def named(task: TaskColumns) -> dict[str, str]:
    """The names of the task in every log line: `task`, its external id, and `task_id`, the row's own id."""
    return {"task": task.external_task_id, "task_id": str(task.id)}


_LOCKED = select(Task).where(Task.id == bindparam("wanted")).with_for_update()
_LOCKED = _LOCKED.execution_options(populate_existing=True)


def lock(session: Session, task_id: uuid.UUID) -> Task | None:
    """The task's current row, locked until the transaction ends."""
    return session.scalars(_LOCKED, {"wanted": task_id}).one_or_none()


def lock_existing(session: Session, task_id: uuid.UUID) -> Task:
    """`lock` of a task that was read before: rows of tasks are never removed."""
    return session.scalars(_LOCKED, {"wanted": task_id}).one()


_LOCKED_ROW = sqlalchemy.select(Task.__table__).where(col(Task.id) == bindparam("wanted"))  # type: ignore[attr-defined]
_LOCKED_ROW = _LOCKED_ROW.with_for_update()
# In a locked row of no session: its columns as they were read.
_LOADED = "loaded"


def lock_unattached(session: Session, task_id: uuid.UUID) -> TaskColumns | None:
    """`lock` for the steps of every callback and file. The row belongs to no session: `save` writes its changes."""
    found = execute(session, _LOCKED_ROW, {"wanted": task_id}).rows
    if not found:
        return None
    task: TaskColumns = TaskColumns.__new__(TaskColumns)
    vars(task).update(loaded := found[0]._asdict(), **{_LOADED: loaded})
    return task


def lock_known(session: Session, task_id: uuid.UUID) -> TaskColumns:
    """`lock_unattached` for the work on a claimed row of the task or of a file of it. Raises `LostClaim` if it is gone.

    A task is locked before its files, so that exactly one settle sees that its file was the last.
    """
    if (task := lock_unattached(session, task_id)) is None:
        raise LostClaim(f"task {task_id} no longer exists")
    return task


def save(session: Session, task: TaskColumns) -> None:
    """Write the columns of a task of `lock_unattached` that have changed since."""
    now = vars(task)  # begins with the columns, in the order in which they were read
    if changed := dict(compress(now.items(), map(is_not, now.values(), now[_LOADED].values()))):
        claims.write(session, Task, task, changed, "id")


def lock_claimed(session: Session, claimed: Task) -> Task:
    """The locked task row, still held under the claim's lease. Raises `LostClaim` otherwise."""
    task = lock(session, claimed.id)
    if task is None or task.lease != claimed.lease:
        raise LostClaim(f"another worker owns task {claimed.id}")
    return task


_IN_READING_ORDER = select(Asset).order_by(Asset.kind, Asset.original, col(Asset.index))
_ASSETS_OF = _IN_READING_ORDER.where(Asset.task_id == bindparam("of")).execution_options(populate_existing=True)


def assets_of(session: Session, task_id: uuid.UUID) -> list[Asset]:
    """The task's assets in reading order."""
    return list(session.scalars(_ASSETS_OF, {"of": task_id}))


_ALL_OF = sqlalchemy.select(Asset.__table__).where(col(Asset.task_id) == bindparam("of"))  # type: ignore[attr-defined]
_ALL_OF = _ALL_OF.order_by(Asset.kind, Asset.original, col(Asset.index))


def assets_read(place: Session | Connection, task_id: uuid.UUID) -> list[Asset]:
    """`assets_of`, for reading alone: the rows belong to no session, and take a third of the CPU."""
    return unattached(Asset, execute(place, _ALL_OF, {"of": task_id}))


def assets_of_all(session: Session, task_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[Asset]]:
    """The assets of many tasks at once, in reading order. A task without assets has an empty list."""
    found: dict[uuid.UUID, list[Asset]] = {task_id: [] for task_id in task_ids}
    for asset in session.exec(_IN_READING_ORDER.where(col(Asset.task_id).in_(task_ids))):
        found[asset.task_id].append(asset)
    return found


def name_of(asset: Any) -> AssetName:
    return AssetName(asset.kind, asset.index, asset.original)


def facts(task: TaskColumns, assets: Iterable[Any]) -> TaskFacts:
    """The part of the rows that decisions read. `assets`: row objects, or rows of their columns."""
    found = {
        name_of(asset): AssetFacts(asset.state, asset.source_url, asset.unusable_tries, asset.unconfirmed)
        for asset in assets
    }
    return TaskFacts(
        task.state, task.archive, task.series, task.expected, task.contradicted, task.completeness_reads, found
    )


_ASSETS = Asset.__table__.c  # type: ignore[attr-defined]
_OF_ASSET = ("kind", "index", "original", "state", "source_url", "unusable_tries", "unconfirmed")
_ASSET_FACTS = sqlalchemy.select(*(_ASSETS[name] for name in _OF_ASSET)).where(_ASSETS.task_id == bindparam("of"))


def facts_now(session: Session, task: TaskColumns) -> TaskFacts:
    """`facts` from the current rows without row objects, because every settled file needs them."""
    return facts(task, execute(session, _ASSET_FACTS, {"of": task.id}).rows)


def asset_id(task_id: uuid.UUID, name: AssetName) -> uuid.UUID:
    """The id of an asset: always the same for the same task, kind and index."""
    return uuid.uuid5(ASSET_NAMESPACE, f"{task_id}/{name.kind}/{name.original}/{name.index}")


_NOW = sqlalchemy.select(db_now())


def now(session: Session) -> datetime:
    """The database's time."""
    return cast(datetime, execute(session, _NOW).rows[0][0])


def newest(session: Session, limit: int, *, skip: int = 0, of_client: str | None = None) -> list[Task]:
    """The newest tasks, newest first, after the `skip` newest, which are read in the index alone. `of_client`: only
    tasks that this client asked for; None: all.
    """
    wanted = [] if of_client is None else [Task.client == of_client]
    order = (col(Task.created_at).desc(), col(Task.id).desc())
    ids = select(Task.id).where(*wanted).order_by(*order).limit(limit).offset(skip).subquery()
    return list(session.exec(select(Task).where(col(Task.id).in_(select(ids.c.id))).order_by(*order)))


# A note that starts with this names defaults of the request. It is no fault, and a fault's note replaces it.
DEFAULTED = "default taken: "


def request_note(task: TaskColumns) -> str | None:
    """The task's note if it is about its request. It stays when the work clears its own notes."""
    return task.note if task.note and task.note.startswith(DEFAULTED) else None


# -- the slots of one task; storage/accounts/slots.py decides which task gets some -------------------------------------

SILENT = "silent for 24 h: its slots were given back"
# Of a task whose create got no answer.
NOT_FOUND = "called back, but the provider does not find it: it is not sent again"


def give_back(task: TaskColumns) -> None:
    """Give back the slots that the locked task holds or waits for, and clear its note, unless it is of its request."""
    task.slots, task.queued_at, task.note = 0, None, request_note(task)


def clear_silence_note(task: TaskColumns) -> None:
    """Clear the locked task's note of silence."""
    if task.note and task.note.startswith(SILENT):
        task.note = None


def clear_other_notes(task: Task, *, is_found: bool) -> None:
    """Clear the locked task's note, unless it is of silence, of its request, or says that the task is not found, while
    that is so.
    """
    lasting = (SILENT,) if is_found else (SILENT, NOT_FOUND)
    kept = (note for note in lasting if task.note and task.note.startswith(note))
    task.note = next(kept, request_note(task))


def note_after_others(task: TaskColumns, note: str) -> str:
    """`note`, after the locked task's note of silence, or that it is not found, if it has one."""
    lasting = [first for first in (SILENT, NOT_FOUND) if task.note and task.note.startswith(first)]
    return "; ".join([*lasting, note])


def last_note(note: str) -> str:
    """What `note_after_others` put behind the other notes."""
    for first in (SILENT, NOT_FOUND):
        note = note.removeprefix(f"{first}; ")
    return note
