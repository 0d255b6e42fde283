"""Multipart uploads: memory, a worker killed half-way, and leftovers of crashes in the bucket."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.archive.folders import sweep_uploads
from storage.bucket import bucket
from storage.rows.models import Asset
from storage.states import AssetState
from tests.archived_tasks import archive, work_off
from tests.bench.large_video import MOST_ABOVE_IDLE_BYTES, run, uploads
from tests.pipeline import assert_archived, assets_of, task_of
from tests.rows import LONG_AGO

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"])
# Above the threshold of 64 MiB; five parts.
MEGABYTES = 80


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"public_url": "", "confirm": "never", "poll_after_seconds": 3_600}


def test_video_is_archived_after_its_worker_is_killed_during_the_upload(parts: Parts, tmp_path: Path) -> None:
    figures = run(parts, tmp_path, MEGABYTES, crash=True)
    assert len(figures.downloads) == 2 and figures.above_idle < MOST_ABOVE_IDLE_BYTES


def begin_upload(parts: Parts, key: str) -> None:
    parts.bucket._client().create_multipart_upload(Bucket=parts.bucket.name, Key=key)


def test_worker_that_takes_over_aborts_the_previous_upload(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "MULTIPART_THRESHOLD_BYTES", 1_000)
    (task,) = archive(parts, 1)
    (asset,) = assets_of(parts, task)
    parts.bucket.delete(str(asset.key))
    begin_upload(parts, str(asset.key))
    begin_upload(parts, parts.bucket.prefix + "another's.mp4")
    with parts.database.write() as session:
        left = {"state": AssetState.DUE, "lease": uuid.uuid4(), "due_at": LONG_AGO, "archived_at": None}
        session.execute(update(Asset).values(left))
    work_off(parts)
    assert [upload["Key"] for upload in uploads(parts.bucket)] == [parts.bucket.prefix + "another's.mp4"]
    assert_archived(parts, sandbox, task_of(parts, task.external_task_id))
    assert parts.bucket.abort_uploads(parts.bucket.prefix) == 1


def test_sweep_aborts_only_old_uploads_in_our_layout(parts: Parts) -> None:
    ours = parts.bucket.prefix + "2026/11/23/task/video-0-1f6c3e0a9b42.mp4"
    others = [parts.bucket.prefix + name for name in ("backup.tar", "2026/11/23/notes.txt", ours[-12:])]
    for key in (ours, *others):
        begin_upload(parts, key)
    assert sweep_uploads(parts.bucket) == 0
    assert sweep_uploads(parts.bucket, older_than_seconds=0) == 1
    assert sorted(upload["Key"] for upload in uploads(parts.bucket)) == sorted(others)
    assert parts.bucket.abort_uploads(parts.bucket.prefix) == 3
