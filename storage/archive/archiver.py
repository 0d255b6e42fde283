"""One asset row -> one object: fetch, check, hash, put once, settle.

claimed ─▶ known object there? ─▶ settled, nothing downloaded
    └────▶ fetch to spool ─▶ key, sha256, size into the row ─▶ put once ─▶ settle (+ last of its task? finish due)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import func, select
from sqlmodel import Session

from storage import states
from storage.archive import unusable
from storage.archive.delete import remove_late_objects
from storage.bucket import bucket as objects
from storage.bucket.bucket import Bucket
from storage.circuit import Circuit
from storage.database.clock import db_now
from storage.database.sessions import Database
from storage.errors import (
    FetchCut,
    FetchExpired,
    FetchUnusable,
    GiveUp,
    LostClaim,
    NotAnAsset,
    ObjectConflict,
    Refresh,
    Retry,
    StoreUnavailable,
)
from storage.fetch.client import Fetched, Fetcher
from storage.keys import object_key
from storage.rows import claims, reports, tasks
from storage.rows.events import EventName, file_facts, record
from storage.rows.models import Asset, Task, TaskColumns
from storage.spool import memory_of, spool
from storage.states import ArchiveState, AssetState, Step

log = structlog.get_logger()

# The longest backoff of a dead URL. Each try also reads the task for a fresh URL.
REFRESH_CAP_SECONDS = 900
# An older link is read again before an unusable file is tried, because a CDN may cache its error page by the link.
LINK_OLD_SECONDS = 900.0
# The share of the configured lifetime that is used. It counts from the report of the task's end, and a poll reports the
# end late.
LIFE_SHARE = 0.95
# Failed tries that a file's row keeps for its task's timeline. A host that is down for a day is tried some twenty
# times.
KEPT_TRIES, MAX_TRY_CHARS = 12, 300
# A bad path breaks transfers at any byte. Three of the kept tries that end at the same one are the file's own fault.
# Two hosts may have two copies, each cut at another.
CUTS_ALIKE = 3
# The note of an object whose bytes neither a SHA-256 of the store nor a read has verified.
BY_MD5 = "the store checked its MD5 on arrival, not its SHA-256"
# Columns of a settled row without unusable answers.
USABLE: dict[str, Any] = {"unusable_since": None, "unusable_tries": 0}
ARCHIVED = {"state": AssetState.ARCHIVED, "archived_at": db_now(), "error": None, **claims.NO_ATTEMPTS, **USABLE}
_TASKS = Task.__table__.c  # type: ignore[attr-defined]


class Archiver:
    """Archives claimed asset rows. After a crash the next claim continues from the row's columns."""

    def __init__(
        self,
        database: Database,
        bucket: Bucket,
        fetcher: Fetcher,
        schedule: reports.Schedule,
        *,
        spool_dir: Path | None = None,
        circuit: Circuit | None = None,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`waiting`: encloses each wait for a commit, during which another thread may archive."""
        self._database = database
        self._bucket = bucket
        self._fetcher = fetcher
        self._schedule = schedule
        self._spool_dir = spool_dir
        self._circuit = circuit or Circuit()
        self._waiting = waiting

    def work(self, asset: Asset, *, fetch_seconds: float | None = None) -> None:
        """Archive one claimed asset, or settle the row with the reason for the failure.

        `fetch_seconds`: less than the fetcher's own deadline for a whole file.
        """
        started = time.monotonic()
        try:
            self._archive(asset, fetch_seconds)
        except LostClaim:
            remove_late_objects(self._database, self._bucket, asset.task_id)
            return
        facts = {"asset": str(asset.id), "task_id": str(asset.task_id), "kind": asset.kind, "index": asset.index}
        seconds = round(time.monotonic() - started, 3)
        log.info("asset.attempt_finished", **facts, attempts=asset.attempts, seconds=seconds)

    def _archive(self, asset: Asset, fetch_seconds: float | None) -> None:
        try:
            if asset.losses >= claims.PARK_LOSSES:
                raise GiveUp(f"ended its worker {asset.losses} times; `receiver retry` tries again")
            # The task of an unusable file is read once before a try with an old link (`attempts` counts). The try uses
            # it if the read brings no other.
            if asset.unusable_tries and asset.attempts <= 1 and self._is_link_older(asset, db_now(-LINK_OLD_SECONDS)):
                raise Refresh(asset.error or "it came unusable")
            with self._circuit.watching(StoreUnavailable, ObjectConflict):
                self._store(asset, fetch_seconds)
            with self._waiting():
                self._database.write_in_group(partial(self._settle_archived, asset), task_id=asset.task_id)
        except Refresh as error:
            self._refresh(asset, error)
        except FetchUnusable as error:
            self._unusable(asset, error)
        except Retry as error:
            self._interrupted(asset, error)
        except GiveUp as error:
            self._fail(asset, str(error))

    def _store(self, asset: Asset, fetch_seconds: float | None) -> None:
        # The put of an earlier claim may have succeeded.
        if asset.key and asset.sha256 and self._bucket.holds(asset.key, sha256=asset.sha256, size=asset.size or 0):
            return
        if asset.key and (asset.size or 0) > objects.MULTIPART_THRESHOLD_BYTES:
            # An upload that an earlier claim left unfinished can never complete, and most stores bill it.
            self._bucket.abort_uploads(asset.key)
        with spool(self._spool_dir) as sink:
            fetched = self._fetcher.fetch(
                asset.source_url, sink, accept_unverified=asset.accept_unverified, trusted_only=asset.unconfirmed,
                total_seconds=fetch_seconds,
            )  # fmt: skip
            is_picture = tasks.name_of(asset).is_picture
            if is_picture and not fetched.media_type.startswith("image/") and not asset.accept_unverified:
                # A forged link, or a CDN that confuses files, returns other bytes.
                raise NotAnAsset(f"is {fetched.media_type}, but a picture was requested")
            # A file on disk keeps its place: its room is reckoned by `RECEIVER_WORKER_THREADS`.
            with self._waiting() if memory_of(sink) is not None else nullcontext():
                key = self._note(asset, fetched)
            provenance = {
                "task": asset.task_external_task_id,
                "task-id": str(asset.task_id),
                "provider": asset.task_provider,
                "provider-task-id": asset.task_provider_task_id or "",
                "source-host": fetched.host,
            }
            created = self._bucket.put_once(
                key, sink, sha256=fetched.sha256, size=fetched.size, media_type=fetched.media_type, metadata=provenance
            )
        if created and self._bucket.capabilities().proof == "md5":
            asset.notes = [*(asset.notes or ()), BY_MD5]

    def _note(self, asset: Asset, fetched: Fetched) -> str:
        """Write key, hash and size into the row under the lease before the put. A worker that takes over checks that
        key first.
        """
        key = object_key(
            self._bucket.prefix, asset.task_created_at, asset.task_external_task_id, asset.kind, asset.index,
            fetched.sha256, fetched.extension,
        )  # fmt: skip
        earlier = [asset.key] if asset.key and self._bucket.head(asset.key) is not None else []
        values = {
            "key": key, "superseded": [old for old in (*asset.superseded, *earlier) if old != key],
            "sha256": fetched.sha256, "size": fetched.size, "media_type": fetched.media_type,
            "width": fetched.width, "height": fetched.height, "verified": fetched.verified,
            "trailing_bytes": fetched.trailing_bytes or None, "notes": list(fetched.notes) or None,
            "fetched": {"host": fetched.host, "headers": fetched.headers},
        }  # fmt: skip
        self._database.write_in_group(lambda session: claims.update_claimed(session, asset, **values))
        # A claimed row belongs to no session. An attribute that is set through the model takes 8 µs.
        vars(asset).update(values)
        return key

    def _settle_archived(self, asset: Asset, session: Session) -> None:
        task = tasks.lock_known(session, asset.task_id)
        claims.settle(session, asset, due_in=None, notes=asset.notes, **ARCHIVED)
        record(session, EventName.ASSET_ARCHIVED, asset.task_id, file_facts(asset))
        self._look_at_task(session, task)

    def _interrupted(self, asset: Asset, error: Retry) -> None:
        before = [each["error"] for each in asset.failed_tries or ()]
        if isinstance(error, FetchCut) and before.count(str(error)) >= CUTS_ALIKE - 1:
            return self._unusable(asset, error)
        return self._retry(asset, str(error), max(error.after or 0, claims.backoff(asset.attempts)))

    def _unusable(self, asset: Asset, error: FetchUnusable | FetchCut) -> None:
        """Try again on a schedule that spans the file's life (`storage.archive.unusable`).

        Other broken transfers and outages in between do not count. Once the file is no longer awaited, its task can end
        without it.
        """
        with self._database.write() as session:
            task, now, tries = tasks.lock_known(session, asset.task_id), tasks.now(session), asset.unusable_tries + 1
            life = timedelta(seconds=LIFE_SHARE * self._schedule.result_lifetime_seconds)
            life_ends = (task.completed_at or now) + life
            due_in = unusable.next_try(tries, now=now, link_ends=asset.files_expire_at, life_ends=life_ends)
            if due_in is not None:
                values = _failed(asset, str(error), now) | claims.NO_ATTEMPTS
                values |= {"unusable_since": asset.unusable_since or now, "unusable_tries": tries}
                due_in = max(due_in, error.after or 0)
                claims.settle(session, asset, due_in=due_in, **values)
                if task.archive is ArchiveState.ARCHIVING:
                    self._look_at_task(session, task)
        if due_in is None:
            self._fail(asset, f"{error} (tried {tries} times since {asset.unusable_since:%Y-%m-%d})")
            return
        log.warning(
            "asset.content_rejected", asset=str(asset.id), task_id=str(asset.task_id), error=str(error), tries=tries,
            seconds=round(due_in, 1),
        )  # fmt: skip

    def _is_link_older(self, asset: Asset, moment: Any) -> bool:
        with self._database.read() as session:
            old = select(_TASKS.id).where(_TASKS.id == asset.task_id)
            known = func.coalesce(_TASKS.reported_at, _TASKS.created_at)
            return session.execute(old.where(known <= moment)).first() is not None

    def _fail(self, asset: Asset, reason: str) -> None:
        with self._database.write() as session:
            task = tasks.lock_known(session, asset.task_id)
            values = _failed(asset, reason, tasks.now(session))
            claims.settle(session, asset, due_in=None, state=AssetState.FAILED, **values, **USABLE)
            fact = {"kind": asset.kind, "index": asset.index, "error": reason}
            record(session, EventName.ASSET_FAILED, asset.task_id, fact)
            self._look_at_task(session, task)
            self._database.wake(session)  # for the event
        log.error("asset.failed", asset=str(asset.id), task_id=str(asset.task_id), error=reason)

    def _retry(self, asset: Asset, reason: str, due_in: float) -> None:
        with self._database.write() as session:
            claims.settle(session, asset, due_in=due_in, **_failed(asset, reason, tasks.now(session)))
        log.warning(
            "asset.retry_scheduled", asset=str(asset.id), task_id=str(asset.task_id), error=reason,
            seconds=round(due_in, 1),
        )  # fmt: skip

    def _refresh(self, asset: Asset, error: Refresh) -> None:
        """Read the task now, because the URL has expired. A new URL makes the asset due at once; with the same URL it
        backs off. A dead URL from a read since the last try is an unusable answer: no further read helps.
        """
        tries = asset.failed_tries if isinstance(error, FetchExpired) else None
        if tries and not self._is_link_older(asset, datetime.fromisoformat(tries[-1]["at"])):
            self._unusable(asset, FetchUnusable(str(error)))
            return
        with self._database.write() as session:
            task = tasks.lock_known(session, asset.task_id)
            due_in = claims.backoff(asset.attempts, base=10, cap=REFRESH_CAP_SECONDS)
            claims.settle(session, asset, due_in=due_in, **_failed(asset, str(error), tasks.now(session)))
            if task.step is not Step.READ or task.lease is None:
                reports.reschedule(session, task, self._schedule, read_now=True)
            tasks.save(session, task)
            self._database.wake(session)
        log.warning("asset.link_expired", asset=str(asset.id), task_id=str(asset.task_id), error=str(error))

    def _look_at_task(self, session: Session, task: TaskColumns) -> None:
        """Make the finish due if this was the last asset. A finish under way started from older rows. A read under way,
        or one that another asset's dead URL requested, is not changed: it checks the finish itself.
        """
        task.archive = states.reopened(task.archive)
        if (task.lease is None or task.step is Step.FINISH) and not reports.waits_for(session, task, states.READ_NOW):
            reports.reschedule(session, task, self._schedule)
        tasks.save(session, task)
        if task.step is not None:
            self._database.wake(session)


def _failed(asset: Asset, error: str, now: datetime) -> dict[str, Any]:
    """The columns that a failed try writes: its error, and the last tries for the timeline."""
    failed = {"at": now.isoformat(), "error": error[:MAX_TRY_CHARS]}
    return {"error": error, "failed_tries": [*(asset.failed_tries or [])[1 - KEPT_TRIES :], failed]}
