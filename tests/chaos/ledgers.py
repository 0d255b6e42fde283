"""Three ledgers that must agree: the provider's, the rows, and the bucket."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import boto3
from sqlmodel import select

from receiver.sandbox.ledger import AssetKey, Ledger
from storage.database.sessions import Database
from storage.keys import manifest_key
from storage.rows.events import EventName
from storage.rows.models import Asset, Callback, Event, Task
from storage.states import ArchiveState, AssetState, TaskState
from tests.chaos.stage import Stage
from tests.running_product import BUCKET

PROBE_FOLDER = ".receiver-probe/"


@dataclass
class Rows:
    """All rows, by the names the provider knows them by."""

    tasks: dict[str, Task]
    assets: dict[AssetKey, Asset]
    twins: int  # asset rows that share a name with another
    events: list[Event]
    pushed: set[tuple[str, str]]  # (task's external id, SHA-256 of the body)


@dataclass
class Findings:
    """The disagreements of the ledgers. Every list but `probe_leftovers` must be empty.

    `probe_leftovers`: small objects of the store's probe whose process was killed before it removed them.
    """

    accepted: int = 0
    archived: int = 0
    deliveries: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong_hash: list[str] = field(default_factory=list)
    orphaned: list[str] = field(default_factory=list)
    missing_deliveries: list[str] = field(default_factory=list)
    probe_leftovers: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, list[str]]:
        return {
            "lost": self.lost,
            "doubled": self.doubled,
            "wrong hash": self.wrong_hash,
            "orphaned objects": self.orphaned,
            "accepted deliveries missing": self.missing_deliveries,
        }


def reconcile(stage: Stage, accepted: Iterable[str]) -> Findings:
    """Compare the three. `accepted`: external ids of the tasks that `submit` accepted."""
    ledger, rows, objects = stage.sandbox.ledger(), read_rows(stage.parts.database), read_objects(stage)
    accepted = sorted(accepted)
    told = [callback for callback in ledger.callbacks if callback.delivered]
    hashes = {(str(each.external_task_id), hashlib.sha256(each.body).hexdigest()) for each in told}
    named = names_of_objects(rows)
    strangers = sorted(objects.keys() - named)
    return Findings(
        accepted=len(accepted),
        archived=sum(asset.state is AssetState.ARCHIVED for asset in rows.assets.values()),
        deliveries=len(told),
        lost=list(lost(accepted, ledger, rows, objects)),
        doubled=list(doubled(ledger, rows, objects)),
        wrong_hash=list(wrong_hash(ledger, rows, objects)),
        orphaned=[key for key in strangers if not key.startswith(PROBE_FOLDER)],
        missing_deliveries=[f"{task} {digest}" for task, digest in sorted(hashes - rows.pushed)],
        probe_leftovers=[key for key in strangers if key.startswith(PROBE_FOLDER)],
    )


def lost(accepted: list[str], ledger: Ledger, rows: Rows, objects: dict[str, str]) -> Iterable[str]:
    """Pictures of the provider that are not archived, and tasks that did not end."""
    ends = {"succeed": (TaskState.SUCCEEDED, ArchiveState.ARCHIVED), "failed": (TaskState.FAILED, ArchiveState.NONE)}
    made = {task.external_task_id: task.status for task in ledger.tasks}
    for name in accepted:
        task = rows.tasks.get(name)
        stands = task and (task.state, task.archive)
        if task is None or name not in made or stands != ends.get(made[name]):
            words = task and f"{task.state} {task.archive} step={task.step} due={task.due_at} {task.error or task.note}"
            yield f"task {name}: {made.get(name, 'unknown')} at the provider, here {words}"
    for key in ledger.assets:
        asset = rows.assets.get(key)
        if asset is None or asset.state is not AssetState.ARCHIVED or asset.key not in objects:
            yield f"asset {key}: {asset and (asset.state, asset.attempts, asset.losses, asset.due_at, asset.error)}"


def doubled(ledger: Ledger, rows: Rows, objects: dict[str, str]) -> Iterable[str]:
    """What happened twice: an event, an object, a task at the provider, a row."""
    facts: Counter[Any] = Counter()
    for event in rows.events:
        if event.name == EventName.ASSET_ARCHIVED:
            facts[event.name, event.task_id, event.data["kind"], event.data["index"]] += 1
        elif event.name in (EventName.TASK_ARCHIVED, EventName.TASK_INCOMPLETE):
            facts["task ended its archive", event.task_id] += 1
    yield from (f"{count} times {fact}" for fact, count in facts.items() if count > 1)
    files = Counter(key.rpartition("-")[0] for key in objects if key.endswith(".png"))  # the name without its hash
    yield from (f"{count} objects {name}" for name, count in files.items() if count > 1)
    made = Counter(task.external_task_id for task in ledger.tasks)
    yield from (f"{count} tasks at the provider for {name}" for name, count in made.items() if count > 1)
    yield from [f"{rows.twins} asset rows with the name of another"] * bool(rows.twins)
    yield from (f"a row for {key}, which the provider never made" for key in rows.assets.keys() - ledger.assets.keys())


def wrong_hash(ledger: Ledger, rows: Rows, objects: dict[str, str]) -> Iterable[str]:
    """Objects and rows whose SHA-256 is not that of the file the provider made."""
    for key, digest in ledger.sha256.items():
        asset = rows.assets.get(key)
        if asset is None or asset.state is not AssetState.ARCHIVED:
            continue  # lost, and reported as lost
        held = objects.get(str(asset.key))
        if asset.sha256 != digest or held not in (None, digest):
            yield f"{key}: provider {digest[:12]}, row {str(asset.sha256)[:12]}, object {str(held)[:12]}"


def names_of_objects(rows: Rows) -> set[str]:
    """Every key that belongs to some row."""
    files = {key for asset in rows.assets.values() for key in (asset.key, *asset.superseded) if key}
    manifests = {
        manifest_key("", task.created_at, task.external_task_id, number)
        for task in rows.tasks.values()
        for number in range(1, task.manifests + 1)
    }
    return files | manifests


def read_rows(database: Database) -> Rows:
    with database.read() as session:
        tasks = {task.id: task for task in session.exec(select(Task))}
        assets = list(session.exec(select(Asset)))
        events = list(session.exec(select(Event)))
        pushed = list(session.exec(select(Callback).where(Callback.source == "push")))
    named = {(tasks[each.task_id].external_task_id, each.kind, each.index): each for each in assets}
    bodies = {
        (tasks[each.task_id].external_task_id, hashlib.sha256(each.body).hexdigest())
        for each in pushed
        if each.task_id in tasks
    }
    by_name = {task.external_task_id: task for task in tasks.values()}
    return Rows(by_name, named, len(assets) - len(named), events, bodies)


def read_objects(stage: Stage) -> dict[str, str]:
    """{key: SHA-256 of the bytes as they are read back}, straight from the store and not through our own code."""
    client = boto3.Session().client(
        "s3",
        endpoint_url=stage.seaweed.endpoint_url,
        aws_access_key_id=stage.seaweed.access_key,
        aws_secret_access_key=stage.seaweed.secret_key,
        region_name="us-east-1",
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [each["Key"] for page in pages for each in page.get("Contents", ())]
    bodies = ((key, client.get_object(Bucket=BUCKET, Key=key)["Body"].read()) for key in keys)
    return {key: hashlib.sha256(body).hexdigest() for key, body in bodies}
