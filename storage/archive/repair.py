"""Repairs findings of an audit where possible: rows are made due, and a worker does the work.

A damaged object is first copied to a key with the hash of its present bytes, so nothing is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from sqlalchemy import update
from sqlmodel import Session, col

from storage.archive import manifest
from storage.archive.audit import ENDED, Finding, FindingKind
from storage.archive.folders import manifest_beside, manifest_number
from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.database.sessions import Database, run
from storage.errors import DatabaseUnavailable, ObjectConflict, StoreUnavailable
from storage.keys import object_key
from storage.rows import claims, reports, tasks
from storage.rows.models import Asset, Task
from storage.spool import spool
from storage.states import ArchiveState, AssetState

EARLIER = "not repaired: it is an earlier manifest, of which there is no other copy"
FETCHED_AGAIN = "due again: a worker fetches it while the provider still has it"
WRITTEN_AGAIN = "due again: a worker writes the manifest"


class Repairer:
    """Repairs findings one by one. After a crash the next audit finds and repairs the rest."""

    def __init__(
        self, database: Database, bucket: Bucket, schedule: reports.Schedule, *, spool_dir: Path | None = None
    ) -> None:
        self._database = database
        self._bucket = bucket
        self._schedule = schedule
        self._spool_dir = spool_dir

    def repair(self, finding: Finding) -> str:
        """Repair one finding. Returns what was done, or why nothing was."""
        try:
            match finding.kind:
                case FindingKind.MISSING:
                    return self._fetch_again(finding)
                case FindingKind.SIZE | FindingKind.CHECKSUM:
                    return self._set_aside(finding) or self._fetch_again(finding)
                case FindingKind.MANIFEST_MISSING | FindingKind.MANIFEST_DIFFERS:
                    return self._write_again(finding)
                case FindingKind.UNREADABLE:
                    return "left alone: the store cannot read it; repair the store first"
                case FindingKind.ORPHANED:
                    return (
                        "left alone: no row names it; `receiver rebuild` restores a task whose rows are lost, "
                        "otherwise delete it by hand if it is not needed"
                    )
                case FindingKind.SUPERSEDED:
                    return "left alone: it is an earlier download, not a fault"
                case FindingKind.ACCEPTED:
                    return self._fetch_again(finding) if finding.is_there_again else "left alone: not a fault"
        except (DatabaseUnavailable, StoreUnavailable, ObjectConflict) as error:
            return f"not repaired: {error}"

    def _set_aside(self, finding: Finding) -> str | None:
        """Free the key of a damaged object. Returns None, or why it was not done.

        The bytes are hashed again here, so an object that matches its row is never removed.
        """
        with self._database.read() as session:
            asset = session.get(Asset, finding.asset_id)
            task = session.get(Task, asset.task_id) if asset else None
        if asset is None or task is None or asset.key != finding.key or asset.state is not AssetState.ARCHIVED:
            return "left alone: the row has changed since"
        with spool(self._spool_dir) as file:
            try:
                sha256 = self._bucket.sha256(finding.key, file.write)
            except NoSuchObject:
                return None
            if sha256 == asset.sha256:
                return "left alone: it matched its row when it was read again"
            # What a proxy in front of the store sent, a page or a part, is no object to remove.
            if (stored := self._bucket.head(finding.key)) is None or stored.size != file.tell():
                return f"left alone: the store sent {file.tell()} bytes of an object of another size"
            if not self._keep_damaged(task, asset, file, sha256):
                return "left alone: the row has changed since"
        self._bucket.delete(finding.key)
        return None

    def _keep_damaged(self, task: Task, asset: Asset, file: BinaryIO, sha256: str) -> bool:
        """Copy the bytes and note the copy. False: another repair was faster, so the key may hold the right bytes."""
        extension = str(asset.key).rpartition(".")[2]
        key = object_key(
            self._bucket.prefix, task.created_at, task.external_task_id, asset.kind, asset.index, sha256, extension
        )
        metadata = {"task": task.external_task_id, "damaged": str(asset.key)}
        # The media type of damaged bytes is unknown.
        self._bucket.put_once(
            key, file, sha256=sha256, size=file.tell(), media_type="application/octet-stream", metadata=metadata
        )
        with self._database.write() as session:
            tasks.lock(session, task.id)
            row = session.get_one(Asset, asset.id, with_for_update=True)
            if key not in row.superseded:
                row.superseded = [*row.superseded, key]
            return (row.state, row.archived_at) == (AssetState.ARCHIVED, asset.archived_at)

    def _fetch_again(self, finding: Finding) -> str:
        """Make the row due again with its key and hash, so that the same bytes are put under the same key."""
        with self._database.write() as session:
            asset = session.get(Asset, finding.asset_id)
            task = tasks.lock(session, asset.task_id) if asset else None
            chosen = update(Asset).where(
                col(Asset.id) == finding.asset_id,
                col(Asset.key) == finding.key,
                col(Asset.state).in_((AssetState.ARCHIVED, AssetState.FAILED)),
            )
            values = {"state": AssetState.DUE, **claims.DUE_NOW}
            if task is None or not run(session, chosen.values(**values, archived_at=None, error=None)).rowcount:
                return "left alone: the row has changed since"
            self._reopen(session, task)
            self._database.wake(session)
        return FETCHED_AGAIN

    def _reopen(self, session: Session, task: Task) -> None:
        """Let an ended archive continue; its next end writes the next manifest."""
        if task.archive in ENDED:
            task.archive, task.note = ArchiveState.ARCHIVING, None
        reports.reschedule(session, task, self._schedule)
        session.flush()

    def _write_again(self, finding: Finding) -> str:
        with self._database.read() as session:
            task = tasks.by_external_id(session, finding.task or "")
        if task is None or task.manifest_key is None or task.deleted_at is not None:
            return "left alone: the row has changed since"
        if finding.key != task.manifest_key:
            return f"{EARLIER}; `receiver dismiss --object KEY --reason TEXT` accepts its loss"
        missing = finding.kind is FindingKind.MANIFEST_MISSING
        number, digest = self._previous_manifest(task) if missing else (task.manifests, task.manifest_digest)
        with self._database.write() as session:
            row = tasks.lock_existing(session, task.id)
            if row.manifest_digest != task.manifest_digest:
                return "left alone: the row has changed since"
            row.manifests, row.manifest_digest = number, digest
            self._reopen(session, row)
            self._database.wake(session)
        return WRITTEN_AGAIN

    def _previous_manifest(self, task: Task) -> tuple[int, str | None]:
        """Number and digest of the manifest before the current one; the digest is None if it cannot be read.

        By the key: `manifests` is that number already if an earlier repair waits for its worker.
        """
        key = str(task.manifest_key)
        number = (manifest_number(key) or 1) - 1
        try:
            return number, str(manifest.read_at(self._bucket, manifest_beside(key, number))["digest"])
        except (NoSuchObject, ValueError):
            return number, None
