"""A task for people and programs: its rows, whether it is over, and the JSON of `receiver status ID --json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from receiver.base.visible import MAX_PRETTY_CHARS, cut, masked, seen, short
from storage import states
from storage.accounts import pauses
from storage.accounts.accepted_creates import was_accepted
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.errors import NoSuchTask
from storage.rows import events, tasks
from storage.rows.models import Asset, Event, Task
from storage.states import ArchiveState, AssetState, TaskState

# Tasks that are read together. Larger groups are no faster.
TOGETHER = 500
# The longest value of a request that is shown, such as an uploaded picture's.
MAX_VALUE_CHARS = 4_000


def find(database: Database, name: str) -> tuple[Task, list[Asset], list[Event]]:
    """The task with its assets and events, by its external or its own id. Raises `NoSuchTask`."""
    with database.read() as session:
        task = tasks.by_name(session, name)
        if task is None:
            raise NoSuchTask(name)
        return task, tasks.assets_of(session, task.id), events.of_task(session, task.id)


def is_over(task: Task) -> bool:
    """Whether the task has ended. An incomplete one may still change while a file of it is tried."""
    if task.archive in (ArchiveState.ARCHIVED, ArchiveState.INCOMPLETE):
        return True
    return task.state in states.TERMINAL and task.archive is ArchiveState.NONE


def why_not(task: Task, assets: Sequence[Asset]) -> str | None:
    """Why a task failed, or why a file of it was given up."""
    if task.state is TaskState.FAILED:
        return task.error
    return next((asset.error for asset in assets if asset.state is AssetState.FAILED), None)


def waits_for(task: Task, assets: Sequence[Asset]) -> list[str]:
    """What keeps an unfinished task: the last answers to its files, else to its own step. Empty before a first one."""
    errors = {asset.error for asset in assets if asset.state is AssetState.DUE and asset.error}
    if errors or not task.attempts or not task.note or tasks.request_note(task):
        return sorted(errors)
    return [task.note]


def can_retry(task: Task, assets: Sequence[Asset]) -> bool:
    """Whether `retry` would do anything."""
    if task.deleted_at is not None or task.archive is ArchiveState.ARCHIVED:
        return False
    if task.state is TaskState.FAILED:  # a retry reads it, and of a refused create the provider has nothing
        return task.step is not None or was_accepted(task)
    failed = any(asset.state is not AssetState.ARCHIVED for asset in assets)
    return failed or task.step is not None or task.archive is ArchiveState.INCOMPLETE


def next_step(database: Database, task: Task, assets: Sequence[Asset]) -> tuple[str, datetime | None]:
    """What happens next without a person, as the key of a text `next.…`, and when. No time while a worker is at it."""
    if task.deleted_at is not None:
        return "deleted", None
    if task.queued_at is not None:
        with database.read() as session:
            paused = pauses.holding(session, task)
        return ("paused", max(each.trial_at for each in paused)) if paused else ("queued", None)
    if task.step is not None:
        return (task.step, None if task.lease else task.due_at) if task.due_at else ("parked", None)
    if task.archive is ArchiveState.ARCHIVING or any(asset.state is AssetState.DUE for asset in assets):
        return "files", None
    return "retry" if can_retry(task, assets) else "nothing", None


def report(database: Database, bucket: Bucket, external_task_id: str) -> dict[str, Any]:
    """The JSON of `receiver status ID --json`."""
    task, assets, facts = find(database, external_task_id)
    return _report(bucket, task, assets, [(fact.name, fact.at) for fact in facts])


def reports(database: Database, bucket: Bucket, limit: int) -> Iterator[dict[str, Any]]:
    """The same JSON for the newest tasks. Each group of `TOGETHER` takes four statements; three per task took 12 s for
    10,000 tasks.
    """
    for skip in range(0, limit, TOGETHER):
        with database.read() as session:
            found = tasks.newest(session, min(TOGETHER, limit - skip), skip=skip)
            ids = [task.id for task in found]
            assets, facts = tasks.assets_of_all(session, ids), events.timelines(session, ids)
        for task in found:
            yield _report(bucket, task, assets[task.id], facts[task.id])
        if len(found) < TOGETHER:
            return


def _report(
    bucket: Bucket, task: Task, assets: Sequence[Asset], timeline: Sequence[tuple[str, datetime]]
) -> dict[str, Any]:
    return {
        **facts_of(task),
        "assets": [_asset(bucket, asset) for asset in assets],
        "events": [{"name": name, "at": at.isoformat()} for name, at in timeline],
    }


def facts_of(task: Task) -> dict[str, Any]:
    """The task's own part of this JSON, and of its line in the report of a batch."""
    return {
        "external_task_id": task.external_task_id,
        "task_id": str(task.id),
        "provider_task_id": task.provider_task_id,
        "state": task.state,
        "archive": task.archive,
        "expected": task.expected,
        "units": task.units,
        "error": task.error,
        "note": task.note,
    }


def waiting_of(asset: Asset) -> dict[str, Any] | None:
    """The retries of an unusable file: since when, how many, and the next time. None for other files.

    `next_try_at`: the end of its lease while a worker tries it.
    """
    if asset.unusable_since is None or asset.due_at is None:
        return None
    since, due_at = (moment.isoformat(timespec="seconds") for moment in (asset.unusable_since, asset.due_at))
    return {"since": since, "tries": asset.unusable_tries, "next_try_at": due_at}


def next_try_of(asset: Asset) -> str | None:
    """When a file is tried again that met an error, for example a host that asks for an hour. None for other files."""
    waits = asset.state is AssetState.DUE and asset.error and asset.due_at is not None
    return asset.due_at.isoformat(timespec="seconds") if waits and asset.due_at else None


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
        **({"next_try_at": next_try} if (next_try := next_try_of(asset)) else {}),
        **({"waiting": waiting} if waiting else {}),
    }


def request_of(task: Task, most: int) -> str:
    """The request as JSON. Long values such as uploaded pictures are cut."""
    shown = json.dumps({name: _brief(value) for name, value in task.request.items()}, indent=2, ensure_ascii=False)
    return cut(seen(shown), most) if task.request and len(shown) <= MAX_PRETTY_CHARS else ""


def _brief(value: Any) -> Any:
    if isinstance(value, str):
        return cut(masked(value) if value.lstrip()[:4].lower() == "http" else value, MAX_VALUE_CHARS)
    if isinstance(value, list):
        return [_brief(each) for each in value]
    return {name: _brief(each) for name, each in value.items()} if isinstance(value, dict) else value


def lost_pictures(request: Mapping[str, Any]) -> int:
    """How many pictures of a stored request are kept as a hash alone."""
    return sum(not isinstance(each["image"], str) for each in request.get("image_list", ()))


def with_pictures(request: Mapping[str, Any], pictures: Iterable[str]) -> dict[str, Any]:
    """A stored request with these pictures (Base64) in place of the lost ones, in their order."""
    given, images = iter(pictures), request.get("image_list", ())
    filled = [each if isinstance(each["image"], str) else {"image": next(given)} for each in images]
    return {**request, "image_list": filled} if filled else dict(request)


def prompt_of(task: Task, most: int = 160) -> str:
    """The beginning of the prompt."""
    prompt = task.request.get("prompt")
    return short(prompt, most) if isinstance(prompt, str) else ""


def model_of(task: Task) -> str:
    model = task.request.get("model_name")
    return short(model, 60) if isinstance(model, str) else ""
