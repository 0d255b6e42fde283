"""Audit: compares rows with objects in both directions, for missing, unknown and changed objects.

A row names the key, size and hash of an object; the store's listing names keys and sizes. Each task's current manifest
is read. With `deep` the files are read and hashed. Nothing is changed here but that an accepted loss ends when its
object is found again; `repair` does the rest.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from sqlmodel import col, func, select

from storage.archive import accepted_losses, manifest
from storage.archive.accepted_losses import Loss
from storage.archive.folders import (
    Folder,
    Objects,
    Rows,
    current_folder,
    external_id_of,
    in_batches,
    manifest_beside,
    manifest_number,
    walk,
)
from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.database.sessions import Database
from storage.rows.models import Asset, Task
from storage.rows.task_conditions import DISMISSED
from storage.states import ArchiveState, AssetState

# Folders between two checkpoints: a few seconds of work, more when files are hashed.
BATCH_FOLDERS = 64
THREADS = 4
ENDED = (ArchiveState.ARCHIVED, ArchiveState.INCOMPLETE)


class FindingKind(StrEnum):
    """Kinds of findings. All but those of NOTES are faults."""

    MISSING = "missing"
    SIZE = "size_differs"
    CHECKSUM = "checksum_differs"
    ORPHANED = "orphaned"
    MANIFEST_MISSING = "manifest_missing"
    MANIFEST_DIFFERS = "manifest_differs"
    UNREADABLE = "unreadable"  # listed, but reading it fails; found by `continuous_audit` only
    SUPERSEDED = "superseded"  # an earlier download with other bytes; kept on purpose
    ACCEPTED = "accepted"  # a loss that an operator has dismissed, or the object of one that is there again


NOTES = frozenset({FindingKind.SUPERSEDED, FindingKind.ACCEPTED})


@dataclass(frozen=True)
class Finding:
    """One difference. `task`: external id, None for an object of no task. `repair`: the result of a repair."""

    kind: FindingKind
    key: str
    task: str | None
    detail: str
    asset_id: uuid.UUID | None = None
    repair: str | None = None
    is_there_again: bool = False  # the object of a dismissed file is back; a worker archives it if its hash is right

    @property
    def is_fault(self) -> bool:
        return self.kind not in NOTES

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "asset_id": str(self.asset_id) if self.asset_id else None}


@dataclass
class Counts:
    """How much was examined, and the number of findings by kind."""

    folders: int = 0
    objects: int = 0
    assets: int = 0
    manifests: int = 0
    hashed: int = 0
    hashed_bytes: int = 0
    found: Counter[str] = field(default_factory=Counter)

    @property
    def faults(self) -> int:
        return sum(count for kind, count in self.found.items() if kind not in NOTES)

    def add(self, other: Counts) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "found": dict(sorted(self.found.items()))}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counts:
        return cls(**{**values, "found": Counter(values["found"])})


@dataclass(frozen=True)
class Batch:
    """One step of an audit. `after`: the last folder examined, from which another run continues."""

    after: str
    counts: Counts
    findings: list[Finding]


class Throttle:
    """Rate limit in bytes per second for all threads together; None = no limit."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Count bytes that were read and sleep until the rate allows them."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self._rate
            wait = self._free_at - now
        time.sleep(wait)


class Audit:
    """One audit. Memory is bounded by one page of rows and one page of the listing.

    `deep`: also read and hash the files. `sample`: only this many of them, chosen at random. Tasks may be archived
    meanwhile: before a difference is reported, the folder's rows and objects are read again.
    """

    def __init__(
        self,
        database: Database,
        bucket: Bucket,
        *,
        deep: bool = False,
        sample: int | None = None,
        max_bytes_per_second: float | None = None,
    ) -> None:
        self._database = database
        self.bucket = bucket
        self._deep = deep
        self._sample = sample
        self._throttle = Throttle(max_bytes_per_second)
        self._with_losses: set[uuid.UUID] = set()

    def run(self, after: str = "", hashed: int = 0) -> Iterator[Batch]:
        """Audit every folder that sorts after `after`. `hashed`: files that an earlier part of this audit hashed.

        Raises `StoreUnavailable`. A later run continues from `after` of the last batch.
        """
        chooser = _Chooser(self._sample, hashed, self.count_assets(after)) if self._deep else None
        with self._database.read() as session:
            self._with_losses = accepted_losses.tasks_with_losses(session)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="audit") as threads:
            for folders in in_batches(walk(self._database, self.bucket, after), BATCH_FOLDERS):
                chosen = [_chosen(folder, chooser) for folder in folders]
                counts, findings = Counts(), []
                for found_counts, found in threads.map(self._check, folders, chosen):
                    counts.add(found_counts)
                    findings += found
                yield Batch(folders[-1].name, counts, findings)

    def count_assets(self, after: str = "") -> int:
        """How many archived files have keys after `after`."""
        archived = select(func.count()).select_from(Asset).where(Asset.state == AssetState.ARCHIVED)
        with self._database.read() as session:
            return session.exec(archived.where(col(Asset.key) > after)).one()

    def check_folder(self, name: str) -> tuple[Counts, list[Finding]]:
        """Audit one folder, with `deep` all of its files. Raises `StoreUnavailable`.

        A file with another hash, or one that is missing, is read a second time before it is reported, because it may
        have been repaired or deleted meanwhile.
        """
        folder = current_folder(self._database, self.bucket, name)
        counts, found = self._check(folder, _chosen(folder, _Chooser(None, 0, 0) if self._deep else None))
        doubted = frozenset(finding.asset_id for finding in found if finding.is_fault and finding.asset_id)
        if doubted:
            _, found = self._check(current_folder(self._database, self.bucket, name), doubted)
            counts.found = Counter(finding.kind.value for finding in found)
        return counts, found

    def _check(self, folder: Folder, chosen: frozenset[uuid.UUID]) -> tuple[Counts, list[Finding]]:
        found = self._judge(folder)
        has_losses = folder.rows.task is not None and folder.rows.task.id in self._with_losses
        if not folder.rows or has_losses or any(finding.is_fault for finding in found):
            had_rows = bool(folder.rows)
            folder = current_folder(self._database, self.bucket, folder.name)
            if folder.rows and not had_rows:  # `walk` yields this folder a second time, with its rows
                return Counts(), []
            found = self._judge(folder)
        found += self._returned(folder)
        counts = Counts(folders=1, objects=len(folder.objects), assets=len(folder.rows.assets))
        counts.manifests = sum(manifest_number(key) is not None for key in folder.objects)
        doubted = {finding.asset_id for finding in found if finding.is_fault}
        for asset in folder.rows.assets:
            if asset.id in chosen and asset.id not in doubted and asset.state is AssetState.ARCHIVED:
                found += self._hash(folder.rows, asset, counts)
        counts.found.update(finding.kind.value for finding in found)
        return counts, found

    def _judge(self, folder: Folder) -> list[Finding]:
        found = [*judge(folder.name, folder.rows, folder.objects)]
        task = folder.rows.task
        if task and task.archive in ENDED and task.manifest_key in folder.objects:
            found += self._read_manifest(task, [*folder.rows.assets, *folder.rows.elsewhere])
        return found

    def _read_manifest(self, task: Task, assets: list[Asset]) -> list[Finding]:
        key = str(task.manifest_key)
        try:
            members = manifest.read_at(self.bucket, key)
            detail = disagreement(task, assets, members)
        except NoSuchObject:
            return [Finding(FindingKind.MANIFEST_MISSING, key, task.external_task_id, "there is no such object")]
        except ValueError as error:
            detail = str(error)
        return [Finding(FindingKind.MANIFEST_DIFFERS, key, task.external_task_id, detail)] if detail else []

    def _returned(self, folder: Folder) -> list[Finding]:
        """End the accepted losses of objects that are there again and verified."""
        task, found = folder.rows.task, list[Finding]()
        for loss in folder.rows.losses.values():
            if task is None or loss.key not in folder.objects:
                continue
            detail = None if loss.key == task.manifest_key else self._fault_of_returned(task, loss)
            if detail is None:
                with self._database.write() as session:
                    accepted_losses.record_ended(session, task.id, loss.key)
            kind = FindingKind.MANIFEST_DIFFERS if detail else FindingKind.ACCEPTED
            said = detail or "it is there again and verified; its loss is no longer accepted"
            found.append(Finding(kind, loss.key, task.external_task_id, said))
        return found

    def _fault_of_returned(self, task: Task, loss: Loss) -> str | None:
        try:
            members = manifest.read_at(self.bucket, loss.key)
        except NoSuchObject:
            return "it was listed and cannot be read"
        except ValueError as error:
            return str(error)
        if loss.digest not in (None, members["digest"]):
            return f"its digest is {members['digest']}, the lost one's is {loss.digest}"
        return None if members.get("task", {}).get("id") == str(task.id) else "it is another task's"

    def _hash(self, rows: Rows, asset: Asset, counts: Counts) -> list[Finding]:
        key = str(asset.key)
        task = rows.task.external_task_id if rows.task else external_id_of(key)

        def count(chunk: bytes) -> None:
            counts.hashed_bytes += len(chunk)
            self._throttle.take(len(chunk))

        try:
            sha256 = self.bucket.sha256(key, count)
        except NoSuchObject:
            return [Finding(FindingKind.MISSING, key, task, "there is no such object", asset.id)]
        counts.hashed += 1
        if sha256 == asset.sha256:
            return []
        detail = f"its bytes hash to {sha256}, the row says {asset.sha256}"
        return [Finding(FindingKind.CHECKSUM, key, task, detail, asset.id)]


def judge(folder: str, rows: Rows, objects: Objects) -> Iterator[Finding]:
    """The differences between the rows and the listing of one folder. Pure. Both must be of the same moment."""
    name = rows.task.external_task_id if rows.task else external_id_of(folder)
    known = set()
    for asset in rows.assets:
        key = str(asset.key)
        known.add(key)
        known.update(asset.superseded)
        if asset.state is AssetState.FAILED:
            dismissed = (asset.error or "").startswith(DISMISSED)
            if key not in objects:
                kind = FindingKind.ACCEPTED if dismissed else FindingKind.MISSING
                yield Finding(kind, key, name, f"given up: {asset.error}", asset.id)
            elif dismissed:
                detail = "its file was dismissed and is there again; `receiver audit --repair` verifies and archives it"
                yield Finding(FindingKind.ACCEPTED, key, name, detail, asset.id, is_there_again=True)
        if asset.state is not AssetState.ARCHIVED:
            continue
        if key not in objects:
            yield Finding(FindingKind.MISSING, key, name, "there is no such object", asset.id)
        elif objects[key].size != asset.size:
            detail = f"it has {objects[key].size} bytes, the row says {asset.size}"
            yield Finding(FindingKind.SIZE, key, name, detail, asset.id)
        for old in asset.superseded:
            if old in objects:
                yield Finding(FindingKind.SUPERSEDED, old, name, f"an earlier download; {key} counts", asset.id)
    if rows.task and rows.task.manifest_key:
        last = manifests_up_to(rows.task.manifest_key)
        known.update(last)
        for key in last:
            loss = rows.losses.get(key) if key != rows.task.manifest_key else None
            if key not in objects and loss:
                yield Finding(FindingKind.ACCEPTED, key, name, loss.detail)
            elif key not in objects:
                yield Finding(FindingKind.MANIFEST_MISSING, key, name, "there is no such object")
    finishing = rows.task is not None and rows.task.archive not in ENDED
    for key in objects:
        if key not in known and not (finishing and manifest_number(key)):
            yield Finding(FindingKind.ORPHANED, key, name if rows else None, "no row names it")


def disagreement(task: Task, assets: list[Asset], members: dict[str, Any]) -> str | None:
    """The difference between a manifest and the rows of an ended archive; None = none."""
    if members["digest"] != task.manifest_digest:
        return f"its digest is {members['digest']}, the row says {task.manifest_digest}"
    if members.get("task", {}).get("id") != str(task.id):
        return "it is another task's"
    files = {each["id"]: (each["key"], each["sha256"], each["size"]) for each in members["assets"] if each["key"]}
    rows = {str(asset.id): (asset.key, asset.sha256, asset.size) for asset in assets}
    if files != rows:
        return "it names other files than the rows"
    return None


def manifests_up_to(last: str) -> list[str]:
    """The keys of all manifests up to `last`."""
    return [manifest_beside(last, number) for number in range(1, (manifest_number(last) or 1) + 1)]


class _Chooser:
    """Chooses exactly `sample` of `total` files with equal probability in one pass (Knuth's algorithm S)."""

    def __init__(self, sample: int | None, hashed: int, total: int) -> None:
        self._needed = None if sample is None else max(sample - hashed, 0)
        self._left = total

    def takes(self) -> bool:
        if self._needed is None:
            return True
        taken = random.random() * max(self._left, 1) < self._needed  # noqa: S311 - no secret
        self._left -= 1
        self._needed -= taken
        return taken


def _chosen(folder: Folder, chooser: _Chooser | None) -> frozenset[uuid.UUID]:
    if chooser is None:
        return frozenset()
    archived = (asset for asset in folder.rows.assets if asset.state is AssetState.ARCHIVED)
    return frozenset(asset.id for asset in archived if chooser.takes())
