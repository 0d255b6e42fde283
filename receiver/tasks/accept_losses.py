"""`receiver dismiss --object`: accepts that an earlier manifest is gone for good, after it was looked for."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import Session

from receiver.tasks.changes import Tally, change
from storage.archive import manifest
from storage.archive.accepted_losses import accepted_of, record_accepted
from storage.archive.audit import FindingKind, manifests_up_to
from storage.archive.continuous_audit import clear_fault
from storage.archive.folders import external_id_of, folder_of, manifest_beside, manifest_number
from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.database.sessions import Database
from storage.keys import as_argument
from storage.rows import tasks
from storage.rows.models import Task

NO_ROW = "no row names this object, so none is missing"
THERE = "the object is there: `receiver audit` says whether it is right"
CURRENT = "this is the task's current manifest: `receiver audit --repair` writes it again"


def accept_losses(
    database: Database, bucket: Bucket, keys: Sequence[str], reason: str, *, dry_run: bool = False
) -> Tally:
    """Accept the loss of these objects, each with the digest that the next manifest gives it.

    Only earlier manifests are accepted, because nothing can bring them back. Raises `StoreUnavailable`.
    """
    tally = Tally()
    for key in dict.fromkeys(keys):
        external_id = external_id_of(folder_of(key))
        if external_id is None or bucket.head(key) is not None:
            tally.left[key] = THERE if external_id else NO_ROW
            continue
        digest = _digest_in_next(bucket, key)
        with change(database, dry_run=dry_run) as session:
            found = tasks.by_external_id(session, external_id)
            task = tasks.lock(session, found.id) if found else None
            why = _why_not(session, task, key)
            if task is None or why:
                tally.left[key] = why or NO_ROW
            elif key in accepted_of(session, task.id):
                tally.counts["accepted_before"] += 1
            else:
                record_accepted(session, task.id, key, digest, reason)
                clear_fault(session, FindingKind.MANIFEST_MISSING, key)
                tally.counts["accepted"] += 1
    return tally


def _why_not(session: Session, task: Task | None, key: str) -> str | None:
    if task is None:
        return NO_ROW
    if key == task.manifest_key:
        return CURRENT
    if key in manifests_up_to(task.manifest_key or ""):
        return None
    if key in (asset.key for asset in tasks.assets_of(session, task.id)):
        dismiss = f"receiver dismiss --reason TEXT {as_argument(task.external_task_id)}"
        return f"a file: `receiver audit --repair` makes it due, and `{dismiss}` gives it up if it cannot be fetched"
    return NO_ROW


def _digest_in_next(bucket: Bucket, key: str) -> str | None:
    """The digest of an earlier manifest as the next one names it; None if that one does not or cannot be read."""
    try:
        members = manifest.read_at(bucket, manifest_beside(key, (manifest_number(key) or 0) + 1))
    except (NoSuchObject, ValueError):
        return None
    digest = members.get("predecessor")
    return digest if isinstance(digest, str) else None
