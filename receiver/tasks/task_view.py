"""A task for people and programs: its rows, whether it is over, and the JSON of `receiver status ID --json`."""

from __future__ import annotations

from typing import Any

from storage import states
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.errors import NoSuchTask
from storage.rows import events, tasks
from storage.rows.models import Asset, Event, Task
from storage.states import ArchiveState, AssetState


def find(database: Database, external_task_id: str) -> tuple[Task, list[Asset], list[Event]]:
    """The task with its assets and facts. Raises `NoSuchTask`."""
    with database.read() as session:
        task = tasks.by_external_id(session, external_task_id)
        if task is None:
            raise NoSuchTask(external_task_id)
        return task, tasks.assets_of(session, task.id), events.of_task(session, task.id)


def is_over(task: Task) -> bool:
    """Whether the task has ended. An incomplete one may still change while a file of it is tried."""
    if task.archive in (ArchiveState.ARCHIVED, ArchiveState.INCOMPLETE):
        return True
    return task.state in states.TERMINAL and task.archive is ArchiveState.NONE


def report(database: Database, bucket: Bucket, external_task_id: str) -> dict[str, Any]:
    """The public form of `receiver status ID --json`."""
    task, assets, facts = find(database, external_task_id)
    return {
        "external_task_id": task.external_task_id,
        "task_id": str(task.id),
        "provider_task_id": task.provider_task_id,
        "state": task.state,
        "archive": task.archive,
        "expected": task.expected,
        "error": task.error,
        "note": task.note,
        "assets": [_asset(bucket, asset) for asset in assets],
        "events": [{"name": fact.name, "at": fact.at.isoformat()} for fact in facts],
    }


def waiting_of(asset: Asset) -> dict[str, Any] | None:
    """When a file came unusable and is tried again: since when, how often, when next. None for other files.

    `next_try_at`: the end of its lease while a worker tries it.
    """
    if asset.unusable_since is None or asset.due_at is None:
        return None
    since, due_at = (moment.isoformat(timespec="seconds") for moment in (asset.unusable_since, asset.due_at))
    return {"since": since, "tries": asset.unusable_tries, "next_try_at": due_at}


def _asset(bucket: Bucket, asset: Asset) -> dict[str, Any]:
    kept, waiting = asset.state is AssetState.ARCHIVED, waiting_of(asset)
    return {
        "id": str(asset.id),
        "kind": asset.kind,
        "index": asset.index,
        "state": asset.state,
        "key": asset.key if kept else None,
        "uri": bucket.uri(asset.key) if kept and asset.key else None,
        "sha256": asset.sha256,
        "size": asset.size,
        "media_type": asset.media_type,
        "error": asset.error,
        "trailing_bytes": (asset.trailing_bytes or 0) if kept else None,
        "notes": asset.notes or [],
        **({"waiting": waiting} if waiting else {}),
    }
