"""What an audit found, made good where that is possible: rows are made due, and a worker does the work.

Nothing is lost on the way: a damaged object is first kept under a key that names the bytes it has now.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import CursorResult, update
from sqlmodel import Session, col

from storage.archive import manifest
from storage.archive.audit import ENDED, Finding, FindingKind
from storage.bucket.bucket import Bucket, NoSuchObject
from storage.errors import DatabaseUnavailable, ObjectConflict, StoreUnavailable
from storage.fetch.client import spool
from storage.keys import manifest_name, object_key
from storage.rows import claims, tasks
from storage.rows.database import Database
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState

FETCHED_AGAIN = "due again: a worker fetches it while the provider still has it"
WRITTEN_AGAIN = "due again: a worker writes the manifest"


class Repairer:
    """Repairs findings one by one. Whatever dies half-way, the next audit finds the rest and repairs it."""

    def __init__(
        self, database: Database, bucket: Bucket, schedule: tasks.Schedule, *, spool_dir: Path | None = None
    ) -> None:
        self._database = database
        self._bucket = bucket
        self._schedule = schedule
        self._spool_dir = spool_dir

    def repair(self, finding: Finding) -> str:
        """Do what can be done about one finding; says what that was, or why nothing could be."""
        try:
            match finding.kind:
                case FindingKind.MISSING:
                    return self._fetch_again(finding)
                case FindingKind.SIZE | FindingKind.CHECKSUM:
                    return self._set_aside(finding) or self._fetch_again(finding)
                case FindingKind.MANIFEST_MISSING | FindingKind.MANIFEST_DIFFERS:
                    return self._write_again(finding)
                case FindingKind.UNREADABLE:
                    return "left alone: nobody knows what it holds while the store does not say"
                case FindingKind.ORPHANED:
                    return "left alone: no row says whose it is"
                case FindingKind.SUPERSEDED:
                    return "left alone: nothing is wrong with it"
        except (DatabaseUnavailable, StoreUnavailable, ObjectConflict) as error:
            return f"not repaired: {error}"

    def _set_aside(self, finding: Finding) -> str | None:
        """Free the key of a damaged object. Returns why that was not done, None when it was.

        The bytes are hashed again right here: an object that is as its row says is never removed.
        """
        with self._database.read() as session:
            asset = session.get(Asset, finding.asset_id)
            task = session.get(Task, asset.task_id) if asset else None
        if asset is None or task is None or asset.key != finding.key or asset.state is not AssetState.ARCHIVED:
            return "left alone: the row has changed since"
        with spool(self._spool_dir) as file:
            try:
                sha256, size = self._copy(finding.key, file)
            except NoSuchObject:
                return None
            if sha256 == asset.sha256:
                return "left alone: it is as its row says, looked at again"
            self._keep_damaged(task, asset, file, sha256, size)
        self._bucket.delete(finding.key)
        return None

    def _copy(self, key: str, file: BinaryIO) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        for chunk in self._bucket.read(key):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        return digest.hexdigest(), size

    def _keep_damaged(self, task: Task, asset: Asset, file: BinaryIO, sha256: str, size: int) -> None:
        extension = str(asset.key).rpartition(".")[2]
        key = object_key(
            self._bucket.prefix, task.created_at, task.external_task_id, asset.kind, asset.index, sha256, extension
        )
        told = {"task": task.external_task_id, "damaged": str(asset.key)}
        self._bucket.put_once(
            key, file, sha256=sha256, size=size, media_type="application/octet-stream", metadata=told
        )  # no media type: what these bytes are is not known any more
        with self._database.write() as session:
            tasks.lock(session, task.id)
            row = session.get_one(Asset, asset.id, with_for_update=True)
            if key not in row.superseded:
                row.superseded = [*row.superseded, key]

    def _fetch_again(self, finding: Finding) -> str:
        """The row is due once more, its key and hash kept: the same bytes come to lie where they were."""
        with self._database.write() as session:
            task = self._task_of(session, finding.asset_id)
            if task is None or not self._make_due(session, finding):
                return "left alone: the row has changed since"
            self._reopen(session, task)
            self._database.wake(session)
        return FETCHED_AGAIN

    def _task_of(self, session: Session, asset_id: uuid.UUID | None) -> Task | None:
        asset = session.get(Asset, asset_id)
        return tasks.lock(session, asset.task_id) if asset else None

    def _make_due(self, session: Session, finding: Finding) -> bool:
        chosen = update(Asset).where(
            col(Asset.id) == finding.asset_id,
            col(Asset.key) == finding.key,
            col(Asset.state).in_((AssetState.ARCHIVED, AssetState.FAILED)),
        )
        again = chosen.values(state=AssetState.DUE, **claims.AFRESH, archived_at=None, error=None)
        result = session.execute(again.execution_options(synchronize_session=False))
        assert isinstance(result, CursorResult)
        return result.rowcount == 1

    def _reopen(self, session: Session, task: Task) -> None:
        """An archive that had ended goes on; its end writes the next manifest."""
        if task.archive in ENDED:
            task.archive, task.note = ArchiveState.ARCHIVING, None
        tasks.reschedule(session, task, self._schedule)
        session.flush()

    def _write_again(self, finding: Finding) -> str:
        with self._database.read() as session:
            task = tasks.by_external_id(session, finding.task or "")
        if task is None or task.manifest_key is None or task.deleted_at is not None:
            return "left alone: the row has changed since"
        missing = finding.kind is FindingKind.MANIFEST_MISSING
        if missing and finding.key != task.manifest_key:
            return "not repaired: an earlier manifest is history that nobody else has"
        number, digest = self._before(task) if missing else (task.manifests, task.manifest_digest)
        with self._database.write() as session:
            row = tasks.lock(session, task.id)
            if row is None or row.manifest_digest != task.manifest_digest:
                return "left alone: the row has changed since"
            row.manifests, row.manifest_digest = number, digest
            self._reopen(session, row)
            self._database.wake(session)
        return WRITTEN_AGAIN

    def _before(self, task: Task) -> tuple[int, str | None]:
        """Number and digest of the manifest before the current one; no digest when that one cannot be read."""
        number, folder = task.manifests - 1, str(task.manifest_key).rpartition("/")[0]
        try:
            content = self._bucket.read_bytes(f"{folder}/{manifest_name(number)}", manifest.MAX_MANIFEST_BYTES)
            return number, str(manifest.read(content)["digest"])
        except (NoSuchObject, ValueError):
            return number, None
