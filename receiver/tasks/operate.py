"""The operator's commands: retry, replay, reconcile, dismiss, prune.

Each changes rows in short transactions, wakes the workers, and may be repeated. A crash half-way leaves what was
committed. A dry run does the same work and rolls every transaction back, so its counts are exact.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from sqlmodel import Session, col

from receiver.providers.base import BadSignature, Provider, plain
from receiver.tasks.accept_losses import accept_losses
from receiver.tasks.changes import Tally, change
from storage.accounts.accepted_creates import was_accepted
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.operations import maintenance, pruning
from storage.rows import reports, tasks
from storage.rows.models import Asset, Callback
from storage.rows.task_conditions import is_dismissed
from storage.states import ArchiveState, AssetState, CallbackState, Step, TaskState

MAX_REASON_CHARS = 300
# The reason of a delivery that was refused for its signature (`receiver.web.callbacks`).
SIGNATURE_REASON = "signature: "


@dataclass(frozen=True)
class Reads:
    """Tasks that were made due for a read at `since`."""

    ids: list[uuid.UUID]
    since: datetime


class Operator:
    """The commands on one database. `dry_run`: nothing is changed, everything is counted."""

    def __init__(
        self,
        database: Database,
        providers: Mapping[str, Provider],
        schedule: reports.Schedule,
        *,
        dry_run: bool = False,
    ) -> None:
        self._database = database
        self._providers = providers
        self._schedule = schedule
        self._dry_run = dry_run

    # -- retry --------------------------------------------------------------------------------------------------------

    def retry(self, name: str, *, accept_unverified: bool = False) -> Tally:
        """Make a task (by its external id) or one file (by its asset id) due again. See `maintenance.retry`.

        `accept_unverified`: only for a file. One that fails its structure check is archived as it is, with `verified:
        false`.
        """
        tally = Tally()
        with change(self._database, dry_run=self._dry_run) as session:
            task = tasks.by_name(session, name)
            asset = None if task else _asset(session, name)
            if asset is not None:
                self._retry_asset(session, tally, asset, accept_unverified)
            elif task is None:
                tally.left[name] = "no task has this external id and no file this asset id"
            elif accept_unverified:
                tally.left[name] = "--accept-unverified takes the id of one file (`receiver status ID --json`)"
            else:
                self._retry_task(session, tally, task.id, name)
        return tally

    def _retry_task(self, session: Session, tally: Tally, task_id: uuid.UUID, name: str) -> None:
        task = tasks.lock_existing(session, task_id)
        done = maintenance.retry(session, task, self._schedule)
        if done.reason:
            tally.left[name] = done.reason
        tally.counts.update(done.counts)

    def _retry_asset(self, session: Session, tally: Tally, asset: Asset, accept_unverified: bool) -> None:
        task = tasks.lock_existing(session, asset.task_id)
        done = maintenance.retry_files(session, task, [asset.id], self._schedule, accept_unverified=accept_unverified)
        tally.counts["files_due"] += done
        if not done:
            is_kept = asset.state is AssetState.ARCHIVED
            tally.left[str(asset.id)] = (
                "archived already" if is_kept else "a worker holds it; try again when it has finished"
            )

    def retry_failed(self, *, since: datetime | None = None, error: str | None = None, limit: int) -> Tally:
        """Make given-up files due, and tasks that were parked, brought no file, fell silent or may have arrived.

        `since`, `error`: filters, see `maintenance.failed_files`. `limit`: the most files, and the most tasks.
        Dismissed tasks are left alone.
        """
        files = maintenance.failed_files(self._database, since=since, error=error, limit=limit)
        others = maintenance.failed_tasks(self._database, since=since, error=error, limit=limit)
        tally, whole = Tally(), set(others)
        for task_id, group in groupby(files, key=lambda pair: pair[0]):
            if task_id in whole:  # done below, with all of its files
                continue
            with change(self._database, dry_run=self._dry_run) as session:
                task = tasks.lock_existing(session, task_id)
                ids = [asset_id for _, asset_id in group]
                tally.counts["files_due"] += maintenance.retry_files(session, task, ids, self._schedule)
        for task_id in others:
            with change(self._database, dry_run=self._dry_run) as session:
                self._retry_task(session, tally, task_id, str(task_id))
        return Tally(tally.counts + Counter(in_work=len(tally.left)))

    # -- replay -------------------------------------------------------------------------------------------------------

    def replay(
        self,
        ids: Sequence[int] = (),
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        state: CallbackState | None = None,
    ) -> Tally:
        """Put deliveries back, so that today's code applies them again: these `ids`, or all received in a time range.

        A delivery that was refused for its signature goes back only if today's secrets verify it as of its arrival.
        Answers to reads are not replayed: `reconcile` reads the task again.
        """
        tally = Tally(left={str(each): "no such delivery" for each in ids})
        size = maintenance.BATCH
        named = ([col(Callback.id).in_(ids[start : start + size])] for start in range(0, len(ids), size))
        for within in named if ids else maintenance.received(self._database, since, until):
            with self._database.read() as session:
                rows = maintenance.deliveries(session, *within, state=state)
            for row in rows:
                tally.left.pop(str(row.id), None)
            if rows:
                self._replay(tally, rows, named=bool(ids))
        return tally

    def _replay(self, tally: Tally, rows: Sequence[Callback], *, named: bool) -> None:
        ready, kept_back = [], dict[int | None, str]()
        for row in rows:
            if row.source != "push":
                kept_back[row.id] = "the answer to a read; `receiver reconcile` reads its task again"
            elif row.state is not CallbackState.REJECTED or not (row.reason or "").startswith(SIGNATURE_REASON):
                ready.append(row.id or 0)
            elif not self._put_back_verified(row):
                kept_back[row.id] = "its signature does not verify with today's secrets either"
            else:
                tally.counts["replayed"] += 1
        with change(self._database, dry_run=self._dry_run) as session:
            done = maintenance.put_back(session, ready)
        tally.counts["replayed"] += done
        tally.counts["left_alone"] += len(kept_back)
        tally.counts["in_work"] += len(ready) - done
        if named:
            tally.left.update({str(each): why for each, why in kept_back.items()})

    def _put_back_verified(self, row: Callback) -> bool:
        with self._database.read() as session:
            whole = session.get_one(Callback, row.id)
        provider = self._providers.get(whole.provider)
        try:
            verified = provider and provider.verify(whole.headers, whole.body, now=whole.received_at.timestamp())
        except BadSignature:
            return False
        if not verified:
            return False
        with change(self._database, dry_run=self._dry_run) as session:
            return bool(maintenance.put_back(session, [whole.id or 0], webhook_id=verified))

    # -- reconcile ----------------------------------------------------------------------------------------------------

    def reconcile(self, names: Sequence[str] = ()) -> tuple[Tally, Reads]:
        """Make all unfinished tasks due for a read now, or the named tasks in any state."""
        tally, since = Tally(), self._database.now()
        if names:
            ids = [task_id for name in names if (task_id := self._reconcile(tally, name))]
            return tally, Reads(ids, since)
        with self._database.read() as session:
            chosen = maintenance.unfinished(session)
            tally.counts["not_sent_yet"] = maintenance.count_unsent(session)
        for start in range(0, len(chosen), maintenance.BATCH):
            batch = chosen[start : start + maintenance.BATCH]
            with change(self._database, dry_run=self._dry_run) as session:
                done = maintenance.make_reads_due(session, batch)
            tally.counts["reads_due"] += done
            tally.counts["in_work"] += len(batch) - done
        return tally, Reads(chosen, since)

    def _reconcile(self, tally: Tally, name: str) -> uuid.UUID | None:
        with change(self._database, dry_run=self._dry_run) as session:
            found = tasks.by_name(session, name)
            task = tasks.lock(session, found.id) if found else None
            if task is None:
                tally.left[name] = "no task has this external id"
            elif task.deleted_at is not None:
                tally.left[name] = "deleted"
            elif task.step is Step.CREATE:
                tally.left[name] = "not sent yet: a worker sends it, or finds out whether it arrived"
            elif task.state is TaskState.FAILED and task.step is not Step.READ and not was_accepted(task):
                tally.left[name] = "its create failed: the provider has nothing of it to read"
            else:
                if task.lease is None or task.step is not Step.READ:
                    reports.reschedule(session, task, self._schedule, read_now=True)
                tally.counts["reads_due"] += 1
                return task.id
        return None

    # -- dismiss, prune -----------------------------------------------------------------------------------------------

    def dismiss(self, name: str, reason: str) -> Tally:
        """End the alarms of a task that cannot be completed, with a reason. See `maintenance.dismiss`."""
        tally = Tally()
        with change(self._database, dry_run=self._dry_run) as session:
            found = tasks.by_name(session, name)
            task = tasks.lock(session, found.id) if found else None
            if task is None:
                tally.left[name] = "no task has this external id"
            elif task.archive is ArchiveState.ARCHIVED or task.deleted_at is not None:
                tally.left[name] = "archived or deleted: there is nothing to dismiss"
            elif task.step is Step.CREATE and task.lease is not None:
                tally.left[name] = "its request is on its way right now; try again in a minute"
            elif is_dismissed(task):
                tally.counts["dismissed_before"] += 1
            else:
                given_up = maintenance.dismiss(session, task, plain(reason, MAX_REASON_CHARS), self._schedule)
                tally.counts.update(dismissed=1, files_given_up=given_up)
        return tally

    def dismiss_deliveries(self, ids: Sequence[int], reason: str) -> Tally:
        """End the alarm of deliveries that match no task, with a reason. See `maintenance.dismiss_deliveries`."""
        with change(self._database, dry_run=self._dry_run) as session:
            done = maintenance.dismiss_deliveries(session, ids, plain(reason, MAX_REASON_CHARS))
        left = "no such delivery, or it has a task, or it was dismissed before"
        return Tally(Counter(dismissed=len(done)), {str(each): left for each in ids if each not in done})

    def accept_losses(self, bucket: Bucket, keys: Sequence[str], reason: str) -> Tally:
        """Accept the loss of earlier manifests, with a reason. See `accept_losses`. Raises `StoreUnavailable`."""
        return accept_losses(self._database, bucket, keys, plain(reason, MAX_REASON_CHARS), dry_run=self._dry_run)

    def prune(self, older_than: timedelta) -> Tally:
        """Remove old deliveries, events and request bodies of tasks that are over. See `pruning.prunable`."""
        tally = Tally()
        with self._database.read() as session:
            before = tasks.now(session) - older_than
            kinds = pruning.prunable(session, before)
        work = pruning.count if self._dry_run else pruning.prune
        for kind in kinds:
            tally.counts[kind.name] = work(self._database, kind, before)
        return tally


def _asset(session: Session, name: str) -> Asset | None:
    try:
        return session.get(Asset, uuid.UUID(name))
    except ValueError:
        return None
