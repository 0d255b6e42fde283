"""Two workers settle the last two files of a task at the same instant: one manifest, each time.

RECEIVER_TEST_PAIRS=500 for the long form.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlmodel import col, select

from receiver.app.wiring import Parts
from storage.archive.archiver import Archiver
from storage.bucket.bucket import Bucket
from storage.keys import object_key
from storage.rows import claims
from storage.rows.models import Asset, Event, Task
from storage.states import ArchiveState, AssetState, TaskState
from tests.archived_tasks import put
from tests.pipeline import Wired, insert_row, kept, run
from tests.rows import LONG_AGO, new_asset

PAIRS = int(os.environ.get("RECEIVER_TEST_PAIRS", "10"))
CONTENT = b"what both have put already"


class Together:
    """The bucket of one of two workers: both find their object, then both settle."""

    def __init__(self, bucket: Bucket, barrier: threading.Barrier) -> None:
        self._bucket, self._barrier = bucket, barrier

    def holds(self, *place: Any, **what: Any) -> bool:
        found = self._bucket.holds(*place, **what)
        self._barrier.wait()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bucket, name)


@pytest.fixture
def workers(parts: Parts) -> Iterator[list[Parts]]:
    """Two workers with database connections of their own."""
    made = [Wired(parts.settings, bucket=parts.bucket) for _ in range(2)]
    yield made
    for each in made:
        each.close()


def two_of_one_task(parts: Parts, number: int) -> list[Asset]:
    """A succeeded task whose two files are in the bucket, unsettled, each claimed by a worker that checks for it."""
    task = insert_row(
        parts, external_task_id=f"pair-{number}", state=TaskState.SUCCEEDED, archive=ArchiveState.ARCHIVING,
        expected=2, step=None, due_at=None,
    )  # fmt: skip
    for index in range(2):
        content = CONTENT + bytes([index])
        digest = hashlib.sha256(content).hexdigest()
        key = object_key(parts.bucket.prefix, task.created_at, task.external_task_id, "image", index, digest, "png")
        put(parts, key, content)
        with parts.database.write() as session:
            new_asset(session, task, index, key=key, sha256=digest, size=len(content), due_at=LONG_AGO)
    with parts.database.write() as session:
        return claims.claim(session, Asset, limit=2, lease_seconds=60)


def settle_together(workers: list[Parts], assets: list[Asset]) -> None:
    barrier = threading.Barrier(2, timeout=30)

    def settle(parts: Parts, asset: Asset) -> None:
        bucket: Any = Together(parts.bucket, barrier)
        Archiver(parts.database, bucket, parts.fetcher, parts.schedule).work(asset)
        run(parts, "finishes")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(settle, workers, assets))


def test_the_last_two_files_end_in_one_manifest(parts: Parts, workers: list[Parts]) -> None:
    for number in range(PAIRS):
        settle_together(workers, two_of_one_task(parts, number))
    manifests = [key for key in kept(parts) if "/manifest" in key]
    with parts.database.read() as session:
        tasks = session.exec(select(Task)).all()
        states = {asset.state for asset in session.exec(select(Asset))}
        told = session.exec(select(Event.task_id).where(col(Event.name) == "task.archived")).all()
    assert {(task.archive, task.manifests, task.step) for task in tasks} == {(ArchiveState.ARCHIVED, 1, None)}
    assert (len(tasks), states) == (PAIRS, {AssetState.ARCHIVED})
    assert sorted(manifests) == sorted(str(task.manifest_key) for task in tasks)
    assert sorted(told) == sorted(task.id for task in tasks)
