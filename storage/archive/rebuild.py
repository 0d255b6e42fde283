"""Restores rows from the bucket alone: each folder's newest readable manifest is read and its files are checked.

A row is written only from a manifest whose digest is right and which is stored in its own task's folder. A file that
differs from its manifest is restored as failed, so that `receiver retry` fetches it again. Idempotent: existing tasks
are left unchanged.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, update
from sqlmodel import Session, col

from storage.archive import manifest
from storage.archive.folders import Objects, external_id_of, folder_of, in_batches, manifest_number, object_folders
from storage.bucket.bucket import Bucket
from storage.bucket.store_errors import NoSuchObject
from storage.bucket.stored import Listed
from storage.database.sessions import Database, insert_or_ignore, run
from storage.keys import task_folder
from storage.rows import aliases, claims, tasks
from storage.rows.deliveries import rematch
from storage.rows.events import EventName, file_facts, record
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetName, AssetState, TaskState

# Folders of one transaction. It takes about 50 ms, in which no one else can write on SQLite.
BATCH_FOLDERS = 64
THREADS = 8


@dataclass(frozen=True)
class Problem:
    """Something that was not or only partly restored. `advice`: a command that restores it, None = none."""

    key: str
    task: str | None
    detail: str
    advice: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Restored:
    """The result of one batch. `counts`: `folders`, `tasks`, `assets`, and `known` for existing tasks."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Found:
    """The rows of one folder, before they are inserted."""

    task: Task | None = None
    assets: list[Asset] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class Rebuild:
    """One run over the bucket. `deep`: read and hash every file instead of asking the store for its checksum."""

    def __init__(self, database: Database, bucket: Bucket, *, deep: bool = False) -> None:
        self._database = database
        self._bucket = bucket
        self._deep = deep

    def run(self) -> Iterator[Restored]:
        """Restore folder by folder. A yielded batch is committed. Raises `StoreUnavailable`, `DatabaseUnavailable`."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="rebuild") as threads:
            for batch in in_batches(object_folders(self._bucket), BATCH_FOLDERS):
                found = list(threads.map(lambda item: self._read_folder(*item), batch))
                restored = Restored(problems=[problem for each in found for problem in each.problems])
                restored.counts["folders"] = len(found)
                with self._database.write() as session:
                    for each in found:
                        if each.task is not None:
                            self._insert(session, each.task, each, restored)
                yield restored

    def _read_folder(self, folder: str, objects: Objects) -> _Found:
        external_id = external_id_of(folder)
        found = _Found()
        if external_id is None:  # not a folder of a task
            return found
        numbers = {number: key for key in objects if (number := manifest_number(key))}
        for number in sorted(numbers, reverse=True):
            try:
                members = manifest.read_at(self._bucket, numbers[number])
                self._restore(found, folder, numbers[number], members, objects)
                assert found.task
                found.task.manifests = max(numbers)  # the next manifest gets a higher number than every existing one
                return found
            except (NoSuchObject, ValueError, KeyError, TypeError) as error:
                found.problems.append(Problem(numbers[number], external_id, f"not readable: {error}"))
        found.problems.append(Problem(folder, external_id, "no manifest", f"receiver adopt {external_id}"))
        return found

    def _restore(self, found: _Found, folder: str, key: str, members: Mapping[str, Any], objects: Objects) -> None:
        task = task_from(members, key, objects[key])
        if not f"/{folder}".endswith("/" + task_folder("", task.created_at, task.external_task_id)):
            raise ValueError("it belongs to another folder")
        assets = [asset_from(task, described) for described in members["assets"]]
        named = [key for asset in assets for key in (asset.key, *asset.superseded) if key]
        if any(external_id_of(folder_of(each)) != task.external_task_id for each in named):
            raise ValueError("it names files of another task")
        for asset in assets:
            if asset.state is AssetState.ARCHIVED and (fault := self._fault(asset, objects)):
                asset.state, asset.error, asset.archived_at = AssetState.FAILED, f"rebuild: {fault}", None
                advice = f"receiver retry {task.external_task_id}"
                found.problems.append(Problem(str(asset.key), task.external_task_id, fault, advice))
                task.archive = ArchiveState.INCOMPLETE
        found.task, found.assets, found.aliases = task, assets, list(members["task"]["aliases"])

    def _fault(self, asset: Asset, objects: Objects) -> str | None:
        """How the object differs from the asset, None when it matches."""
        key = str(asset.key)
        if key not in objects:
            return "there is no such object"
        if objects[key].size != asset.size:
            return f"it has {objects[key].size} bytes, the manifest says {asset.size}"
        stored = None if self._deep else self._bucket.head(key)
        sha256 = (stored and stored.sha256) or self._bucket.sha256(key)
        return None if sha256 == asset.sha256 else f"its bytes hash to {sha256}, the manifest says {asset.sha256}"

    def _insert(self, session: Session, task: Task, found: _Found, restored: Restored) -> None:
        if not insert_or_ignore(session, Task, task.model_dump()) and not self._complete(session, task, found):
            there = tasks.by_external_id(session, task.external_task_id)
            if there is None or there.id != task.id:
                restored.problems.append(Problem(str(task.manifest_key), task.external_task_id, "its id is taken"))
            restored.counts["known"] += 1
            return
        if found.assets:
            session.execute(insert(Asset), [asset.model_dump() for asset in found.assets])
        for alias in found.aliases:
            aliases.note_alias(session, task, alias)
        rematch(session, task.id, task.provider, external_task_id=task.external_task_id)
        restored.counts["tasks"] += 1
        restored.counts["assets"] += sum(asset.state is AssetState.ARCHIVED for asset in found.assets)

    def _complete(self, session: Session, task: Task, found: _Found) -> bool:
        """Give the row of an older backup, which never ended an archive, the archive in the bucket. Returns whether it
        did. Otherwise its create would be sent again, or its files fetched, which the provider may have deleted.
        """
        there = None if found.problems or task.archive is not ArchiveState.ARCHIVED else tasks.lock(session, task.id)
        held_until = there.due_at if there and there.lease else None  # a backup holds leases of then, which have ended
        if there is None or there.manifest_key or there.deleted_at or (held_until and held_until > tasks.now(session)):
            return False
        told = {asset.id for asset in tasks.assets_read(session, task.id) if asset.state is AssetState.ARCHIVED}
        if there.state is not TaskState.SUCCEEDED:
            record(session, EventName.TASK_SUCCEEDED, task.id)
        values = task.model_dump(exclude_unset=True) | claims.NOT_DUE | {"step": None, "slots": 0, "queued_at": None}
        run(session, update(Task).where(col(Task.id) == task.id).values(values))
        session.execute(delete(Asset).where(col(Asset.task_id) == task.id))
        files = [file_facts(asset) for asset in found.assets]
        for facts in (file_facts(asset) for asset in found.assets if asset.id not in told):
            record(session, EventName.ASSET_ARCHIVED, task.id, facts)
        end = {"manifest": task.manifest_key, "files": len(files), "note": task.note, "assets": files}
        record(session, EventName.TASK_ARCHIVED, task.id, end)
        return True


def task_from(members: Mapping[str, Any], key: str, listed: Listed) -> Task:
    """The task row that a manifest describes, in the state at the end of its archive. Raises ValueError, KeyError,
    TypeError.

    Columns that no manifest holds keep their defaults: the callback URL (a secret) and the schedule of reads. The time
    of the archive's end is that of the manifest's object.
    """
    described = members["task"]
    plain = ("external_task_id", "provider", "provider_task_id", "request_hash", "adopt", "series", "expected",
             "contradicted", "completeness_reads", "error", "note", "units")  # fmt: skip
    times = ("created_at", "sent_at", "submitted_at", "completed_at", "files_expire_at")
    values: dict[str, Any] = {name: described[name] for name in plain}
    values |= {name: _time(described[name]) for name in times}
    return Task(
        **values,
        id=uuid.UUID(described["id"]),
        request=members["request"],
        state=TaskState(described["state"]),
        archive=ArchiveState(described["archive"]),
        archived_at=listed.modified_at,
        manifest_key=key,
        manifest_digest=members["digest"],
        manifests=manifest_number(key) or 1,
    )


def asset_from(task: Task, described: Mapping[str, Any]) -> Asset:
    """The asset row described by a manifest. Its source URL lacks the signature, which is not in the manifest."""
    plain = ("kind", "index", "original", "key", "sha256", "size", "media_type", "width", "height", "verified",
             "accept_unverified", "fetched", "superseded", "error")  # fmt: skip
    times = ("created_at", "files_expire_at", "archived_at")
    values: dict[str, Any] = {name: described[name] for name in plain}
    values |= {name: _time(described[name]) for name in times}
    values |= {name: described.get(name) for name in manifest.ODD}
    values |= {"unusable_since": _time(described.get("unusable_since"))}
    values |= {"unusable_tries": values["unusable_tries"] or 0, "unconfirmed": bool(values["unconfirmed"])}
    asset = Asset(
        **values,
        id=uuid.UUID(described["id"]),
        task_id=task.id,
        source_url=described["source"],
        state=AssetState(described["state"]),
        # The old link has expired, so the next try reads the task for a new one.
        **(claims.due(values["created_at"]) if described["state"] == AssetState.DUE else {}),
    )
    if asset.id != tasks.asset_id(task.id, AssetName(asset.kind, asset.index, asset.original)):
        raise ValueError(f"{asset.kind} {asset.index} has another task's id")
    return asset


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
