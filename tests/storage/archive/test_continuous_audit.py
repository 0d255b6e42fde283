"""The continuous audit in the workers: findings of a round, schedule, lease, and reports."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.base import config
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from receiver.web import readiness
from storage.archive import continuous_audit, manifest
from storage.archive.audit import Audit
from storage.archive.continuous_audit import ContinuousAudit, Standing, standing
from storage.archive.repair import Repairer
from storage.bucket.bucket import Bucket
from storage.keys import object_key
from storage.rows.models import Asset, RollingAudit, Task
from storage.states import ArchiveState, AssetState
from tests.archived_tasks import all_assets, archive, flip, put, work_off
from tests.command_line import CommandLine, variables
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.harness import wait_until
from tests.pipeline import Web, insert_row, working
from tests.rows import LONG_AGO, new_asset, new_task

DAY = 86_400
SIGNED = "https://cdn.example/picture.png?signature=canary"


class Gate:
    """A proxy fault: reads of pictures wait while the gate is shut. `refuses`: a part of the paths that are denied."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.arrived = threading.Event()
        self.refuses = ""

    def __call__(self, request: Request, forward: Forward) -> Answer:
        if request.method == "GET" and "/image-" in request.path:
            self.arrived.set()
            self.open.wait(30)
        if self.refuses and self.refuses in request.path:
            return Answer(403, {"content-type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")
        return forward(request)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


@pytest.fixture
def gated(parts: Parts, seaweed: Seaweed, gate: Gate) -> Iterator[Bucket]:
    """The test's bucket behind the gate."""
    with FaultProxy(seaweed, gate) as proxy:
        yield Bucket(parts.bucket.name, endpoint_url=proxy.endpoint_url, prefix=parts.bucket.prefix)


def audit(parts: Parts, bucket: Bucket | None = None, *, days: float = 7, lease_seconds: float = 60) -> ContinuousAudit:
    chosen = bucket or parts.bucket
    return ContinuousAudit(parts.database, chosen, days=days, bytes_per_second=1e9, lease_seconds=lease_seconds)


def row(parts: Parts) -> RollingAudit:
    with parts.database.read() as session:
        return session.exec(select(RollingAudit)).one()


def keep(parts: Parts, count: int) -> None:
    """Insert `count` archived tasks with one picture each, without a provider and without manifests."""
    for _ in range(count):
        task, content = insert_row(parts, step=None, due_at=None), uuid.uuid4().bytes
        sha256 = hashlib.sha256(content).hexdigest()
        key = object_key(parts.bucket.prefix, task.created_at, task.external_task_id, "image", 0, sha256, "png")
        put(parts, key, content)
        kept = {"state": AssetState.ARCHIVED, "key": key, "sha256": sha256, "size": len(content), "due_at": None}
        with parts.database.write() as session:
            new_asset(session, task, 0, **kept)


def stands(parts: Parts) -> Standing:
    with parts.database.read() as session:
        return standing(session)


def change(parts: Parts, **values: Any) -> None:
    with parts.database.write() as session:
        session.execute(update(RollingAudit).values(**values))


def make_due_now(parts: Parts) -> None:
    """Make the next step due and, in a round, move the target to its end."""
    change(parts, due_at=LONG_AGO)
    if row(parts).checked:
        change(parts, round_started_at=LONG_AGO)


def go_round(parts: Parts, work: ContinuousAudit) -> Standing:
    """Take steps without waiting until a round has ended."""
    work.step()
    before = stands(parts).round_ended_at
    for _ in range(30):
        make_due_now(parts)
        assert work.step()
        if stands(parts).round_ended_at != before:
            return stands(parts)
    raise AssertionError(row(parts))


def found(told: Standing) -> list[tuple[str, str]]:
    return sorted((fault["kind"], fault["key"]) for fault in told.findings)


# -- findings ---------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_round_finds_missing_changed_and_unknown_objects_until_repaired(
    parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(parts, 4)
    gone, changed, beside, _ = (str(asset.key) for asset in all_assets(parts))
    parts.bucket.delete(gone)
    flip(parts, changed)
    put(parts, beside + ".bak", b"a stranger's")
    told = go_round(parts, audit(parts))
    expected = sorted([("missing", gone), ("checksum_differs", changed), ("orphaned", beside + ".bak")])
    assert (found(told), told.faults, told.hashed, told.share) == (expected, 3, 3, 1.0)
    again = go_round(parts, audit(parts))
    assert [fault["at"] for fault in again.findings] == [fault["at"] for fault in told.findings]
    said = capsys.readouterr().out
    assert (said.count("audit.fault_found"), [said.count(f"key={key} ") for _, key in expected]) == (3, [1, 1, 1]), said
    repair(parts)
    parts.bucket.delete(beside + ".bak")
    mended = go_round(parts, audit(parts))
    assert (mended.faults, mended.findings, mended.hashed) == (0, [], 4)


def repair(parts: Parts) -> None:
    """Repair like `receiver audit --deep --repair`."""
    repairer = Repairer(parts.database, parts.bucket, parts.schedule)
    for batch in Audit(parts.database, parts.bucket, deep=True).run():
        for finding in batch.findings:
            repairer.repair(finding)
    work_off(parts)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_continuous_audit_changes_no_row_and_no_object(parts: Parts) -> None:
    archive(parts, 1)
    (asset,) = all_assets(parts)
    stranger = f"{parts.bucket.prefix}2020/01/01/who/image-0-aa.png"
    put(parts, stranger, b"a stranger's")
    parts.bucket.delete(str(asset.key))
    assert found(go_round(parts, audit(parts))) == [("missing", asset.key)]
    assert [each.state for each in all_assets(parts)] == [AssetState.ARCHIVED]
    assert parts.bucket.read_bytes(stranger, 100) == b"a stranger's"


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_list_of_faults_is_bounded_but_their_number_is_not(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_audit, "MAX_FINDINGS", 2)
    for _ in range(4):
        given_up(parts)
    told = go_round(parts, audit(parts))
    assert (told.faults, len(told.findings)) == (4, 2)


def given_up(parts: Parts) -> Asset:
    task = insert_row(parts, archive=ArchiveState.INCOMPLETE, step=None, due_at=None)
    key = f"{parts.bucket.prefix}{task.created_at:%Y/%m/%d}/{task.external_task_id}/image-0-aaaaaaaaaaaa.png"
    failed = {"state": AssetState.FAILED, "due_at": None, "error": f"no picture: {SIGNED}"}
    with parts.database.write() as session:
        return new_asset(session, task, 0, key=key, sha256="a" * 64, size=3, source_url=SIGNED, **failed)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_unreadable_file_is_a_fault_and_the_round_continues(parts: Parts, gated: Bucket, gate: Gate) -> None:
    keep(parts, 2)
    gate.open.set()
    first = next(iter(all_assets(parts)))
    gate.refuses = str(first.key)
    begin(parts)
    counted = {
        step: stands(parts).faults for step in range(4) if audit(parts, gated).step() and not make_due_now(parts)
    }
    expected = [("unreadable", str(first.key).rpartition("/")[0] + "/")]
    assert (found(stands(parts)), counted) == (expected, {0: 0, 1: 0, 2: 1, 3: 1})
    gate.refuses = ""
    assert go_round(parts, audit(parts, gated)).faults == 0


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_store_outage_is_not_a_fault(parts: Parts, gated: Bucket, gate: Gate) -> None:
    keep(parts, 1)
    gate.open.set()
    gate.refuses = "/"
    work = audit(parts, gated)
    begin(parts)
    cursor = row(parts).cursor
    for tries in range(1, 6):
        assert work.step()
        assert (row(parts).checked["tries"], row(parts).cursor, stands(parts).faults) == (tries, cursor, 0)
        assert row(parts).due_at > parts.database.now()
        change(parts, due_at=LONG_AGO)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_round_continues_after_a_bug(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    keep(parts, 2)
    (asset, _) = all_assets(parts)
    key = f"{str(asset.key).rpartition('/')[0]}/manifest.json"
    odd: dict[str, Any] = {"schema": manifest.SCHEMA, "task": []}  # the row names an object that should exist
    digest = manifest.digest_of(odd)
    put(parts, key, json.dumps({**odd, "digest": digest}).encode())
    with parts.database.write() as session:
        values = {"archive": ArchiveState.ARCHIVED, "manifest_key": key, "manifests": 1, "manifest_digest": digest}
        session.execute(update(Task).where(col(Task.id) == asset.task_id).values(**values))
    told = go_round(parts, audit(parts))
    assert told.last and ([fault["kind"] for fault in told.findings], told.last["looked"]) == (["unreadable"], 2)
    assert capsys.readouterr().out.count("worker.step_failed") == 2


# -- the schedule of a round ------------------------------------------------------------------------------------------


def begin(parts: Parts) -> None:
    """Begin a round that is out of time: all tasks are below the target."""
    assert audit(parts).step()
    make_due_now(parts)


def insert_at(parts: Parts, *shares: float) -> None:
    """Insert tasks that are due at these shares of a round."""
    with parts.database.write() as session:
        for share in shares:
            new_task(session, id=uuid.UUID(int=int(share * 2**128)), due_at=None, step=None)


def test_task_is_due_when_the_target_reaches_its_id(parts: Parts) -> None:
    insert_at(parts, 0.25, 0.5, 0.995)
    work = audit(parts, days=0.01)
    for looked, passed, after in ((0, 0, 216), (1, 216, 432), (2, 432, 859.68), (3, 860, 864)):
        started = parts.database.now() - timedelta(seconds=passed + 0.5)  # the database's clock
        if passed:
            change(parts, due_at=LONG_AGO, round_started_at=started)
        assert work.step() and not work.step()
        told = row(parts)
        assert told.round_started_at
        assert (told.checked["looked"], told.checked["late"]) == (looked, False)
        assert abs((told.due_at - told.round_started_at).total_seconds() - max(after, passed + 0.5)) < 5.5
    assert stands(parts).round_ended_at is None and 0.99 < stands(parts).share < 1
    change(parts, due_at=LONG_AGO, round_started_at=parts.database.now() - timedelta(seconds=864))
    assert work.step()
    told = row(parts)
    assert told.last and (told.last["looked"], told.last["late"], told.checked, told.cursor) == (3, False, {}, None)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_steps_are_at_least_ten_seconds_and_at_most_an_hour_apart(parts: Parts) -> None:
    assert audit(parts).step()
    first = row(parts)
    assert first.round_started_at and 3_590 < (first.due_at - first.round_started_at).total_seconds() < 3_610
    insert_at(parts, *(number / 1_000_000 for number in range(1, 50)))  # the first of a million tasks
    change(parts, due_at=LONG_AGO, round_started_at=parts.database.now() - timedelta(seconds=10))
    assert audit(parts).step()
    told, now = row(parts), parts.database.now()
    assert 16 <= told.checked["looked"] <= 40 and 5 < (told.due_at - now).total_seconds() <= 10


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_step_that_was_set_by_a_clock_a_day_ahead_is_due(parts: Parts) -> None:
    keep(parts, 2)
    assert audit(parts).run()
    change(parts, due_at=parts.database.now() + timedelta(hours=1))
    assert not audit(parts).run()
    change(parts, due_at=parts.database.now() + timedelta(days=1))
    assert audit(parts).run()


def test_a_round_that_a_clock_a_year_ahead_began_goes_on(parts: Parts) -> None:
    insert_at(parts, 0.5)
    assert audit(parts, days=30).step()
    change(parts, due_at=LONG_AGO, round_started_at=parts.database.now() + timedelta(days=365))
    assert audit(parts, days=30).step()
    begun = stands(parts).round_started_at
    assert begun is not None
    assert begun <= parts.database.now(), "otherwise no task is audited for a year"


def test_fewer_days_apply_within_the_hour(parts: Parts) -> None:
    insert_at(parts, 0.5)
    assert audit(parts, days=30).step()
    change(parts, due_at=LONG_AGO, round_started_at=parts.database.now() - timedelta(days=1))
    assert audit(parts, days=30).step() and row(parts).checked["looked"] == 0
    change(parts, due_at=LONG_AGO)
    assert audit(parts, days=1).step() and stands(parts).round_ended_at


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_more_days_repeat_no_task(parts: Parts) -> None:
    insert_at(parts, 0.25)
    assert audit(parts, days=1).step()
    change(parts, due_at=LONG_AGO, round_started_at=parts.database.now() - timedelta(hours=12))
    assert audit(parts, days=1).step()
    for _ in range(2):
        change(parts, due_at=LONG_AGO)
        assert audit(parts, days=10).step()
    assert (row(parts).checked["looked"], 0.5 < stands(parts).share < 0.6) == (1, True)


# -- the lease --------------------------------------------------------------------------------------------------------


def steps_until_over(parts: Parts) -> int:
    """Run one worker's periodic job until a round has ended. Returns the number of steps."""
    work, taken = audit(parts), []

    def is_over() -> bool:
        taken.append(work.step())
        return stands(parts).last is not None

    wait_until(is_over, every=0.005)
    return sum(taken)


def test_two_late_workers_share_one_round_without_a_pause(
    parts: Parts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_audit, "STEP_TASKS", 1)
    keep(parts, 4)
    begin(parts)
    with ThreadPoolExecutor(2) as threads:
        steps = sum(threads.map(steps_until_over, [parts] * 2))
    last = stands(parts).last
    assert last and (last["looked"], last["counts"]["hashed"], last["late"]) == (4, 4, True)
    assert steps >= 4 and capsys.readouterr().out.count("audit.round_delayed") == 1


def test_second_worker_does_nothing_while_the_lease_is_held(parts: Parts, gated: Bucket, gate: Gate) -> None:
    """The lease is renewed meanwhile."""
    keep(parts, 1)
    begin(parts)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(audit(parts, gated, lease_seconds=3).step)
        assert gate.arrived.wait(20)
        held, renewed = row(parts).lease, set[datetime]()
        wait_until(lambda: renewed.add(row(parts).due_at) or len(renewed) > 2)
        assert not audit(parts).step() and row(parts).lease == held
        gate.open.set()
        assert slow.result(20)
    assert (stands(parts).hashed, row(parts).lease) == (1, None)


def test_worker_that_lost_the_lease_changes_nothing_and_the_next_continues(
    parts: Parts, gated: Bucket, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_audit, "STEP_TASKS", 1)
    keep(parts, 3)
    begin(parts)
    assert audit(parts).step()
    first = row(parts).cursor
    change(parts, due_at=LONG_AGO)
    with ThreadPoolExecutor(1) as threads:
        frozen = threads.submit(audit(parts, gated).step)
        assert gate.arrived.wait(20) and row(parts).cursor == first
        change(parts, due_at=LONG_AGO)  # the lease has run out
        assert audit(parts).step()
        after = row(parts)
        gate.open.set()
        assert not frozen.result(20)
    assert row(parts).model_dump() == after.model_dump()
    assert (after.checked["looked"], after.checked["counts"]["hashed"], first is not None) == (2, 2, True)
    assert after.cursor and first and after.cursor > first
    told = go_round(parts, audit(parts))
    assert told.last and (told.last["looked"], told.hashed) == (3, 3)


# -- workers and reports ----------------------------------------------------------------------------------------------


def chore(parts: Parts) -> Any:
    (found,) = [each for each in parts.periodic_jobs() if each.name == "audit"]
    return found.run


def test_continuous_audit_is_off_by_default_and_clears_its_findings(parts: Parts) -> None:
    asset = given_up(parts)
    chore(parts)()
    assert stands(parts) == Standing()
    assert found(go_round(parts, audit(parts))) == [("missing", asset.key)]
    assert chore(parts)()
    assert stands(parts).findings == [] and not chore(parts)()


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_findings_of_another_workers_audit_are_not_cleared(parts: Parts) -> None:
    given_up(parts)
    go_round(parts, audit(parts))
    change(parts, lease=uuid.uuid4(), due_at=parts.database.now() + timedelta(minutes=1))
    assert not chore(parts)() and stands(parts).faults == 1


@pytest.mark.parametrize("database_kind", ["sqlite"])
@pytest.mark.parametrize("changes", [{"audit_days": 0.01}])
def test_worker_runs_the_continuous_audit(parts: Parts) -> None:
    asset = given_up(parts)
    begin(parts)
    with working(parts):
        wait_until(lambda: stands(parts).round_ended_at and row(parts).checked and row(parts).lease is None)
    assert found(stands(parts)) == [("missing", asset.key)]


@pytest.mark.parametrize("days", [0, 0.001, -1, "many"])
def test_invalid_days_are_refused(days: Any) -> None:
    with pytest.raises(config.SettingsInvalid, match="RECEIVER_AUDIT_DAYS"):
        config.load(s3_bucket="pictures", audit_days=days)


@pytest.mark.parametrize("database_kind", ["sqlite"])
@pytest.mark.parametrize("changes", [{"metrics_token": "a-token"}])
def test_readiness_and_metrics_show_faults(web: Web, parts: Parts) -> None:
    permitted = {"Authorization": "Bearer a-token"}
    assert httpx.get(f"{web.url}/readyz", headers=permitted).json()["checks"]["audit"] == "ok"
    assert "receiver_audit_age_seconds NaN" in httpx.get(f"{web.url}/metrics", headers=permitted).text
    given_up(parts)
    go_round(parts, audit(parts))
    time.sleep(readiness.FRESH_SECONDS)
    ready = httpx.get(f"{web.url}/readyz", headers=permitted)
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert ready.json()["checks"]["audit"] == "1 fault, see receiver status"
    numbers = httpx.get(f"{web.url}/metrics", headers=permitted).text
    told = dict(line.split() for line in numbers.splitlines() if line.startswith("receiver_audit"))
    assert 0 <= float(told.pop("receiver_audit_age_seconds")) < 60
    names = ("faults", "hashed", "share", "late")
    assert [told[f"receiver_audit_{name}"] for name in names] == ["1.0", "0.0", "1.0", "0.0"]
    assert "canary" not in numbers + ready.text


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_status_shows_faults_without_signatures(
    parts: Parts, database_url: str, sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = given_up(parts).key
    go_round(parts, audit(parts))
    receiver = CommandLine(variables(database_url, parts.bucket, sandbox), tmp_path)
    table, listed = receiver("status"), receiver("status", "--json")
    assert "1 audit fault " in table.out and f"missing  {key}" in table.out
    (fault,) = listed.json["audit"]["findings"]
    assert (fault["kind"], fault["key"], listed.json["summary"]["audit_faults"]) == ("missing", key, 1)
    everything = json.dumps(row(parts).model_dump(), default=str) + capsys.readouterr().out
    assert "canary" not in everything + json.dumps(listed.json["audit"]) and "audit.fault_found" in everything
