"""Rebuild of rows from the bucket alone, and manifests against their published schema."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from jsonschema import Draft202012Validator
from pydantic import SecretStr
from sqlmodel import col, select, update

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.archive import manifest
from storage.archive.audit import Audit
from storage.archive.delete import delete
from storage.archive.rebuild import Problem, Rebuild, asset_from
from storage.archive.repair import Repairer
from storage.errors import NoSuchTask
from storage.rows.models import Asset, Callback, Task, TaskAlias
from storage.states import ArchiveState, AssetState, Step, TaskState
from tests.archived_tasks import REQUEST, all_assets, archive, flip, put, work_off
from tests.command_line import CommandLine, variables
from tests.pipeline import Wired, assets_of, insert_row, kept, run, task_of
from tests.rows import LONG_AGO, event_names, new_asset

# What a manifest says is tested on one database, how it becomes rows on both.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")
# Columns that no manifest holds: a secret, the schedule of reads and callbacks, the end of the archive.
UNKNOWN = {
    "model",
    "callback_reads",
    "callback_url",
    "archived_at",
    "polls",
    "reported_at",
    "called_back_at",
    "end_called_back_at",
}
SERIES = {"model_name": "kling-v3-omni", "result_type": "series", "series_amount": 3,
          "watermark_info": {"enabled": True}}  # fmt: skip
SCHEMA = json.loads((files("storage.archive") / "manifest.schema.json").read_text())


@pytest.fixture
def empty(parts: Wired, another_database_url: str) -> Iterator[Wired]:
    """The same bucket and provider, an empty database of the same kind."""
    settings = parts.settings.model_copy(update={"database_url": SecretStr(another_database_url)})
    wired = Wired(settings, bucket=parts.bucket)
    yield wired
    wired.close()


def rebuild(parts: Parts, **options: Any) -> tuple[Counter[str], list[Problem]]:
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    for restored in Rebuild(parts.database, parts.bucket, **options).run():
        counts += restored.counts
        problems += restored.problems
    return counts, problems


def rows(parts: Parts, model: Any, without: set[str]) -> list[dict[str, Any]]:
    with parts.database.read() as session:
        found = session.exec(select(model).order_by(*model.__table__.primary_key)).all()
    return [row.model_dump(exclude=without) for row in found]


def manifests(parts: Parts) -> list[dict[str, Any]]:
    keys = [key for key in kept(parts) if "/manifest" in key]
    return [json.loads(parts.bucket.read_bytes(key, 2**20)) for key in keys]


@BOTH
def test_rebuild_restores_all_rows(parts: Parts, empty: Parts) -> None:
    archive(parts, 2, n=2)
    archive(parts, 1, **SERIES)
    assert rebuild(empty) == ({"folders": 3, "tasks": 3, "assets": 10}, [])
    assert rows(empty, Task, UNKNOWN) == rows(parts, Task, UNKNOWN)
    assert rows(empty, Asset, {"source_url", "unconfirmed"}) == rows(parts, Asset, {"source_url", "unconfirmed"})
    assert rows(empty, TaskAlias, set()) == rows(parts, TaskAlias, set())
    for before, after in zip(all_assets(parts), all_assets(empty), strict=True):
        assert after.source_url == before.source_url.partition("?")[0]
    (counts,) = [batch.counts for batch in Audit(empty.database, empty.bucket, deep=True).run()]
    assert (counts.hashed, counts.faults) == (10, 0)


@BOTH
def test_second_rebuild_changes_nothing(parts: Parts, empty: Parts) -> None:
    archive(parts, 2)
    rebuild(empty, deep=True)
    before = rows(empty, Task, set())
    assert rebuild(empty, deep=True) == ({"folders": 2, "known": 2}, [])
    assert rows(empty, Task, set()) == before


def test_repair_of_what_an_older_backup_does_not_know_names_rebuild(parts: Parts, empty: Parts) -> None:
    archive(parts, 1)
    found = [finding for batch in Audit(empty.database, empty.bucket).run() for finding in batch.findings]
    repairer = Repairer(empty.database, empty.bucket, empty.schedule)
    assert len(found) == 2
    assert all("`receiver rebuild` restores a task" in repairer.repair(finding) for finding in found)


@BOTH
def test_rows_of_an_older_backup_get_the_archive_in_the_bucket(parts: Parts, empty: Parts, sandbox: Sandbox) -> None:
    """A create that still waited in it was sent again, and files were fetched that the provider may have deleted."""
    queued, read = archive(parts, 2)
    batch_id = uuid.uuid4()
    with empty.database.write() as session:
        known = {"id", "external_task_id", "request", "request_hash", "created_at"}
        waiting = {"step": Step.CREATE, "slots": -1, "queued_at": LONG_AGO, "batch_id": batch_id}
        session.add(Task(**queued.model_dump(include=known), **waiting, provider="kling"))
    in_hand = {"lease": uuid.uuid4(), "due_at": LONG_AGO}  # by a worker of then
    due = insert_row(empty, **read.model_dump(include=known), **in_hand, provider_task_id=read.provider_task_id)
    with empty.database.write() as session:
        new_asset(session, due, 0)
    counts, problems = rebuild(empty)
    assert (counts["tasks"], counts["assets"], problems) == (2, 2, [])
    work_off(empty)
    for before in (queued, read):
        task = task_of(empty, before.external_task_id)
        assert (task.id, task.archive, task.step, task.slots) == (before.id, ArchiveState.ARCHIVED, None, 0)
    assert task_of(empty, queued.external_task_id).batch_id == batch_id
    ended = ["task.succeeded", "asset.archived", "task.archived"]
    assert event_names(empty.database, read)[-3:] == ended == event_names(empty.database, queued)
    assert len(sandbox.ledger().creates) == 2
    (audited,) = [batch.counts for batch in Audit(empty.database, empty.bucket, deep=True).run()]
    assert (audited.hashed, audited.faults) == (2, 0)


@BOTH
def test_a_rebuild_leaves_a_row_to_the_worker_that_has_it_in_hand(parts: Parts, empty: Parts) -> None:
    (task,) = archive(parts, 1)
    known = task.model_dump(include={"id", "external_task_id", "request", "request_hash", "created_at"})
    insert_row(empty, **known, lease=uuid.uuid4(), due_at=datetime.now(UTC) + timedelta(seconds=60))
    counts, _ = rebuild(empty)
    assert (counts["known"], counts["tasks"]) == (1, 0)
    assert task_of(empty, task.external_task_id).manifest_key is None


@BOTH
def test_a_rebuild_records_no_event_that_the_backup_has(parts: Parts, empty: Parts) -> None:
    """Its archive lacked the manifest alone."""
    (task,) = archive(parts, 1)
    known = {
        "id",
        "external_task_id",
        "request",
        "request_hash",
        "created_at",
        "provider",
        "provider_task_id",
        "expected",
    }
    with empty.database.write() as session:
        session.add(Task(**task.model_dump(include=known), state=TaskState.SUCCEEDED, archive=ArchiveState.ARCHIVING))
        session.flush()
        session.add(Asset(**all_assets(parts)[0].model_dump()))
    assert rebuild(empty)[0]["tasks"] == 1
    assert event_names(empty.database, task) == ["task.archived"]


def test_old_callback_urls_and_work_continue_after_rebuild(parts: Parts, empty: Parts) -> None:
    (task,) = archive(parts, 1)
    rebuild(empty)
    named = empty.tokens.read("kling", parts.tokens.sign("kling", task.id))
    assert named == task_of(empty, task.external_task_id).id
    (new,) = archive(empty, 1)
    assert new.archive is ArchiveState.ARCHIVED


def test_rebuild_uses_the_newest_readable_manifest(parts: Parts, empty: Parts) -> None:
    (task,) = archive(parts, 1)
    put(parts, str(task.manifest_key).replace(".json", ".2.json"), b"{}")
    counts, (problem,) = rebuild(empty)
    restored = task_of(empty, task.external_task_id)
    assert (counts["tasks"], problem.detail) == (1, "not readable: it is not a manifest")
    assert (restored.manifest_key, restored.manifests) == (task.manifest_key, 2)


def test_manifest_holds_urls_without_signature() -> None:
    for link in ("https://h/my image.png?Signature=s", " https://h/a.png?Signature=s\n", "https://h/a.png#Signature=s"):
        assert "Signature" not in manifest.without_signatures({"url": [link]})["url"][0]
    assert manifest.without_signatures("a boat? see below") == "a boat? see below"


def test_manifest_holds_no_signature_in_any_text_and_ids_as_they_are(parts: Parts, empty: Parts) -> None:
    """An id with a query is a part of each key, and `rebuild` compares it with the folder's name."""
    name = "shop/5?item=3&token=4"
    request = {**REQUEST, "prompt": "like https://h/p?Signature=s3cr3t 3/4?x=3 token=gold"}
    task = parts.submitter.submit(request, external_task_id=name).task
    work_off(parts)
    odd = {"to": "saved to https://h/x?Signature=s3cr3t", "https://h/x?sig=s3cr3t": "url=https%3A%2F%2Fh%3Fx%3Ds3cr3t"}
    with parts.database.write() as session:
        session.execute(update(Callback).values(body=json.dumps(odd | {"number": 1e15, "plain": "a=b?"}).encode()))
        session.execute(update(Asset).values(source_url="//h/x?Signature=s3cr3t", error="h/x?a=s3cr3t"))
        session.execute(update(Task).values(step=Step.FINISH, archive=ArchiveState.ARCHIVING, due_at=LONG_AGO))
    run(parts, "finishes")
    content = parts.bucket.read_bytes(str(task_of(parts, name).manifest_key), 2**20)
    members = manifest.read(content)
    assert b"s3cr3t" not in content
    assert (members["delivery"]["body"]["plain"], members["delivery"]["body"]["number"]) == ("a=b?", 1e15)
    assert members["request"]["prompt"] == "like https://h/p?… 3/4?x=3 token=gold"
    assert (members["task"]["external_task_id"], members["assets"][0]["key"]) == (name, assets_of(parts, task)[0].key)
    counts, problems = rebuild(empty)
    assert (counts["tasks"], counts["assets"], problems) == (1, 1, [])


def test_manifest_holds_urls_without_user_name() -> None:
    links = ("https://me:secret@h/a.png", "HTT\tP://me:secret@[h/a.png?x", "https://me:secret@a.example:x/a.png")
    assert [manifest.without_signatures(link) for link in links] == [
        "https://h/a.png", "http://[h/a.png", "https://a.example:x/a.png",
    ]  # fmt: skip


def test_rebuild_restores_notes_about_a_file(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    (facts,) = manifest.read(parts.bucket.read_bytes(str(task.manifest_key), 2**20))["assets"]
    for odd in ({"trailing_bytes": 3, "notes": ["a", "b"]}, {}):
        restored = asset_from(task, facts | odd)
        assert (restored.trailing_bytes, restored.notes) == (odd.get("trailing_bytes"), odd.get("notes"))


@pytest.mark.parametrize("unconfirmed", [True, False])
def test_rebuild_remembers_what_only_an_unsigned_delivery_said(parts: Parts, unconfirmed: bool) -> None:
    (task,) = archive(parts, 1)
    asset = all_assets(parts)[0]
    asset.unconfirmed = unconfirmed
    content, _ = manifest.build(task, [asset], [], None, "0", None)
    assert list(Draft202012Validator(SCHEMA).iter_errors(json.loads(content))) == []
    described = manifest.read(content)["assets"][0]
    assert ("unconfirmed" in described) == unconfirmed
    assert asset_from(task, described).unconfirmed == unconfirmed


def test_rebuild_reports_what_it_cannot_restore(parts: Parts, empty: Parts) -> None:
    lost, changed, bare = archive(parts, 3)
    for task, harm in ((lost, parts.bucket.delete), (changed, lambda key: flip(parts, key))):
        harm(str(assets_of(parts, task)[0].key))
    parts.bucket.delete(str(bare.manifest_key))
    put(parts, parts.bucket.prefix + "notes.txt", b"a stranger's")
    counts, problems = rebuild(empty)
    assert (counts["tasks"], counts["assets"]) == (2, 0)
    said = {problem.task: (problem.detail.split(":")[0].split(" to ")[0], problem.advice) for problem in problems}
    assert said == {
        lost.external_task_id: ("there is no such object", f"receiver retry {lost.external_task_id}"),
        changed.external_task_id: ("its bytes hash", f"receiver retry {changed.external_task_id}"),
        bare.external_task_id: ("no manifest", f"receiver adopt {bare.external_task_id}"),
    }
    states = {asset.state for asset in all_assets(empty)}
    assert states == {AssetState.FAILED}


def test_lost_file_is_fetched_again_after_rebuild(parts: Parts, empty: Parts) -> None:
    (task,) = archive(parts, 1)
    before = kept(parts)
    parts.bucket.delete(str(assets_of(parts, task)[0].key))
    rebuild(empty)
    from storage.operations import maintenance
    from storage.rows import tasks

    with empty.database.write() as session:
        row = tasks.by_external_id(session, task.external_task_id)
        assert row
        maintenance.retry(session, row, empty.schedule)
    work_off(empty)
    assert task_of(empty, task.external_task_id).archive is ArchiveState.ARCHIVED
    assert before.items() <= kept(empty).items()


def test_manifest_in_another_folder_is_ignored(parts: Parts, empty: Parts) -> None:
    (task,) = archive(parts, 1)
    key = str(task.manifest_key)
    put(parts, key.replace(task.external_task_id, "other"), parts.bucket.read_bytes(key, 2**20))
    counts, problems = rebuild(empty)
    assert counts["tasks"] == 1
    assert [problem.detail for problem in problems] == ["not readable: it belongs to another folder", "no manifest"]


@pytest.mark.parametrize("field", ["key", "superseded"])
def test_manifest_that_names_files_of_another_task_is_ignored(parts: Parts, empty: Parts, field: str) -> None:
    """Who may add objects wrote it. The delete of its task removed the other task's objects."""
    forged, other = archive(parts, 2)
    members, key = json.loads(parts.bucket.read_bytes(str(forged.manifest_key), 2**20)), str(forged.manifest_key)
    theirs = str(assets_of(parts, other)[0].key)
    members["assets"][0][field] = theirs if field == "key" else [theirs]
    put(parts, key, rfc8785.dumps(members | {"digest": manifest.digest_of(members)}))
    before = {each for each in kept(parts) if other.external_task_id in each}
    counts, problems = rebuild(empty)
    with suppress(NoSuchTask):
        delete(empty.database, empty.bucket, forged.external_task_id)
    assert before <= kept(parts).keys()
    assert counts["tasks"] == 1
    assert [problem.detail for problem in problems] == ["not readable: it names files of another task", "no manifest"]


def test_manifests_follow_their_schema_and_hold_no_secret(parts: Parts) -> None:
    archive(parts, 2, n=2)
    archive(parts, 1, **SERIES)
    Draft202012Validator.check_schema(SCHEMA)
    found = manifests(parts)
    assert len(found) == 3
    for each in found:
        Draft202012Validator(SCHEMA).validate(each)
        assert each["digest"] == manifest.digest_of(each)
        assert not any(secret in json.dumps(each) for secret in ("callback_url", "/callbacks/", "?", "Signature"))


@pytest.mark.parametrize("damage", [b"", b"[]", b"nonsense", b'{"schema": 1}'])
def test_malformed_manifest_is_refused(damage: bytes) -> None:
    with pytest.raises(manifest.ManifestDamaged):
        manifest.read(damage)


def test_changed_manifest_has_a_wrong_digest() -> None:
    members = {"schema": manifest.SCHEMA, "task": {"state": "archived"}}
    whole = members | {"digest": manifest.digest_of(members)}
    assert manifest.read(rfc8785.dumps(whole)) == whole
    with pytest.raises(manifest.ManifestDamaged, match="digest"):
        manifest.read(rfc8785.dumps(whole | {"task": {"state": "failed"}}))


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_rebuild_command_restores_rows_and_reports_faults(parts: Parts, sandbox: Sandbox, tmp_path: Path) -> None:
    archive(parts, 2)
    receiver = CommandLine(variables("sqlite:///fresh.db", parts.bucket, sandbox), tmp_path)
    done = receiver("rebuild", "--deep")
    assert (done.code, done.out) == (0, "restored 2 tasks with 2 files; 0 were there already; 0 problems\n")
    assert receiver("audit", "--deep").code == 0
    with closing(sqlite3.connect(tmp_path / "fresh.db")) as fresh:
        (number,) = fresh.execute("SELECT value FROM counter WHERE name = 'event'").fetchone()
    assert number > 77, "a reader of the lost rows has seen the numbers up to 77"
    parts.bucket.delete(str(archive(parts, 1)[0].manifest_key))
    again = receiver("rebuild", "--json")
    assert (again.code, again.json["counts"]["known"], len(again.json["problems"])) == (1, 2, 1)
    with parts.database.read() as session:
        assert session.exec(select(Task).where(col(Task.id).is_not(None))).first()
