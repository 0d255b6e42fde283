"""Audit of rows and objects in both directions, and repair of the findings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from receiver.app.wiring import Parts
from receiver.cli.audit_log import AuditLog
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from storage.archive import folders
from storage.archive.audit import Audit, Counts, Finding, FindingKind
from storage.archive.repair import FETCHED_AGAIN, WRITTEN_AGAIN, Repairer
from storage.bucket.bucket import Bucket
from storage.errors import UserError
from storage.rows.models import Asset, Task
from storage.states import ArchiveState, AssetState, Step, TaskState
from tests.archived_tasks import all_assets, archive, flip, put, work_off
from tests.command_line import CommandLine, variables
from tests.fault_proxy import Answer, FaultProxy
from tests.pipeline import Wired, assets_of, insert_row, kept, task_of
from tests.rows import new_asset

# What the audit asks the database is tested on both, what it finds in the bucket on one.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")


def audit(parts: Parts, *, after: str = "", **options: Any) -> tuple[Counts, list[Finding]]:
    counts, findings = Counts(), []
    for batch in Audit(parts.database, parts.bucket, **options).run(after):
        counts.add(batch.counts)
        findings += batch.findings
    return counts, findings


def kinds(findings: list[Finding]) -> list[tuple[str, str]]:
    return sorted((finding.kind.value, finding.key) for finding in findings)


def repair(parts: Parts, findings: list[Finding]) -> list[str]:
    repairer = Repairer(parts.database, parts.bucket, parts.schedule)
    said = [repairer.repair(finding) for finding in findings]
    work_off(parts)
    return said


def test_intact_archive_has_no_findings(parts: Parts) -> None:
    archive(parts, 3, n=2)
    counts, findings = audit(parts, deep=True)
    assert findings == [] and counts.faults == 0
    looked = (counts.folders, counts.objects, counts.assets, counts.manifests, counts.hashed)
    assert looked == (3, 9, 6, 3, 6)
    assert counts.hashed_bytes == sum(asset.size or 0 for asset in all_assets(parts))


@BOTH
def test_every_kind_of_finding_is_found_and_nothing_else(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PAGE_ROWS", 3)  # several pages
    archive(parts, 4, n=3)
    keys = [str(asset.key) for asset in all_assets(parts)]
    for key in keys[:4]:
        parts.bucket.delete(key)
    for key in keys[5:7]:
        flip(parts, key)
    put(parts, keys[8], b"short")
    names = ("0", "2020/01/01/%00/image-0-aa.png", "2020/01/01/who/image-0-aa.png", "zz/top.png")
    strangers = [parts.bucket.prefix + name for name in names]
    for key in (*strangers, keys[10] + ".bak"):
        put(parts, key, b"a stranger's")
    expected = [("missing", key) for key in keys[:4]] + [("checksum_differs", key) for key in keys[5:7]]
    expected += [("size_differs", keys[8])] + [("orphaned", key) for key in (*strangers, keys[10] + ".bak")]
    counts, findings = audit(parts, deep=True)
    assert kinds(findings) == sorted(expected)
    assert (counts.faults, counts.assets, counts.hashed) == (12, 12, 7)


def test_without_deep_only_sizes_are_compared(parts: Parts) -> None:
    archive(parts, 1)
    (asset,) = all_assets(parts)
    flip(parts, str(asset.key))
    assert audit(parts)[1] == []
    assert kinds(audit(parts, deep=True)[1]) == [("checksum_differs", asset.key)]


def test_sample_hashes_exactly_the_given_number(parts: Parts) -> None:
    archive(parts, 3, n=2)
    assert audit(parts, deep=True, sample=4)[0].hashed == 4
    assert audit(parts, deep=True, sample=50)[0].hashed == 6


def test_repair_fetches_files_that_the_provider_still_has(parts: Parts) -> None:
    archive(parts, 4)
    before = kept(parts)
    missing, flipped, short, _ = (str(asset.key) for asset in all_assets(parts))
    parts.bucket.delete(missing)
    flip(parts, flipped)
    put(parts, short, b"short")
    damaged = {digest for key, digest in kept(parts).items() if key in (flipped, short)}
    assert repair(parts, audit(parts, deep=True)[1]) == [FETCHED_AGAIN] * 3
    counts, findings = audit(parts, deep=True)
    after = kept(parts)
    assert (counts.faults, counts.hashed, {finding.kind for finding in findings}) == (0, 4, {FindingKind.SUPERSEDED})
    assert before.items() <= after.items()
    assert {after[finding.key] for finding in findings} == damaged  # damaged objects are kept under another key


def test_file_that_the_provider_has_deleted_stays_a_fault(parts: Parts, sandbox: Sandbox) -> None:
    (task,) = archive(parts, 1)
    (asset,) = all_assets(parts)
    parts.bucket.delete(str(asset.key))
    sandbox.set(cdn_html_rate=1)
    assert repair(parts, audit(parts)[1]) == [FETCHED_AGAIN]
    (row,) = assets_of(parts, task)
    assert (row.state, row.archived_at) == (AssetState.FAILED, None)
    assert task_of(parts, task.external_task_id).archive is ArchiveState.INCOMPLETE
    (finding,) = audit(parts, deep=True)[1]
    assert finding.kind is FindingKind.MISSING and finding.detail.startswith("given up: ")
    sandbox.set(cdn_html_rate=0)
    assert repair(parts, [finding]) == [FETCHED_AGAIN] and audit(parts, deep=True)[1] == []


@pytest.mark.databases("sqlite")
@BOTH
def test_missing_and_changed_manifests_are_written_again(parts: Parts) -> None:
    gone, broken, foreign = archive(parts, 3)
    parts.bucket.delete(str(gone.manifest_key))
    flip(parts, str(broken.manifest_key))
    put(parts, str(foreign.manifest_key), parts.bucket.read_bytes(str(broken.manifest_key), 2**20)[:-1])
    findings = audit(parts)[1]
    expected = [("manifest_differs", key) for key in sorted([str(broken.manifest_key), str(foreign.manifest_key)])]
    assert kinds(findings) == [*expected, ("manifest_missing", gone.manifest_key)]
    assert repair(parts, findings) == [WRITTEN_AGAIN] * 3
    assert audit(parts)[1] == []
    assert task_of(parts, gone.external_task_id).manifest_key == gone.manifest_key
    assert str(task_of(parts, broken.external_task_id).manifest_key).endswith("/manifest.2.json")


def test_a_repair_that_another_one_overtakes_removes_no_repaired_object(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive(parts, 1)
    (asset,) = all_assets(parts)
    flip(parts, str(asset.key))
    findings, put_once = audit(parts, deep=True)[1], parts.bucket.put_once

    def put_after_the_other_repair(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(parts.bucket, "put_once", put_once)
        assert repair(parts, findings) == [FETCHED_AGAIN]
        return put_once(*given, **more)

    monkeypatch.setattr(parts.bucket, "put_once", put_after_the_other_repair)
    assert Repairer(parts.database, parts.bucket, parts.schedule).repair(findings[0]).startswith("left alone")
    assert parts.bucket.sha256(str(asset.key)) == asset.sha256


@pytest.mark.databases("sqlite")
@BOTH
def test_manifest_is_written_again_under_its_key_after_two_repairs(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    parts.bucket.delete(str(task.manifest_key))
    findings, repairer = audit(parts)[1], Repairer(parts.database, parts.bucket, parts.schedule)
    assert [repairer.repair(each) for each in findings * 2] == [WRITTEN_AGAIN] * 2  # before a worker comes to it
    work_off(parts)
    row = task_of(parts, task.external_task_id)
    assert (row.manifest_key, row.manifests, audit(parts)[1]) == (task.manifest_key, 1, [])


def test_manifest_that_names_other_files_is_a_fault(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    with parts.database.write() as session:
        session.exec(select(Asset)).one().size = 1
    (finding, *_) = audit(parts)[1]
    assert (finding.kind, finding.task) == (FindingKind.SIZE, task.external_task_id)
    assert {found.kind for found in audit(parts)[1]} == {FindingKind.SIZE, FindingKind.MANIFEST_DIFFERS}


def test_repair_never_removes_an_object_that_matches_its_row(parts: Parts) -> None:
    archive(parts, 1)
    (asset,) = all_assets(parts)
    lie = Finding(FindingKind.CHECKSUM, str(asset.key), None, "", asset.id)
    assert repair(parts, [lie]) == ["left alone: it matched its row when it was read again"]
    assert audit(parts, deep=True)[1] == []


@pytest.mark.parametrize(
    "answer",
    [Answer(200, {}, b"<html>Log in</html>"), Answer(206, {"content-range": "bytes 0-9/999"}, b"half of it")],
    ids=["page", "part"],
)
def test_repair_removes_no_object_that_was_read_wrongly(parts: Parts, seaweed: Seaweed, answer: Answer) -> None:
    """A proxy answers reads with a page or a part of an object. What the store has is right."""
    archive(parts, 1)
    (asset,) = all_assets(parts)
    with FaultProxy(seaweed) as proxy:
        bucket = Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)
        assert bucket.capabilities().believed
        proxy.fault = lambda request, forward: (
            answer if request.method == "GET" and str(asset.key) in request.path else forward(request)
        )
        behind = Wired(parts.settings, bucket=bucket)
        (finding,) = audit(behind, deep=True)[1]
        said = Repairer(behind.database, bucket, behind.schedule).repair(finding)
        behind.close()
    assert said.startswith("left alone: the store")
    assert parts.bucket.sha256(str(asset.key)) == asset.sha256
    assert audit(parts, deep=True)[1] == []


@BOTH
def test_unfinished_archive_is_not_a_fault(parts: Parts) -> None:
    """A file's key is written before its object is put; a manifest is put before its key is written."""
    task = insert_row(parts, state=TaskState.SUCCEEDED, archive=ArchiveState.ARCHIVING, step=Step.FINISH)
    folder = f"{parts.bucket.prefix}{task.created_at:%Y/%m/%d}/{task.external_task_id}/"
    with parts.database.write() as session:
        new_asset(session, task, 0, key=folder + "image-0-aaaaaaaaaaaa.png", sha256="a" * 64, size=3)
        new_asset(session, task, 1, key=folder + "image-1-bbbbbbbbbbbb.png", sha256="b" * 64, size=3)
    put(parts, folder + "image-0-aaaaaaaaaaaa.png", b"new")
    put(parts, folder + "manifest.json", b"{}")
    assert audit(parts, deep=True)[1] == []


@BOTH
def test_archive_that_goes_on_under_another_prefix_has_no_faults(parts: Parts, sandbox: Sandbox) -> None:
    """Its next manifest is written beside the last one, and names files in both folders."""
    archive(parts, 1, n=2)
    (half,) = archive(parts, 1, n=2)
    parts.bucket.delete(str(assets_of(parts, half)[0].key))
    old, findings = parts.bucket.prefix, audit(parts)[1]
    parts.bucket.prefix += "moved/"
    assert repair(parts, findings) == [FETCHED_AGAIN]
    row = task_of(parts, half.external_task_id)
    assert (row.archive, row.manifests) == (ArchiveState.ARCHIVED, 2)
    counts, found = Audit(parts.database, parts.bucket, deep=True).check_folder(
        str(row.manifest_key).rpartition("/")[0] + "/"
    )
    assert (counts.faults, found) == (0, [])
    assert audit(parts, deep=True)[1] == []
    parts.bucket.prefix = old
    assert audit(parts, deep=True)[1] == []


@BOTH
def test_folders_listed_in_another_order_are_paired_with_their_rows(parts: Parts) -> None:
    """`a-b/` sorts before `a/` by bytes, but after it in SeaweedFS's listing."""
    for name in ("a", "a-b", "a.b", "a b", "a0"):
        parts.submitter.submit({"model_name": "kling-image-o1", "prompt": "a boat"}, external_task_id=name)
    work_off(parts)
    put(parts, str(all_assets(parts)[0].key).replace("/image", "/stranger/image"), b"x")
    counts, findings = audit(parts, deep=True)
    assert (counts.folders, counts.hashed, [finding.kind for finding in findings]) == (5, 5, [FindingKind.ORPHANED])


def test_objects_under_an_earlier_prefix_are_found_by_their_rows(parts: Parts) -> None:
    archive(parts, 2)
    parts.bucket.prefix += "moved/"
    counts, findings = audit(parts, deep=True)
    assert (counts.hashed, findings) == (2, [])


def test_interrupted_audit_continues_at_its_checkpoint(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.archive.audit.BATCH_FOLDERS", 2)
    archive(parts, 4)
    parts.bucket.delete(str(all_assets(parts)[1].key))
    file = tmp_path / "audit.log"
    log = AuditLog(file)
    log.add(next(Audit(parts.database, parts.bucket, deep=True).run()))
    with file.open("a") as half:
        half.write('{"finding": {"ki')
    resumed = AuditLog(file)
    assert [finding.kind for finding in resumed.findings()] == [FindingKind.MISSING]
    for batch in Audit(parts.database, parts.bucket, deep=True).run(resumed.after):
        resumed.add(batch)
    assert (resumed.counts.folders, resumed.counts.hashed, resumed.counts.faults) == (4, 3, 1)
    resumed.end()
    assert (AuditLog(file).after, file.read_text()) == ("", "")


@pytest.mark.parametrize("content", [b"my notes\n", b"SQLite format 3\0", b"\n", b'{"findings": [', b"{}\n"])
def test_a_file_of_something_else_is_not_emptied(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match="no file of an audit"):
        AuditLog(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("cut", [0, 1, 12])
def test_a_file_that_a_crash_cut_in_its_first_line_begins_again(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "audit.log"
    file.write_bytes(b'{"finding": {"ki'[:cut])
    assert (AuditLog(file).after, file.read_bytes()) == ("", b"")


@pytest.fixture
def receiver(database_url: str, parts: Parts, sandbox: Sandbox, tmp_path: Path) -> CommandLine:
    return CommandLine(variables(database_url, parts.bucket, sandbox), tmp_path)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_audit_command_reports_and_repairs_findings(parts: Parts, receiver: CommandLine) -> None:
    archive(parts, 2)
    good = receiver("audit", "--deep", "--json", "--max-bytes-per-second", "10000000")
    assert (good.code, good.json["ok"], good.json["findings"], good.err) == (0, True, [], "")
    key = str(all_assets(parts)[0].key)
    parts.bucket.delete(key)
    assert "`receiver audit --repair` makes due" in receiver("audit").err
    bad = receiver("audit", "--repair", "--resume", "audit.log", "--json")
    assert (bad.code, [found["key"] for found in bad.json["findings"]]) == (1, [key])
    assert bad.json["findings"][0]["repair"] == FETCHED_AGAIN
    assert json.dumps(bad.json["counts"]["found"]) == '{"missing": 1}'
    work_off(parts)
    done = receiver("audit", "--sample", "1")
    assert (done.code, done.out.strip()) == (0, "2 files in 2 folders, 1 of them read and hashed; nothing is wrong")


@BOTH
def test_rows_that_name_a_key_are_read_through_the_index(parts: Parts) -> None:
    for model, column in ((Asset, Asset.key), (Task, Task.manifest_key)):
        statement = select(model).where(column > "a").order_by(column).limit(10)
        with parts.database.read() as session:
            plan = explain(session, statement)
        assert f"{model.__tablename__}_{column.key}" in plan, plan


def explain(session: Any, statement: Any) -> str:
    from sqlalchemy import text

    if sqlite := session.get_bind().dialect.name == "sqlite":
        words = "EXPLAIN QUERY PLAN"
    else:
        session.execute(text("SET LOCAL enable_seqscan = off"))  # otherwise PostgreSQL scans an empty table
        session.execute(text("SET LOCAL enable_bitmapscan = off"))
        words = "EXPLAIN"
    sql = statement.compile(session.get_bind(), compile_kwargs={"literal_binds": True})
    assert sqlite or sql
    return "\n".join(str(row) for row in session.execute(text(f"{words} {sql}")))
