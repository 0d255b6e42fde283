"""Exports archived files and their manifests from the bucket into a local folder and verifies each hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import tuple_
from sqlmodel import col, select

from storage.archive import manifest
from storage.archive.accepted_losses import accepted_of
from storage.archive.folders import FOLDER, in_batches, manifest_beside
from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.database.sessions import Database
from storage.local_folder import LocalFolder
from storage.rows import tasks
from storage.rows.models import Asset, Task
from storage.rows.task_conditions import DISMISSED
from storage.states import AssetState

PAGE_ROWS = 500
BATCH_TASKS = 32
THREADS = 8
MISSING = "missing: there is no such object"


@dataclass
class Exported:
    """The result for one task. `faults`: key and reason of every file that is not in the folder now. `accepted`: the
    same of accepted losses."""

    task: str
    files: int = 0
    bytes: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)
    accepted: list[tuple[str, str]] = field(default_factory=list)


class _Corrupted(Exception):
    pass


class Export:
    """One export into `folder`, in the layout of the bucket without its prefix.

    An id that is no name on some disks is spelt in another way (`LocalFolder.portable`), so no task replaces another.

    A file appears whole and verified or not at all. An existing file with the right hash is kept, so an interrupted
    export can be repeated.
    """

    def __init__(self, database: Database, bucket: Bucket, folder: Path) -> None:
        self._database = database
        self._bucket = bucket
        self._folder = LocalFolder(folder)

    def run(self, chosen: Iterator[Task]) -> Iterator[Exported]:
        """Export these tasks. Raises `StoreUnavailable`, `DatabaseUnavailable`, OSError."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="export") as threads:
            for batch in in_batches(chosen, BATCH_TASKS):
                yield from threads.map(self._task, batch)

    def _task(self, task: Task) -> Exported:
        exported = Exported(task.external_task_id)
        with self._database.read() as session:
            assets = tasks.assets_of(session, task.id)
        for asset in assets:
            if asset.state is AssetState.ARCHIVED:
                self._count(exported, str(asset.key), partial(self._export_file, asset))
            elif asset.key and (asset.error or "").startswith(DISMISSED):
                exported.accepted.append((asset.key, f"given up: {asset.error}"))
        if task.manifest_key:
            for number in range(1, task.manifests + 1):
                key = manifest_beside(task.manifest_key, number)
                digest = task.manifest_digest if key == task.manifest_key else None
                self._count(exported, key, partial(self._export_manifest, key, digest))
        self._accept(exported, task)
        return exported

    def _accept(self, exported: Exported, task: Task) -> None:
        """Take the accepted losses from the faults."""
        if not exported.faults:
            return
        with self._database.read() as session:
            losses = accepted_of(session, task.id)
        losses.pop(task.manifest_key or "", None)
        lost = {key for key, why in exported.faults if key in losses and why == MISSING}
        exported.faults = [fault for fault in exported.faults if fault[0] not in lost]
        exported.accepted += [(key, losses[key].detail) for key in sorted(lost)]

    def _count(self, exported: Exported, key: str, export: Callable[[], int | str]) -> None:
        try:
            outcome = export()
        except NotADirectoryError as error:
            outcome = f"not written: {error.filename} {error.strerror}"
        if isinstance(outcome, str):
            exported.faults.append((key, outcome))
        else:
            exported.files += 1
            exported.bytes += outcome

    def _export_file(self, asset: Asset) -> int | str:
        """The size of the exported file, or why it was not exported."""
        steps = self.steps_of(str(asset.key))
        with self._folder.existing(steps) as existing:
            if existing and hashlib.file_digest(existing, "sha256").hexdigest() == asset.sha256:
                return existing.seek(0, os.SEEK_END)
        try:
            with self._folder.writing(steps) as file:
                sha256 = self._bucket.sha256(str(asset.key), file.write)
                if sha256 != asset.sha256:
                    raise _Corrupted(f"its bytes hash to {sha256}, the row says {asset.sha256}")
                return file.tell()
        except _Corrupted as error:
            return f"corrupted: {error}"
        except NoSuchObject:
            return MISSING

    def _export_manifest(self, key: str, digest: str | None) -> int | str:
        """As `_export_file`. `digest`: from the row, None for an earlier manifest, which is checked by its own."""
        try:
            content = self._bucket.read_bytes(key, manifest.MAX_MANIFEST_BYTES)
            found = manifest.read(content)["digest"]
        except NoSuchObject:
            return MISSING
        except ValueError as error:
            return f"corrupted: {error}"
        if digest not in (None, found):
            return f"corrupted: its digest is {found}, the row says {digest}"
        with self._folder.writing(self.steps_of(key)) as file:
            file.write(content)
        return len(content)

    def steps_of(self, key: str) -> list[str]:
        """The names that lead to an object's file. Raises ValueError for a key that leads out of the folder."""
        match = FOLDER.match(key)
        if match is None:
            raise ValueError(f"{key} is in no task's folder")
        steps = [*match[0].split("/")[-5:-1], *key[match.end() :].split("/")]
        if not {"", ".", ".."}.isdisjoint(steps) or any("\0" in step for step in steps):
            raise ValueError(f"{key} leads out of the folder")
        return list(map(self._folder.portable, steps))


def tasks_between(database: Database, since: datetime | None, until: datetime | None) -> Iterator[Task]:
    """Tasks with an archive that were created from `since` to before `until`, oldest first, read in pages."""
    wanted: list[Any] = [Task.archive != "none"]
    wanted += [col(Task.created_at) >= since] if since else []
    wanted += [col(Task.created_at) < until] if until else []
    place = tuple_(col(Task.created_at), col(Task.id))
    last: Sequence[Any] = []
    while True:
        page_of = select(Task).where(*wanted, *([place > last] if last else []))
        with database.read() as session:
            page = list(session.exec(page_of.order_by(col(Task.created_at), col(Task.id)).limit(PAGE_ROWS)))
        yield from page
        if len(page) < PAGE_ROWS:
            return
        last = [page[-1].created_at, page[-1].id]
