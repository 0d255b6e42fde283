"""Deletes a task's objects permanently and erases its request and URLs. A tombstone row stays.

    set tombstone (later reports are ignored) ─▶ remove objects ─▶ erase columns and deliveries

After a crash a repeated delete finishes the rest. A worker whose put ends after the tombstone removes the object. One
that died cannot, so no task is deleted before the leases that its dismissal took away would have ended.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import delete as delete_rows
from sqlmodel import col, select

from storage.archive.folders import folder_of
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.errors import NoSuchTask, StoreUnavailable, UserError
from storage.keys import as_argument, task_folder
from storage.rows import claims, tasks
from storage.rows.deleted_callbacks import delete_callbacks
from storage.rows.events import held_until
from storage.rows.models import Asset, Callback, Task
from storage.rows.task_conditions import IS_OVER
from storage.states import ArchiveState, CallbackState

log = structlog.get_logger()


class Refused(UserError):
    """The task may not be deleted. The message says why and what to do."""


@dataclass(frozen=True)
class Deleted:
    """`objects`: removed versions of objects. `again`: the task had been deleted before."""

    objects: int
    again: bool


def delete(database: Database, bucket: Bucket, external_task_id: str) -> Deleted:
    """Delete one task that is over: all versions of its files, superseded files and manifests.

    Raises `NoSuchTask`, `StoreUnavailable`, `DatabaseUnavailable`, and `Refused` for a task that is not over, that a
    worker may hold, or whose objects are locked; then nothing is changed.
    """
    task, keys, folders = objects_of_task(database, bucket, external_task_id)
    _refuse_locked(bucket, folders)
    again = _set_tombstone(database, task)
    count = sum(bucket.purge(folder) for folder in sorted(folders))
    if left := next(filter(bucket.head, keys), None):  # the store's listing lacked it
        raise StoreUnavailable(f"{bucket.place} still has {left}; the rows are kept, so delete the task again")
    _blank(database, task)
    return Deleted(count, again)


def objects_of_task(database: Database, bucket: Bucket, external_task_id: str) -> tuple[Task, list[str], set[str]]:
    """The task, the keys that its rows name, and the folders that may hold its objects. Raises `NoSuchTask`."""
    with database.read() as session:
        task = tasks.by_external_id(session, external_task_id)
        if task is None:
            raise NoSuchTask(external_task_id)
        assets = tasks.assets_of(session, task.id)
    named = [asset.key for asset in assets] + [key for asset in assets for key in asset.superseded]
    keys = [key for key in (*named, task.manifest_key) if key]
    own = task_folder(bucket.prefix, task.created_at, task.external_task_id)
    return task, keys, {own} | {folder_of(key) for key in keys}


def _refuse_locked(bucket: Bucket, folders: set[str]) -> None:
    for folder in folders:
        for each in bucket.list(folder):
            if until := bucket.locked_until(each.key):
                forever = datetime.max.replace(tzinfo=until.tzinfo)
                end = "its legal hold ends" if until == forever else f"{until:%Y-%m-%d %H:%M} UTC"
                raise Refused(f"{each.key} is under Object Lock until {end}; nothing was deleted")


def _set_tombstone(database: Database, task: Task) -> bool:
    """Set `deleted_at`. From then on reports change nothing. Returns whether it was set before."""
    with database.write() as session:
        row = tasks.lock_existing(session, task.id)
        if row.deleted_at is not None:
            return True
        if session.execute(select(Task.id).where(Task.id == row.id, IS_OVER)).first() is None:
            ends = f"receiver dismiss --reason TEXT {as_argument(row.external_task_id)}"
            raise Refused(f"{row.external_task_id} is not over: `{ends}` ends it")
        if (until := held_until(session, row.id)) and until > tasks.now(session):
            raise Refused(f"a worker may still be storing a file of this task: delete it after {until:%H:%M:%S} UTC")
        row.deleted_at = tasks.now(session)
        row.note = "deleted"
    return False


def remove_late_objects(database: Database, bucket: Bucket, task_id: uuid.UUID) -> None:
    """Remove what a worker has put for a task that was deleted meanwhile. For workers that have lost their claim."""
    with database.read() as session:
        task = session.get(Task, task_id)
    if task is None or task.deleted_at is None:
        return
    try:
        count = bucket.purge(task_folder(bucket.prefix, task.created_at, task.external_task_id))
        log.info("task.late_objects_removed", **tasks.named(task), objects=count)
    except StoreUnavailable as error:
        log.error("task.late_objects_found", **tasks.named(task), error=str(error))


def _blank(database: Database, task: Task) -> None:
    """Keep only the task's ids, times and states."""
    with database.write() as session:
        row = tasks.lock_existing(session, task.id)
        session.execute(delete_rows(Asset).where(col(Asset.task_id) == task.id))
        at_account = (col(Callback.task_id).is_(None), col(Callback.provider) == row.provider)
        of_task: list[tuple[Any, ...]] = [(col(Callback.task_id) == task.id,)]
        of_task += [(*at_account, col(Callback.external_task_id) == row.external_task_id)]
        if row.provider_task_id is not None:
            waits = col(Callback.state) == CallbackState.UNMATCHED
            of_task += [(*at_account, waits, col(Callback.provider_task_id) == row.provider_task_id)]
        delete_callbacks(session, *of_task)
        row.request, row.request_hash, row.callback_url, row.error = {}, "", None, None
        row.client_callback_url = None
        row.archive, row.archived_at, row.files_expire_at = ArchiveState.NONE, None, None
        row.manifest_key, row.manifest_digest, row.manifests = None, None, 0
        row.step = None
        claims.rest(row)
