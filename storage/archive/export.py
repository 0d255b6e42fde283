"""Archived files and their manifests from the bucket into a folder, each hash verified on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import tuple_
from sqlmodel import col, select

from storage.archive import manifest
from storage.archive.folders import FOLDER, in_batches
from storage.bucket.bucket import Bucket, NoSuchObject
from storage.keys import manifest_name
from storage.rows import tasks
from storage.rows.database import Database
from storage.rows.models import Asset, Task
from storage.states import AssetState

PAGE_ROWS = 500
BATCH_TASKS = 32
THREADS = 8
READ_BYTES = 2**20


@dataclass
class Exported:
    """What came of one task. `faults`: key and reason of everything that is not in the folder now."""

    task: str
    files: int = 0
    bytes: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)


class Export:
    """One export into `folder`, laid out as the bucket is, without its prefix.

    A file appears there whole and verified or not at all; one that is there already with the right hash is kept, so
    that an export that was cut off goes on.
    """

    def __init__(self, database: Database, bucket: Bucket, folder: Path) -> None:
        self._database = database
        self._bucket = bucket
        self._folder = folder.absolute()

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
                self._note(exported, str(asset.key), self._file(asset))
        if task.manifest_key:
            folder = task.manifest_key.rpartition("/")[0]
            for number in range(1, task.manifests + 1):
                key = f"{folder}/{manifest_name(number)}"
                digest = task.manifest_digest if key == task.manifest_key else None
                self._note(exported, key, self._manifest(key, digest))
        return exported

    def _note(self, exported: Exported, key: str, outcome: int | str) -> None:
        if isinstance(outcome, str):
            exported.faults.append((key, outcome))
        else:
            exported.files += 1
            exported.bytes += outcome

    def _file(self, asset: Asset) -> int | str:
        """The size of what lies in the folder now, or why it does not."""
        target = self.path_of(str(asset.key))
        if target.exists() and _hash(target) == asset.sha256:
            return target.stat().st_size
        part, digest, size = _part(target), hashlib.sha256(), 0
        try:
            with part.open("wb") as file:
                for chunk in self._bucket.read(str(asset.key)):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            if digest.hexdigest() != asset.sha256:
                return f"corrupted: its bytes hash to {digest.hexdigest()}, the row says {asset.sha256}"
            part.replace(target)
        except NoSuchObject:
            return "missing: there is no such object"
        finally:
            part.unlink(missing_ok=True)
        return size

    def _manifest(self, key: str, digest: str | None) -> int | str:
        """As `_file`. `digest`: what the row says, None for an earlier one, which speaks for itself."""
        try:
            content = self._bucket.read_bytes(key, manifest.MAX_MANIFEST_BYTES)
            found = manifest.read(content)["digest"]
        except NoSuchObject:
            return "missing: there is no such object"
        except ValueError as error:
            return f"corrupted: {error}"
        if digest not in (None, found):
            return f"corrupted: its digest is {found}, the row says {digest}"
        target = self.path_of(key)
        part = _part(target)
        part.write_bytes(content)
        part.replace(target)
        return len(content)

    def path_of(self, key: str) -> Path:
        """Where an object of ours comes to lie. Raises ValueError for a key that would lead out of the folder."""
        match = FOLDER.match(key)
        if match is None:
            raise ValueError(f"{key} is in no task's folder")
        path = self._folder.joinpath(*match[0].split("/")[-5:-1], *key[match.end() :].split("/"))
        if ".." in path.parts:
            raise ValueError(f"{key} leads out of the folder")
        return path


def tasks_between(database: Database, since: datetime | None, until: datetime | None) -> Iterator[Task]:
    """Tasks with something archived that were created from `since` on and before `until`, oldest first, in pages."""
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


def _part(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
