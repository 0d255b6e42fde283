"""Export of verified files, deletion of a task, and put options."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from sqlalchemy import update
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.base import config
from receiver.cli.archive import _chosen
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from storage.archive.audit import Audit
from storage.archive.delete import Refused, delete
from storage.archive.export import Export, tasks_between
from storage.bucket.bucket import Bucket
from storage.bucket.put_options import PutOptions, parse_tags
from storage.errors import StoreUnavailable
from storage.operations.rollups import HOUR, Arrivals
from storage.rows.models import Asset, Callback, Task
from storage.states import ArchiveState, TaskState
from tests.archived_tasks import all_assets, archive, flip, put, work_off
from tests.command_line import CommandLine, variables
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.pipeline import Wired, deliver, insert_row, kept, task_of

# Which rows are exported, deleted and counted is tested on both, what becomes of the objects on one.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")


def export(parts: Parts, folder: Path, *names: str) -> list[tuple[str, str]]:
    """Export; returns the faults."""
    chosen = _chosen(parts, list(names), None, None)
    return [fault for each in Export(parts.database, parts.bucket, folder).run(chosen) for fault in each.faults]


def in_folder(parts: Parts, folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    prefix = parts.bucket.prefix
    return {prefix + str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


# -- export -------------------------------------------------------------------------------------------------------


def test_export_has_the_layout_and_bytes_of_the_bucket(parts: Parts, tmp_path: Path) -> None:
    archive(parts, 3, n=2)
    assert export(parts, tmp_path / "out") == []
    assert in_folder(parts, tmp_path / "out") == kept(parts)


def test_second_export_completes_an_interrupted_one(parts: Parts, tmp_path: Path) -> None:
    archive(parts, 2)
    export(parts, tmp_path / "out")
    one, two = sorted((tmp_path / "out").rglob("image*"))
    one.write_bytes(b"half")
    two.unlink()
    assert export(parts, tmp_path / "out") == []
    assert in_folder(parts, tmp_path / "out") == kept(parts)


def test_corrupted_file_is_named_and_not_exported(parts: Parts, tmp_path: Path) -> None:
    broken, gone, whole = archive(parts, 3)
    assets = {asset.task_id: str(asset.key) for asset in all_assets(parts)}
    flip(parts, assets[broken.id])
    put(parts, str(gone.manifest_key), b"{}")
    parts.bucket.delete(assets[gone.id])
    faults = export(parts, tmp_path / "out")
    assert sorted((key, why.split(":")[0]) for key, why in faults) == sorted(
        [(assets[broken.id], "corrupted"), (assets[gone.id], "missing"), (str(gone.manifest_key), "corrupted")]
    )
    assert set(in_folder(parts, tmp_path / "out")) == {
        assets[whole.id], str(whole.manifest_key), str(broken.manifest_key),
    }  # fmt: skip


@BOTH
def test_export_selects_tasks_by_time_and_by_id(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.archive.export.PAGE_ROWS", 1)
    first, second, third = sorted(archive(parts, 3), key=lambda task: task.created_at)
    insert_row(parts)  # a task without an archive
    chosen = tasks_between(parts.database, second.created_at, third.created_at)
    assert [task.id for task in chosen] == [second.id]
    assert [task.id for task in tasks_between(parts.database, None, None)] == [first.id, second.id, third.id]
    assert export(parts, tmp_path / "out", third.external_task_id) == []
    assert set(in_folder(parts, tmp_path / "out")) == {key for key in kept(parts) if third.external_task_id in key}


@pytest.mark.parametrize("key", ["a/../../x", "2026/11/23/../etc", "2026/11/23/id/../../x.png", "image.png"])
def test_no_key_leads_out_of_the_folder(parts: Parts, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="folder"):
        Export(parts.database, parts.bucket, tmp_path).steps_of(key)


@pytest.fixture
def receiver(database_url: str, parts: Parts, sandbox: Sandbox, tmp_path: Path) -> CommandLine:
    return CommandLine(variables(database_url, parts.bucket, sandbox), tmp_path)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_export_command_copies_files_and_reports_faults(parts: Parts, receiver: CommandLine) -> None:
    archive(parts, 2)
    assert receiver("export", "out").code == 2
    done = receiver("export", "out", "--all", "--json")
    assert (done.code, done.json["files"], done.json["faults"]) == (0, 4, [])
    key = str(all_assets(parts)[0].key)
    flip(parts, key)
    bad = receiver("export", "other", "--since", "1d")
    assert (bad.code, key in bad.err) == (1, True)


# -- delete -------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
@BOTH
def test_deleted_task_leaves_a_tombstone(parts: Parts) -> None:
    gone, stays = archive(parts, 2)
    with parts.database.write() as session:
        told = {"client_callback_url": "https://client.example.com/done?token=a-secret"}
        session.execute(update(Task).values(**told))
    flip(parts, next(key for key in kept(parts) if gone.external_task_id in key and "image" in key))
    assert delete(parts.database, parts.bucket, gone.external_task_id).objects == 2
    assert all(stays.external_task_id in key for key in kept(parts))
    row = task_of(parts, gone.external_task_id)
    assert (row.request, row.callback_url, row.manifest_key, row.note) == ({}, None, None, "deleted")
    assert row.client_callback_url is None
    assert task_of(parts, stays.external_task_id).client_callback_url is not None
    assert (row.state, row.archive) == (TaskState.SUCCEEDED, ArchiveState.NONE) and row.deleted_at is not None
    with parts.database.read() as session:
        of_task = [session.exec(select(model).where(model.task_id == gone.id)).all() for model in (Asset, Callback)]
    assert of_task == [[], []]
    assert [batch.counts.faults for batch in Audit(parts.database, parts.bucket, deep=True).run()] == [0]
    assert delete(parts.database, parts.bucket, gone.external_task_id).again


@BOTH
def test_deletion_erases_deliveries_of_the_task_at_the_account_url(parts: Parts) -> None:
    """They hold the links of its files. A delivery of another task stays."""
    gone, stays = archive(parts, 2)
    result = {"images": [{"index": 0, "url": "https://p1.klingai.com/x.png?sign=1"}]}
    for task in (gone, stays):
        body = {"task_id": task.provider_task_id, "task_status": "succeed", "task_result": result}
        deliver(parts, None, {**body, "external_task_id": task.external_task_id})
    early = deliver(parts, None, {"task_id": "early", "task_status": "processing"})
    with parts.database.write() as session:
        session.execute(update(Callback).where(Callback.id == early.id).values(provider_task_id=gone.provider_task_id))
    delete(parts.database, parts.bucket, gone.external_task_id)
    with parts.database.read() as session:
        left = session.exec(select(Callback.external_task_id).where(col(Callback.task_id).is_(None))).all()
    assert left == [stays.external_task_id]


@BOTH
def test_callbacks_of_a_deleted_task_stay_counted(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    deliver(parts, task, b"no json")
    before = arrived(parts)
    delete(parts.database, parts.bucket, task.external_task_id)
    with parts.database.read() as session:
        assert session.exec(select(Callback).where(Callback.source == "push")).first() is None
    assert arrived(parts) == before > 0


def arrived(parts: Parts) -> int:
    """The callbacks of this hour and the last one, as a process that has just started counts them."""
    hour = parts.database.now().replace(minute=0, second=0, microsecond=0)
    with parts.database.read() as session:
        return sum(Arrivals().count(session, each) for each in (hour, hour - HOUR))


@pytest.mark.parametrize("answer", [b"<html></html>", b"<ListVersionsResult/>"], ids=["a page", "an empty listing"])
def test_rows_stay_while_a_file_is_neither_removed_nor_gone(parts: Parts, seaweed: Seaweed, answer: bytes) -> None:
    (task,) = archive(parts, 1)

    def hides(request: Request, forward: Forward) -> Answer:
        return Answer(200, {}, answer) if "versions" in request.path else forward(request)

    with FaultProxy(seaweed, hides) as proxy:
        behind = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
        with pytest.raises(StoreUnavailable, match=r"listing with what is not one|still has .*delete the task again"):
            delete(parts.database, behind, task.external_task_id)
    assert (len(kept(parts)), len(all_assets(parts))) == (2, 1)
    assert delete(parts.database, parts.bucket, task.external_task_id).objects == 2


def test_reports_do_not_restore_a_deleted_task(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    delete(parts.database, parts.bucket, task.external_task_id)
    result = {"images": [{"index": 0, "url": "https://p1.klingai.com/x.png?sign=1"}]}
    deliver(parts, task, {"task_id": task.provider_task_id, "task_status": "succeed", "task_result": result})
    work_off(parts)
    assert kept(parts) == {} and all_assets(parts) == []


@pytest.mark.parametrize("folder", ["2026/11/30/", "of/2026/11/30/run/", "2026/11/"])
def test_below_a_prefix_like_a_date_one_task_is_deleted_alone(parts: Parts, folder: str, tmp_path: Path) -> None:
    """A dated prefix was taken for a task's folder, and the objects of all tasks went with those of one."""
    parts.bucket.prefix += folder
    gone, stays = archive(parts, 2)
    before = {key: sha256 for key, sha256 in kept(parts).items() if stays.external_task_id in key}
    assert delete(parts.database, parts.bucket, gone.external_task_id).objects == 2
    assert kept(parts) == before
    assert [batch.counts.faults for batch in Audit(parts.database, parts.bucket, deep=True).run()] == [0]
    assert export(parts, tmp_path / "out") == [] and in_folder(parts, tmp_path / "out") == before


def test_task_that_is_not_over_is_not_deleted(parts: Parts) -> None:
    task = insert_row(parts)
    with pytest.raises(Refused, match="receiver dismiss"):
        delete(parts.database, parts.bucket, task.external_task_id)
    assert task_of(parts, task.external_task_id).deleted_at is None
    with pytest.raises(LookupError):
        delete(parts.database, parts.bucket, "nobody")


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_delete_removes_the_task(parts: Parts, receiver: CommandLine) -> None:
    (task,) = archive(parts, 1)
    dry = receiver("delete", task.external_task_id, "--dry-run")
    assert (dry.code, len(dry.out.splitlines()), len(kept(parts))) == (0, 3, 2)
    assert receiver("delete", task.external_task_id, given="n\n").code == 1
    done = receiver("delete", task.external_task_id, "--yes")
    assert (done.code, done.out, kept(parts)) == (0, "deleted; 2 objects removed\n", {})


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_delete_prints_json(parts: Parts, receiver: CommandLine) -> None:
    (task,) = archive(parts, 1)
    dry = receiver("delete", task.external_task_id, "--dry-run", "--json").json
    assert (dry["dry_run"], sorted(dry["keys"])) == (True, sorted(kept(parts)))
    done = receiver("delete", task.external_task_id, "--json", given="y\n")
    assert done.json == {"ok": True, "dry_run": False, "objects": 2, "again": False}
    assert receiver("delete", task.external_task_id, "--json", "--yes").json["again"]


# -- put options --------------------------------------------------------------------------------------------------


@pytest.fixture
def client(seaweed: Seaweed, s3_environment: dict[str, str]) -> Any:
    return boto3.Session().client("s3", endpoint_url=seaweed.endpoint_url)


@pytest.fixture
def locking(seaweed: Seaweed, client: Any, parts: Parts) -> Iterator[Parts]:
    """The parts with a bucket that locks every object."""
    name = f"locked-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    options = PutOptions(lock_mode="GOVERNANCE", lock_days=1)
    bucket = Bucket(name, endpoint_url=seaweed.endpoint_url, put_options=options)
    wired = Wired(parts.settings, bucket=bucket)
    yield wired
    wired.close()


def test_every_object_is_put_with_the_options(seaweed: Seaweed, bucket: Bucket, client: Any) -> None:
    options = PutOptions(storage_class="STANDARD_IA", tags={"team": "a b&c", "kind": "x"}, cache_control="max-age=60")
    known = bucket.capabilities()
    own = Bucket(bucket.name, endpoint_url=seaweed.endpoint_url, capabilities=known, put_options=options)
    place = {"Bucket": bucket.name, "Key": bucket.prefix + "one.png"}
    put_one(own, place["Key"])
    head = client.head_object(**place)
    tags = {tag["Key"]: tag["Value"] for tag in client.get_object_tagging(**place)["TagSet"]}
    assert (head["StorageClass"], head["CacheControl"], tags) == ("STANDARD_IA", "max-age=60", options.tags)


def put_one(bucket: Bucket, key: str, content: bytes = b"one") -> None:
    from io import BytesIO

    sha256 = hashlib.sha256(content).hexdigest()
    bucket.put_once(key, BytesIO(content), sha256=sha256, size=len(content), media_type="image/png", metadata={})


@pytest.mark.parametrize("size", [3, 6_000_000], ids=["in one piece", "in parts"])
def test_store_keeps_encryption_lock_and_storage_class(
    seaweed: Seaweed, client: Any, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """With SSE-S3 only: SeaweedFS 4.48 refuses aws:kms without a key server."""
    monkeypatch.setattr("storage.bucket.bucket.MULTIPART_THRESHOLD_BYTES", 5_500_000)
    name = f"kept-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    options = PutOptions(storage_class="STANDARD_IA", sse="AES256", lock_mode="GOVERNANCE", lock_days=2)
    own = Bucket(name, endpoint_url=seaweed.endpoint_url, capabilities=bucket.capabilities(), put_options=options)
    put_one(own, "one.png", bytes(size))
    head = client.head_object(Bucket=name, Key="one.png")
    kept = (head["StorageClass"], head["ServerSideEncryption"], head["ObjectLockMode"])
    assert kept == ("STANDARD_IA", "AES256", "GOVERNANCE")
    days = (head["ObjectLockRetainUntilDate"] - head["LastModified"]).total_seconds() / 86_400
    assert 1.99 < days < 2.01 and own.locked_until("one.png") == head["ObjectLockRetainUntilDate"]
    assert own.read_bytes("one.png", size) == bytes(size)


def test_store_without_kms_is_reported(seaweed: Seaweed, bucket: Bucket) -> None:
    own = Bucket(
        bucket.name, endpoint_url=seaweed.endpoint_url, capabilities=bucket.capabilities(),
        put_options=PutOptions(sse="aws:kms", kms_key_id="a-key"),
    )  # fmt: skip
    with pytest.raises(StoreUnavailable):
        put_one(own, bucket.prefix + "one.png")
    assert bucket.head(bucket.prefix + "one.png") is None


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_object_lock_refuses_delete(locking: Parts) -> None:
    (task,) = archive(locking, 1)
    before = kept(locking)
    with pytest.raises(Refused, match="under Object Lock until"):
        delete(locking.database, locking.bucket, task.external_task_id)
    assert kept(locking) == before
    assert task_of(locking, task.external_task_id).deleted_at is None


def test_delete_removes_every_version(seaweed: Seaweed, client: Any, s3_environment: dict[str, str]) -> None:
    name = f"versions-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=name)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    for body in (b"1", b"2"):
        client.put_object(Bucket=name, Key="a/x", Body=body)
    client.delete_object(Bucket=name, Key="a/x")
    assert Bucket(name, endpoint_url=seaweed.endpoint_url).purge("a/") == 3
    left = client.list_object_versions(Bucket=name)
    assert "Versions" not in left and "DeleteMarkers" not in left


def test_options_become_arguments_of_boto3() -> None:
    given = PutOptions(
        sse="aws:kms", kms_key_id="key", lock_mode="COMPLIANCE", lock_days=2, tags={"a": "b"}
    ).arguments()
    until = given.pop("ObjectLockRetainUntilDate")
    assert given == {
        "ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key", "ObjectLockMode": "COMPLIANCE", "Tagging": "a=b",
    }  # fmt: skip
    assert datetime.fromisoformat(until).utcoffset() == timedelta(0)
    assert PutOptions().arguments() == {}


@pytest.mark.parametrize(
    "wrong",
    [{"s3_kms_key_id": "key"}, {"s3_lock_mode": "GOVERNANCE"}, {"s3_lock_days": 3}, {"s3_tags": "art"},
     {"s3_sse": "rot13"}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_invalid_put_settings_name_their_variable(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = wrong
    with pytest.raises(config.SettingsInvalid, match=f"RECEIVER_{name.upper()}"):
        config.load(s3_bucket="pictures", **wrong)


def test_put_settings_become_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = config.load(s3_bucket="b", s3_tags="team=art, kind=", s3_lock_mode="GOVERNANCE", s3_lock_days=7, s3_sse="")
    expected = PutOptions(tags={"team": "art", "kind": ""}, lock_mode="GOVERNANCE", lock_days=7)
    assert chosen.put_options == expected
    with pytest.raises(ValueError, match="at most 10"):
        parse_tags(",".join(f"{number}=x" for number in range(11)))
