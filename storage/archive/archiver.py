"""One asset row -> one object: fetch, judge, hash, put once, settle.

claimed ─▶ known object there? ─▶ settled, nothing downloaded
    └────▶ fetch to spool ─▶ key, sha256, size into the row ─▶ put once ─▶ settle (+ last of its task? finish due)
"""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import structlog
from sqlalchemy import bindparam, select
from sqlmodel import Session

from storage.bucket import bucket as objects
from storage.bucket.bucket import Bucket
from storage.circuit import Circuit
from storage.errors import GiveUp, LostClaim, ObjectConflict, Refresh, Retry, StoreUnavailable
from storage.fetch.client import Fetched, Fetcher, spool
from storage.keys import object_key
from storage.rows import claims, tasks
from storage.rows.database import Database, db_now, run
from storage.rows.events import EventName, file_facts, record
from storage.rows.models import Asset, Task
from storage.states import AssetState, Step

log = structlog.get_logger()

# A dead URL is tried again at this pace at the latest; each try also reads the task for a fresh one.
REFRESH_CAP_SECONDS = 900
# In `fetched` of an asset not archived: how many downloads came whole and were no usable file.
UNUSABLE = "unusable"


class Origin(NamedTuple):
    """What a file's key and its provenance say of its task."""

    created_at: datetime
    external_task_id: str
    provider: str
    provider_task_id: str | None


_TASKS = Task.__table__.c  # type: ignore[attr-defined]
_ORIGIN = select(*(_TASKS[name] for name in Origin._fields)).where(_TASKS.id == bindparam("wanted"))


class Archiver:
    """Works on claimed asset rows. Whatever dies, the next claim finds the row and goes on from what it says."""

    def __init__(
        self,
        database: Database,
        bucket: Bucket,
        fetcher: Fetcher,
        schedule: tasks.Schedule,
        *,
        spool_dir: Path | None = None,
        circuit: Circuit | None = None,
    ) -> None:
        self._database = database
        self._bucket = bucket
        self._fetcher = fetcher
        self._schedule = schedule
        self._spool_dir = spool_dir
        self._circuit = circuit or Circuit()

    def work(self, asset: Asset) -> None:
        """Archive one claimed asset, or settle the row with the reason it could not be."""
        started = time.monotonic()
        try:
            if asset.losses >= claims.PARK_LOSSES:
                raise GiveUp(f"ended its worker {asset.losses} times; `receiver retry` tries again")
            with self._circuit.watching(StoreUnavailable, ObjectConflict):
                self._store(asset)
            self._settle_archived(asset)
        except LostClaim:
            return
        except Refresh as error:
            self._refresh(asset, error)
        except Retry as error:
            self._retry(asset, str(error), max(error.after or 0, claims.backoff(asset.attempts)))
        except GiveUp as error:
            self._refused(asset, error)
        log.info(
            "asset.worked", asset=str(asset.id), task=str(asset.task_id), kind=asset.kind, index=asset.index,
            attempts=asset.attempts, seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip

    def _store(self, asset: Asset) -> None:
        if asset.key and self._is_there(asset):
            return
        self._abort_upload(asset)
        origin = self._origin(asset)
        with spool(self._spool_dir) as sink:
            fetched = self._fetcher.fetch(asset.source_url, sink, accept_unverified=asset.accept_unverified)
            self._note(asset, origin, fetched)
            self._put(asset, origin, fetched, sink)

    def _origin(self, asset: Asset) -> Origin:
        with self._database.read() as session:
            return Origin._make(run(session, _ORIGIN, {"wanted": asset.task_id}).one())

    def _is_there(self, asset: Asset) -> bool:
        """Whether the put of an earlier claim has arrived."""
        assert asset.key and asset.sha256 and asset.size is not None
        return self._bucket.holds(asset.key, sha256=asset.sha256, size=asset.size)

    def _abort_upload(self, asset: Asset) -> None:
        """End what an earlier claim left half uploaded: it could never win, only cost."""
        if asset.key and (asset.size or 0) > objects.MULTIPART_THRESHOLD_BYTES:
            self._bucket.abort_uploads(asset.key)

    def _note(self, asset: Asset, origin: Origin, fetched: Fetched) -> None:
        """Write what is about to be put into the row, under the lease: whoever takes over looks there first."""
        prefix, created_at, external_id = self._bucket.prefix, origin.created_at, origin.external_task_id
        key = object_key(prefix, created_at, external_id, asset.kind, asset.index, fetched.sha256, fetched.extension)
        superseded = list(asset.superseded)
        if asset.key and asset.key != key and self._bucket.head(asset.key) is not None:
            superseded.append(asset.key)
        values = {
            "key": key, "sha256": fetched.sha256, "size": fetched.size, "media_type": fetched.media_type,
            "width": fetched.width, "height": fetched.height, "verified": fetched.verified,
            "trailing_bytes": fetched.trailing_bytes or None, "notes": list(fetched.notes) or None,
            "superseded": superseded, "fetched": {"host": fetched.host, "headers": fetched.headers},
        }  # fmt: skip
        with self._database.write() as session:
            claims.update_claimed(session, asset, **values)
        asset.key, asset.sha256, asset.size, asset.media_type = key, fetched.sha256, fetched.size, fetched.media_type

    def _put(self, asset: Asset, origin: Origin, fetched: Fetched, sink: BinaryIO) -> None:
        sink.seek(0)
        assert asset.key is not None
        provenance = {
            "task": origin.external_task_id,
            "task-id": str(asset.task_id),
            "provider": origin.provider,
            "provider-task-id": origin.provider_task_id or "",
            "source-host": fetched.host,
        }
        self._bucket.put_once(
            asset.key, sink, sha256=fetched.sha256, size=fetched.size, media_type=fetched.media_type,
            metadata=provenance,
        )  # fmt: skip

    def _settle_archived(self, asset: Asset) -> None:
        with self._database.write() as session:
            task = self._lock_task(session, asset)
            claims.settle(
                session, asset, due_in=None, state=AssetState.ARCHIVED, error=None, archived_at=db_now(), attempts=0
            )
            record(session, EventName.ASSET_ARCHIVED, asset.task_id, file_facts(asset))
            self._look_at_task(session, task)

    def _refused(self, asset: Asset, error: GiveUp) -> None:
        """Give up after as many tries that ended like this: broken downloads and outages before them do not count."""
        tries = asset.fetched.get(UNUSABLE, 0) + 1
        if tries < error.tries:
            self._retry(asset, str(error), claims.backoff(tries), fetched={UNUSABLE: tries})
        else:
            self._fail(asset, str(error))

    def _fail(self, asset: Asset, reason: str) -> None:
        try:
            with self._database.write() as session:
                task = self._lock_task(session, asset)
                kept = {name: value for name, value in asset.fetched.items() if name != UNUSABLE}
                claims.settle(session, asset, due_in=None, state=AssetState.FAILED, error=reason, fetched=kept)
                fact = {"kind": asset.kind, "index": asset.index, "error": reason}
                record(session, EventName.ASSET_FAILED, asset.task_id, fact)
                self._look_at_task(session, task)
        except LostClaim:
            return
        log.error("asset.failed", asset=str(asset.id), task=str(asset.task_id), error=reason)

    def _retry(self, asset: Asset, reason: str, due_in: float, **values: Any) -> None:
        try:
            with self._database.write() as session:
                claims.settle(session, asset, due_in=due_in, error=reason, **values)
        except LostClaim:
            return
        log.warning("asset.retry", asset=str(asset.id), task=str(asset.task_id), error=reason, seconds=round(due_in, 1))

    def _refresh(self, asset: Asset, error: Refresh) -> None:
        """The URL died: the task is read now; a new URL makes the asset due at once, the same one backs off."""
        try:
            with self._database.write() as session:
                task = self._lock_task(session, asset)
                due_in = claims.backoff(asset.attempts, base=10, cap=REFRESH_CAP_SECONDS)
                claims.settle(session, asset, due_in=due_in, error=str(error))
                if task.step is not Step.READ or task.lease is None:
                    tasks.reschedule(session, task, self._schedule, read_now=True)
                self._database.wake(session)
        except LostClaim:
            return
        log.warning("asset.refresh", asset=str(asset.id), task=str(asset.task_id), error=str(error))

    def _lock_task(self, session: Session, asset: Asset) -> Task:
        """The task row first, always: so exactly one settle sees that it was the last."""
        task = tasks.lock(session, asset.task_id)
        if task is None:
            raise LostClaim(f"task {asset.task_id} is gone")
        return task

    def _look_at_task(self, session: Session, task: Task) -> None:
        """Make the finish due when this was the last asset. A read in flight, or one that another asset's dead URL
        has asked for, is left to be made: it looks again itself."""
        if task.lease is None and not tasks.wants_read(session, task):
            tasks.reschedule(session, task, self._schedule)
        self._database.wake(session)
