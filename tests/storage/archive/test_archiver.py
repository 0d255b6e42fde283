"""One asset row becomes one object: takeovers, existing objects, and when it is given up."""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Any, BinaryIO

import pytest
from sqlalchemy import update
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from receiver.tasks.operate import Operator
from storage.archive.archiver import Archiver
from storage.archive.delete import Refused, delete
from storage.bucket.bucket import Bucket
from storage.fetch.client import Fetched, Fetcher
from storage.keys import object_key
from storage.rows import claims
from storage.rows.events import EventName
from storage.rows.models import Asset, Event, Task
from storage.states import ArchiveState, AssetState
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.harness import wait_until
from tests.pipeline import Wired, assert_archived, assets_of, kept, make_due_now, run, task_of
from tests.rows import LONG_AGO, event_names

PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat"}
# Claims and columns are tested on both, what becomes of the object on one.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")


@pytest.fixture
def changes() -> dict[str, Any]:
    """No public URL, and polls far away: a test makes a read due itself."""
    return {"public_url": "", "poll_after_seconds": 3_600}


def with_due_assets(parts: Parts, sandbox: Sandbox, pictures: int = 1) -> Task:
    """A succeeded task whose pictures wait for a worker."""
    parts.submitter.submit({**PLAIN, "n": pictures}, external_task_id="task")
    wait_until(lambda: sandbox.ledger().task("task").status == "succeed")
    make_due_now(parts)
    run(parts, "reads")
    assert len(assets_of(parts, task_of(parts, "task"))) == pictures
    return task_of(parts, "task")


def only_asset(parts: Parts) -> Asset:
    (asset,) = assets_of(parts, task_of(parts, "task"))
    return asset


def abandon(parts: Parts, **values: Any) -> None:
    """The row of a worker that died before it could settle it; its lease has run out."""
    left = {"state": AssetState.DUE, "lease": uuid.uuid4(), "due_at": LONG_AGO, "archived_at": None, **values}
    with parts.database.write() as session:
        session.execute(update(Asset).values(left))
        session.execute(update(Task).values(step=None, due_at=None))


def claim(parts: Parts, *, alone: bool = False, lease_seconds: float = 60) -> Asset:
    with parts.database.write() as session:
        (row,) = claims.claim(session, Asset, limit=1, lease_seconds=lease_seconds, alone=alone)
    return row


def work(parts: Parts, row: Asset) -> None:
    (lane,) = (lane for lane in parts.lanes() if lane.name == "assets")
    lane.work(row)


def hits(sandbox: Sandbox) -> int:
    return sum(asset.hits for asset in sandbox.ledger().task("task").assets)


LARGE = {"public_url": "", "poll_after_seconds": 3_600, "spool_dir": "/nowhere"}


@pytest.mark.parametrize("database_kind", ["sqlite"])
@pytest.mark.parametrize("changes", [LARGE])
def test_a_missing_spool_folder_is_reported_and_ends_no_worker(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.world.knobs = sandbox.world.knobs.model_copy(update={"picture_bytes": 6_000_000})
    with_due_assets(parts, sandbox)
    run(parts, "assets")
    asset = only_asset(parts)
    assert (asset.state, asset.losses, asset.due_at is not None) == (AssetState.DUE, 0, True)
    assert "RECEIVER_SPOOL_DIR: /nowhere cannot be written (No such file or directory)" in str(asset.error)


def put(parts: Parts, key: str, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    parts.bucket.put_once(
        key, io.BytesIO(content), sha256=digest, size=len(content), media_type="image/png", metadata={}
    )  # fmt: skip


@pytest.mark.databases("sqlite")
@BOTH
def test_archived_asset_row_describes_its_object(parts: Parts, sandbox: Sandbox) -> None:
    task = with_due_assets(parts, sandbox)
    run(parts, "assets", "finishes")
    (made,), asset = sandbox.ledger().task("task").assets, only_asset(parts)
    assert (asset.state, asset.sha256, asset.size) == (AssetState.ARCHIVED, made.sha256, made.size)
    assert (asset.media_type, asset.error, asset.due_at, asset.lease) == ("image/png", None, None, None)
    stored = parts.bucket.head(str(asset.key))
    assert stored is not None and (stored.sha256, stored.media_type) == (made.sha256, "image/png")
    assert stored.metadata["task"] == "task" and stored.metadata["task-id"] == str(task.id)
    assert event_names(parts.database, task)[-2:] == ["asset.archived", "task.archived"]


def test_of_the_pictures_of_a_task_the_last_one_wakes_workers(parts: Parts, sandbox: Sandbox) -> None:
    """Nothing is due after the others, and a wake-up is a check in every worker."""
    with_due_assets(parts, sandbox, pictures=2)
    parts.worker()  # from now on, groups of writes number their events
    wakes = list[bool]()
    for _ in range(2):
        row = claim(parts)
        parts.database.woken.clear()
        work(parts, row)
        wakes.append(parts.database.woken.is_set())
    assert wakes == [False, True]


def test_worker_that_takes_over_finds_the_object_and_downloads_nothing(parts: Parts, sandbox: Sandbox) -> None:
    with_due_assets(parts, sandbox)
    run(parts, "assets")
    abandon(parts)
    run(parts, "assets", "finishes")
    assert hits(sandbox) == 1
    assert_archived(parts, sandbox, task_of(parts, "task"))


def test_worker_that_takes_over_before_the_put_downloads_again(parts: Parts, sandbox: Sandbox) -> None:
    with_due_assets(parts, sandbox)
    run(parts, "assets")
    parts.bucket.delete(str(only_asset(parts).key))
    abandon(parts)
    run(parts, "assets", "finishes")
    assert hits(sandbox) == 2
    assert_archived(parts, sandbox, task_of(parts, "task"))


class Overtaken(Fetcher):
    """While it downloads, something else happens."""

    meanwhile: Callable[[], None]

    def fetch(self, url: str, sink: BinaryIO, **options: Any) -> Fetched:
        self.meanwhile()
        return super().fetch(url, sink, **options)


def archiver(parts: Parts, fetcher: Fetcher) -> Archiver:
    return Archiver(parts.database, parts.bucket, fetcher, parts.schedule)


@pytest.mark.parametrize(("picture_bytes", "waits"), [(20_000, ["noted", "archived"]), (6_000_000, ["archived"])])
def test_a_wait_for_a_commit_lends_the_place_unless_the_file_is_on_disk(
    parts: Parts, sandbox: Sandbox, picture_bytes: int, waits: list[str]
) -> None:
    sandbox.world.knobs = sandbox.world.knobs.model_copy(update={"picture_bytes": picture_bytes})
    with_due_assets(parts, sandbox)
    waited: list[tuple[str, int]] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        yield
        asset = only_asset(parts)
        waited.append(("archived" if asset.archived_at else "noted" if asset.key else "due", len(kept(parts))))

    Archiver(parts.database, parts.bucket, parts.fetcher, parts.schedule, waiting=waiting).work(claim(parts))
    assert waited == [(what, int(what == "archived")) for what in waits]


def test_an_object_with_other_bytes_that_came_late_is_recorded_as_superseded(parts: Parts, sandbox: Sandbox) -> None:
    task = with_due_assets(parts, sandbox)
    earlier = b"what a frozen worker had downloaded"
    digest = hashlib.sha256(earlier).hexdigest()
    key = object_key(parts.bucket.prefix, task.created_at, "task", "image", 0, digest, "png")
    abandon(parts, key=key, sha256=digest, size=len(earlier))
    fetcher = Overtaken(parts.address_policy, max_bytes=10**6)
    fetcher.meanwhile = lambda: put(parts, key, earlier)
    archiver(parts, fetcher).work(claim(parts))
    fetcher.close()
    asset = only_asset(parts)
    assert (asset.state, asset.superseded) == (AssetState.ARCHIVED, [key])
    assert set(kept(parts)) == {key, asset.key} and asset.key != key


def test_another_object_under_our_key_is_not_overwritten(parts: Parts, sandbox: Sandbox) -> None:
    task = with_due_assets(parts, sandbox)
    (made,) = sandbox.ledger().task("task").assets
    key = object_key(parts.bucket.prefix, task.created_at, "task", "image", 0, made.sha256, "png")
    put(parts, key, b"somebody else's")
    run(parts, "assets", "finishes")
    asset = only_asset(parts)
    assert asset.state is AssetState.FAILED and "another object" in str(asset.error)
    assert kept(parts)[key] == hashlib.sha256(b"somebody else's").hexdigest()
    assert task_of(parts, "task").archive is ArchiveState.INCOMPLETE


@pytest.mark.parametrize("changes", [{"public_url": "", "poll_after_seconds": 3_600, "max_asset_bytes": 10_000}])
def test_too_large_file_is_given_up_at_once_and_noted_in_the_manifest(parts: Parts, sandbox: Sandbox) -> None:
    with_due_assets(parts, sandbox)
    run(parts, "assets", "finishes")
    task, asset = task_of(parts, "task"), only_asset(parts)
    assert (asset.state, asset.attempts, task.archive) == (AssetState.FAILED, 1, ArchiveState.INCOMPLETE)
    assert set(kept(parts)) == {task.manifest_key}
    manifest = json.loads(parts.bucket.read_bytes(str(task.manifest_key), 2**20))
    assert [(entry["state"], entry["error"]) for entry in manifest["assets"]] == [("failed", asset.error)]
    assert event_names(parts.database, task)[-2:] == ["asset.failed", "task.incomplete"]


@BOTH
def test_a_row_that_ended_six_workers_is_parked(parts: Parts, sandbox: Sandbox) -> None:
    with_due_assets(parts, sandbox)
    abandon(parts, losses=claims.PARK_LOSSES - 1)
    assert run(parts, "assets") == 0  # rows in quarantine need a process that does nothing else
    work(parts, claim(parts, alone=True))
    run(parts, "finishes")
    asset = only_asset(parts)
    assert asset.state is AssetState.FAILED and "receiver retry" in str(asset.error)
    assert (hits(sandbox), task_of(parts, "task").archive) == (0, ArchiveState.INCOMPLETE)


@pytest.mark.databases("sqlite")
@BOTH
def test_a_suspect_that_lets_its_worker_live_is_archived(parts: Parts, sandbox: Sandbox) -> None:
    with_due_assets(parts, sandbox)
    abandon(parts, losses=claims.QUARANTINE_AFTER)
    work(parts, claim(parts, alone=True))
    run(parts, "finishes")
    assert only_asset(parts).losses == 0
    assert_archived(parts, sandbox, task_of(parts, "task"))


@BOTH
def test_a_worker_whose_claim_was_lost_writes_no_row_and_puts_no_object(parts: Parts, sandbox: Sandbox) -> None:
    with_due_assets(parts, sandbox)
    frozen = claim(parts)
    make_due_now(parts, Asset)
    owner = claim(parts)
    work(parts, frozen)
    assert kept(parts) == {} and only_asset(parts).lease == owner.lease
    work(parts, owner)
    run(parts, "finishes")
    assert_archived(parts, sandbox, task_of(parts, "task"))


@BOTH
@pytest.mark.parametrize("answer", ["success", "an error"])
def test_an_object_that_arrives_after_its_tasks_deletion_is_removed(
    parts: Parts, sandbox: Sandbox, seaweed: Seaweed, answer: str
) -> None:
    with_due_assets(parts, sandbox)
    operator = Operator(parts.database, parts.providers, parts.schedule)

    def slow(request: Request, forward: Forward) -> Answer:
        if not request.puts_an_object:
            return forward(request)
        if request.path.startswith(f"/{parts.bucket.name}/") and not task_of(parts, "task").deleted_at:
            operator.dismiss("task", "not wanted")
            with pytest.raises(Refused, match="a worker may still be storing a file of this task: delete it after "):
                delete(parts.database, parts.bucket, "task")
            end_noted_lease(parts)
            assert delete(parts.database, parts.bucket, "task")
        stored = forward(request)
        return stored if answer == "success" else Answer(500, {}, b"")

    with FaultProxy(seaweed, slow) as proxy:
        behind = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
        with closing(Wired(parts.settings, bucket=behind)) as slowly:
            work(slowly, claim(parts))
    assert task_of(parts, "task").deleted_at and kept(parts) == {}


def end_noted_lease(parts: Parts) -> None:
    """Move the end of the lease that a dismissal has noted to the past."""
    with parts.database.write() as session:
        noted = session.exec(select(Event).where(Event.name == EventName.TASK_INCOMPLETE)).one()
        noted.data = {**noted.data, "held_until": LONG_AGO.isoformat()}
        session.add(noted)


@BOTH
def test_a_dead_url_waits_for_a_read_that_brings_a_new_one(parts: Parts, sandbox: Sandbox) -> None:
    task = with_due_assets(parts, sandbox, 2)
    with parts.database.write() as session:
        dead = update(Asset).where(col(Asset.index) == 0).values(source_url=f"{sandbox.url}/cdn/gone.png")
        session.execute(dead)
    run(parts, "assets")  # the other picture is archived afterwards and does not cancel the requested read
    assert sorted(asset.state for asset in assets_of(parts, task)) == [AssetState.ARCHIVED, AssetState.DUE]
    assert run(parts, "reads") == 1
    run(parts, "assets", "finishes")
    assert_archived(parts, sandbox, task_of(parts, "task"))


@pytest.mark.databases("sqlite")
@BOTH
def test_failed_tries_are_kept_with_their_errors_also_once_the_file_is_archived(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.archive.archiver.KEPT_TRIES", 3)
    with_due_assets(parts, sandbox, 1)
    url = only_asset(parts).source_url
    for place in "abcd":
        set_url(parts, f"{sandbox.url}/cdn/gone-{place}.png")
        make_due_now(parts)
        run(parts, "assets")
    tries = only_asset(parts).failed_tries or []
    assert len(tries) == 3 and all(datetime.fromisoformat(each["at"]).tzinfo and each["error"] for each in tries)
    set_url(parts, url)
    make_due_now(parts)
    run(parts, "assets")
    assert only_asset(parts).state is AssetState.ARCHIVED and only_asset(parts).failed_tries == tries


def set_url(parts: Parts, url: str) -> None:
    with parts.database.write() as session:
        session.execute(update(Asset).values(source_url=url))
