"""Losses that an operator accepts: what audit, export and the continuous audit say of them, and how they end."""

from __future__ import annotations

import json
import uuid
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from receiver import cli
from receiver.app.wiring import Parts
from receiver.cli.main import app
from receiver.sandbox import Sandbox
from receiver.tasks.accept_losses import CURRENT, NO_ROW, THERE, accept_losses
from storage.archive import continuous_audit
from storage.archive.accepted_losses import LOSS_ACCEPTED, LOSS_ENDED
from storage.archive.audit import Finding, FindingKind
from storage.archive.repair import FETCHED_AGAIN, Repairer
from storage.keys import manifest_name
from storage.operations import outbox
from storage.rows.events import acts_of
from storage.rows.models import Event, Task
from storage.rows.task_conditions import is_dismissed
from storage.states import ArchiveState, AssetState
from tests.archived_tasks import all_assets, archive, flip, put, work_off
from tests.pipeline import assets_of, task_of
from tests.receiver.tasks.test_operate import operating
from tests.rows import LONG_AGO
from tests.storage.archive.test_audit import audit, kinds, repair
from tests.storage.archive.test_continuous_audit import audit as in_workers
from tests.storage.archive.test_continuous_audit import go_round, stands
from tests.storage.archive.test_export import in_folder

WHY = "the bucket was lost on 30 November"

# Verdicts are made of objects and values. What selects or writes acceptances is tested on both databases.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")


def key_of(task: Task, number: int) -> str:
    return f"{str(task.manifest_key).rpartition('/')[0]}/{manifest_name(number)}"


def with_manifests(parts: Parts, count: int) -> Task:
    """An archived task with this many manifests: for each but the first, its file was lost and fetched again."""
    (task,) = archive(parts, 1)
    (asset,) = assets_of(parts, task)
    for _ in range(count - 1):
        parts.bucket.delete(str(asset.key))
        repair(parts, audit(parts)[1])
    row = task_of(parts, task.external_task_id)
    assert row.manifests == count
    return row


def accept(parts: Parts, *keys: str, dry_run: bool = False) -> dict[str, str]:
    """Accept these losses. Returns what was left."""
    return accept_losses(parts.database, parts.bucket, keys, WHY, dry_run=dry_run).left


def said(parts: Parts, *, deep: bool = False) -> list[tuple[str, str]]:
    counts, findings = audit(parts, deep=deep)
    assert counts.faults == sum(each.is_fault for each in findings)
    return kinds(findings)


def actions(parts: Parts, task: Task) -> list[str]:
    with parts.database.read() as session:
        return [act.data["action"] for act in acts_of(session, task.id)]


def test_lost_earlier_manifest_is_a_note_once_its_loss_is_accepted(parts: Parts) -> None:
    task = with_manifests(parts, 2)
    key = key_of(task, 1)
    digest = parts.bucket.read_bytes(key, 2**20)
    parts.bucket.delete(key)
    assert said(parts) == [("manifest_missing", key)]
    assert accept(parts, key, dry_run=True) == {} and said(parts) == [("manifest_missing", key)]
    assert accept(parts, key) == {}
    counts, (note,) = audit(parts)
    assert (counts.faults, counts.found["accepted"], note.kind, note.key) == (0, 1, FindingKind.ACCEPTED, key)
    assert note.detail.startswith("there is no such object; accepted on 2") and note.detail.endswith(f": {WHY}")
    with parts.database.read() as session:
        (act,) = acts_of(session, task.id)
    assert f'"digest":"{act.data["digest"]}"'.encode() in digest
    assert (act.data["key"], act.data["reason"], act.task_id) == (key, WHY, task.id)
    assert accept_losses(parts.database, parts.bucket, [key], WHY).counts == {"accepted_before": 1}
    row = task_of(parts, task.external_task_id)
    assert (row.archive, row.manifest_key, row.manifests) == (ArchiveState.ARCHIVED, task.manifest_key, 2)


def test_only_the_accepted_key_is_accepted(parts: Parts) -> None:
    task, other = with_manifests(parts, 3), with_manifests(parts, 2)
    for each, number in ((task, 1), (task, 2), (other, 1)):
        parts.bucket.delete(key_of(each, number))
    accept(parts, key_of(task, 2))
    left = [("manifest_missing", key_of(task, 1)), ("manifest_missing", key_of(other, 1))]
    assert said(parts) == sorted([("accepted", key_of(task, 2)), *left])


def test_manifest_that_comes_back_is_verified_and_ends_the_acceptance(parts: Parts) -> None:
    task = with_manifests(parts, 2)
    key, wrong = key_of(task, 1), parts.bucket.read_bytes(key_of(task, 2), 2**20)
    content = parts.bucket.read_bytes(key, 2**20)
    parts.bucket.delete(key)
    accept(parts, key)
    put(parts, key, wrong)  # a manifest of this task, with another digest
    assert said(parts) == [("manifest_differs", key)] and actions(parts, task) == [LOSS_ACCEPTED]
    put(parts, key, content)
    flip(parts, key)
    findings = audit(parts)[1]
    assert kinds(findings) == [("manifest_differs", key)]
    assert "no other copy" in repair(parts, findings)[0] and task_of(parts, task.external_task_id).manifests == 2
    put(parts, key, content)
    (note,) = audit(parts)[1]
    assert (note.kind, note.key) == (FindingKind.ACCEPTED, key) and "there again and verified" in note.detail
    assert actions(parts, task) == [LOSS_ACCEPTED, LOSS_ENDED]
    assert said(parts, deep=True) == []
    parts.bucket.delete(key)  # another loss
    assert said(parts) == [("manifest_missing", key)]


def test_manifest_written_at_an_accepted_key_is_not_accepted_when_it_is_lost(parts: Parts) -> None:
    task = with_manifests(parts, 2)
    first, second = key_of(task, 1), key_of(task, 2)
    parts.bucket.delete(first)
    accept(parts, first)
    with parts.database.write() as session:  # as if `manifest.json` had never been written
        session.execute(update(Task).values(manifests=0, manifest_digest=None))
    parts.bucket.delete(second)
    for manifest_key in (first, second):
        (asset,) = all_assets(parts)
        parts.bucket.delete(str(asset.key))
        repair(parts, [Finding(FindingKind.MISSING, str(asset.key), task.external_task_id, "", asset.id)])
        assert task_of(parts, task.external_task_id).manifest_key == manifest_key
    parts.bucket.delete(first)
    assert said(parts) == [("manifest_missing", first)]


def test_only_a_lost_earlier_manifest_is_accepted(parts: Parts) -> None:
    task = with_manifests(parts, 2)
    (asset,) = all_assets(parts)
    file, earlier, current = str(asset.key), key_of(task, 1), key_of(task, 2)
    nobodys = earlier.replace(task.external_task_id, "nobody")
    assert accept(parts, earlier) == {earlier: THERE}
    for key in (file, earlier, current):
        parts.bucket.delete(key)
    no_row = ("", "x", nobodys, key_of(task, 3))
    left = accept(parts, file, current, *no_row)
    advice = left.pop(file)
    assert left == {current: CURRENT, **dict.fromkeys(no_row, NO_ROW)}
    assert "audit --repair" in advice and f"receiver dismiss --reason TEXT {task.external_task_id}" in advice
    assert actions(parts, task) == []


def test_export_lists_an_accepted_loss_and_no_fault(parts: Parts, tmp_path: Path) -> None:
    from storage.archive.export import Export

    task = with_manifests(parts, 2)
    key = key_of(task, 1)
    parts.bucket.delete(key)
    (before,) = Export(parts.database, parts.bucket, tmp_path / "before").run(iter([task]))
    assert [each for each, _ in before.faults] == [key]
    accept(parts, key)
    (done,) = Export(parts.database, parts.bucket, tmp_path / "out").run(iter([task]))
    assert (done.faults, [each for each, _ in done.accepted], done.files) == ([], [key], 2)
    assert WHY in done.accepted[0][1]
    assert len(in_folder(parts, tmp_path / "out")) == 2
    put(parts, key, b"{}")
    (damaged,) = Export(parts.database, parts.bucket, tmp_path / "damaged").run(iter([task]))
    assert [each for each, _ in damaged.faults] == [key] and damaged.accepted == []


@pytest.mark.databases("sqlite")
@BOTH
def test_continuous_audit_ends_the_alarm_at_once_and_lists_no_fault_again(parts: Parts) -> None:
    task = with_manifests(parts, 2)
    key = key_of(task, 1)
    parts.bucket.delete(key)
    work = in_workers(parts)
    told = go_round(parts, work)
    assert [(each["kind"], each["key"]) for each in told.findings] == [("manifest_missing", key)]
    row = work._claim()
    assert row is not None and [each["key"] for each in row.findings] == [key]
    accept(parts, key)
    assert (stands(parts).faults, stands(parts).findings) == (0, [])
    work._settle(row, continuous_audit.StepResult(uuid.UUID(int=0)))  # the end of a step that began before
    assert stands(parts).findings == []
    told = go_round(parts, in_workers(parts))
    assert (told.faults, told.findings) == (0, [])
    assert told.last and told.last["counts"]["found"] == {"accepted": 1}


@BOTH
def test_prune_keeps_an_acceptance(parts: Parts) -> None:
    task = with_manifests(parts, 2)
    key = key_of(task, 1)
    parts.bucket.delete(key)
    accept(parts, key)
    outbox.sequence_all(parts.database, [])
    with parts.database.write() as session:
        session.execute(update(Event).values(at=LONG_AGO))
    pruned = operating(parts.database, parts).prune(timedelta(days=1))
    assert pruned.counts["events"] > 0 and said(parts) == [("accepted", key)]


def test_dismissed_lost_file_is_a_note_and_is_archived_when_it_is_there_again(
    parts: Parts, sandbox: Sandbox, tmp_path: Path
) -> None:
    from storage.archive.export import Export

    (task,) = archive(parts, 1)
    (asset,) = all_assets(parts)
    key, content = str(asset.key), parts.bucket.read_bytes(str(asset.key), 2**26)
    parts.bucket.delete(key)
    sandbox.set(cdn_html_rate=1)
    repair(parts, audit(parts)[1])
    assert said(parts) == [("missing", key)]
    assert operating(parts.database, parts).dismiss(task.external_task_id, WHY).is_good
    counts, (note,) = audit(parts)
    assert (counts.faults, note.kind, note.key) == (0, FindingKind.ACCEPTED, key) and WHY in note.detail
    assert repair(parts, [note]) == ["left alone: not a fault"]
    (exported,) = Export(parts.database, parts.bucket, tmp_path).run(iter([task]))
    assert (exported.faults, [each for each, _ in exported.accepted]) == ([], [key])
    put(parts, key, content)
    findings: list[Finding] = audit(parts)[1]
    assert [(each.kind, each.is_there_again, note.is_there_again) for each in findings] == [
        (FindingKind.ACCEPTED, True, False)
    ]
    assert repair(parts, [replace(each, detail="in other words") for each in findings]) == [FETCHED_AGAIN]
    (row,) = assets_of(parts, task)
    assert (row.state, row.sha256, said(parts, deep=True)) == (AssetState.ARCHIVED, asset.sha256, [])


def test_task_stays_dismissed_when_its_lost_manifest_is_written_again(parts: Parts, sandbox: Sandbox) -> None:
    (task,) = archive(parts, 1, n=2)
    first, second = assets_of(parts, task)
    for key in (first.key, second.key, task.manifest_key):
        parts.bucket.delete(str(key))
    sandbox.set(cdn_html_rate=1)
    repairer = Repairer(parts.database, parts.bucket, parts.schedule)
    for finding in audit(parts)[1]:
        repairer.repair(finding)
    assert operating(parts.database, parts).dismiss(task.external_task_id, WHY).is_good
    repair(parts, audit(parts)[1])
    row = task_of(parts, task.external_task_id)
    assert (row.archive, row.manifest_key, is_dismissed(row)) == (ArchiveState.INCOMPLETE, task.manifest_key, True)
    assert WHY in str(row.note) and said(parts) == sorted([("accepted", first.key), ("accepted", second.key)])
    operating(parts.database, parts).retry(str(first.id))
    work_off(parts)
    assert not is_dismissed(task_of(parts, task.external_task_id))  # a file of it was given up anew


def test_commands_accept_a_loss(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: five of them would be a second of CPU."""

    def opened(*, starts_store: bool, needs_bucket: bool = True) -> nullcontext[Parts]:
        assert starts_store and needs_bucket
        return nullcontext(parts)

    for module in (cli.archive, cli.operate):
        monkeypatch.setattr(module, "opened", opened)
    task = with_manifests(parts, 2)
    key = key_of(task, 1)
    parts.bucket.delete(key)
    assert "receiver dismiss --object KEY" in repair(parts, audit(parts)[1])[0]
    done = CliRunner().invoke(app, ["dismiss", "--object", key, "--object", "x", "--reason", WHY, "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["counts"], told["left"]) == (1, {"accepted": 1}, {"x": NO_ROW})
    good = CliRunner().invoke(app, ["audit", "--json"])
    told = json.loads(good.stdout)
    assert (good.exit_code, told["ok"], told["counts"]["found"]) == (0, True, {"accepted": 1})
    assert [each["key"] for each in told["findings"]] == [key]
    assert CliRunner().invoke(app, ["audit"]).stdout.splitlines()[-1].endswith("; accepted: 1")
    out = str(tmp_path / "out")
    exported = CliRunner().invoke(app, ["export", out, "--all", "--json"])
    told = json.loads(exported.stdout)
    assert (exported.exit_code, told["faults"]) == (0, [])
    assert [(each["task"], each["key"]) for each in told["accepted"]] == [(task.external_task_id, key)]
    listed = CliRunner().invoke(app, ["export", out, "--all"])
    assert listed.stderr.startswith(f"accepted  {key}: ") and "; 1 accepted as lost" in listed.stdout
