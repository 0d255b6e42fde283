"""What needs a person: each kind once, with one sentence, one action, and a link to its rows."""

from __future__ import annotations

import dataclasses
import html
import re
import socket
import uuid
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import col, select

from receiver.app.console_parts import make_console
from receiver.app.wiring import Parts
from receiver.cli import show
from receiver.console import catalogue, needs
from storage.accounts import pauses
from storage.bucket.bucket import Bucket
from storage.database import free_space
from storage.errors import AccountRefused, ModelRefused
from storage.filters import TaskFilter
from storage.operations import heartbeats, lists, measures, outbox
from storage.operations.lists import newest_tasks
from storage.rows import events
from storage.rows.events import record_act
from storage.rows.models import Batch, Dispatch, Event, RollingAudit
from storage.rows.tasks import DEFAULTED, SILENT
from storage.states import ArchiveState, AssetState, DispatchState, Step, TaskState
from tests.console_reader import Reader
from tests.harness import wait_until
from tests.pipeline import deliver, insert_row
from tests.plans import scans
from tests.receiver.console.test_access import away
from tests.receiver.web.test_readiness import set_read_only
from tests.rows import LONG_AGO, new_asset, new_assets

ON_SQLITE = pytest.mark.databases("sqlite")  # the store alone, and links
ITEM = re.compile(
    r'<li class="(?:bad|wait)"><div><strong>(.*?)</strong>.*?<a class="button" href="([^"]*)">(.*?)</a></li>'
)
# What the page behind a need's link shows. `ELSEWHERE` have tests of their own.
SHOWN = {
    "account": "waits-for-money", "model": "waits-for-money", "workers": "No worker", "deadline": "soon-deleted",
    "failed": "given-up", "again": "tried-again", "overdue": "soon-deleted", "dead": "answered 500",
    "disabled": "client", "unmatched": "nobody-has-this", "rejected": "JSON", "audit": "vanished-object",
    "batch": "slow-batch",
}  # fmt: skip
ELSEWHERE = {"store", "slow", "provider", "held", "room", "database"}


def everything(parts: Parts) -> None:
    """An installation with every fault that needs a person."""
    now = parts.database.now()
    archiving = {"state": TaskState.SUCCEEDED, "archive": ArchiveState.ARCHIVING, "step": None, "due_at": None}
    insert_row(parts, external_task_id="waits-for-money", state=TaskState.CREATED)
    soon = insert_row(parts, external_task_id="soon-deleted", files_expire_at=now + timedelta(minutes=5), **archiving)
    again = insert_row(parts, external_task_id="tried-again", **archiving)
    failed = insert_row(parts, external_task_id="given-up", **{**archiving, "archive": ArchiveState.INCOMPLETE})
    deliver(parts, None, {"task_id": "nobody-has-this", "task_status": "succeed"})
    deliver(parts, failed, b"<html>no JSON")
    with parts.database.write() as session:
        pauses.pause(session, "kling", "m", AccountRefused("refused", code=1102, said="top up"))
        pauses.pause(session, "kling", "m1", ModelRefused("refused", code=1103, said="not yours"))
        new_asset(session, soon, 0)
        new_asset(session, again, 0, error="answered 503", due_at=now + timedelta(hours=1))
        new_asset(session, failed, 0, state=AssetState.FAILED, error="broken", due_at=None)
        for sink in ("client", "not-in-the-setting"):
            outbox.disable(session, sink, "answered 410")
        told = session.exec(select(Event)).first()
        assert told is not None
        dead: dict[str, Any] = {"state": DispatchState.DEAD, "error": "answered 500", "created_at": now}
        session.add(Dispatch(sink="hook", event_id=told.id or 0, task_id=told.task_id, **dead))
        finding = {"kind": "missing", "key": "vanished-object", "detail": "", "task": ""}
        session.add(RollingAudit(name="archive", due_at=now, findings=[finding]))
        batch = Batch(name="slow-batch", created_at=LONG_AGO)
        session.add(batch)
        session.flush()
        batch_id = batch.id
    insert_row(parts, batch_id=batch_id, created_at=LONG_AGO)


def items(ann: Reader) -> dict[str, tuple[str, str]]:
    """(link, action) of each need on the overview, by its sentence."""
    found = ITEM.findall(ann.page("").replace("\n", ""))
    return {html.unescape(said): (html.unescape(link), action) for said, link, action in found}


def pattern(key: str) -> re.Pattern[str]:
    return re.compile("|".join(re.sub(r"\\{\w+\\}", ".*", re.escape(each)) for each in TEXTS[f"need.{key}"].split("|")))


TEXTS = catalogue.TEXTS["en"]
KEYS = [key.split(".")[1] for key in TEXTS if key.startswith("need.") and key.count(".") == 1]


@ON_SQLITE
@pytest.mark.usefixtures("fresh_needs")
def test_the_link_of_each_need_shows_what_it_is_about(parts: Parts, ann: Reader) -> None:
    everything(parts)
    found = wait_until(lambda: (seen := items(ann)) and len(seen) >= 12 and seen, every=0.3)
    heartbeats.register(parts.database, 1)
    found |= wait_until(
        lambda: (seen := items(ann)) and any(pattern("overdue").fullmatch(said) for said in seen) and seen, every=0.3
    )
    for key in SHOWN:
        [(link, action)] = [value for said, value in found.items() if pattern(key).fullmatch(said)]
        assert action, key
        if key != "workers":  # a worker is alive by now
            assert SHOWN[key] in ann.page(link.removeprefix("/console")), (key, link)
    assert set(KEYS) == {*SHOWN, *ELSEWHERE}


@pytest.mark.usefixtures("fresh_needs")
def test_due_rows_of_a_page_are_counted_up_to_a_bound(
    parts: Parts, ann: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "MAX_DUE", 3)
    for _ in range(4):
        insert_row(parts, due_at=LONG_AGO)
    assert wait_until(lambda: "<b>3+</b>" in (page := ann.page("")) and "Work due now: 3+." in page, every=0.3)


def test_files_of_a_need_are_found_by_an_index(parts: Parts) -> None:
    everything(parts)
    for files, name in (("expiring", "soon-deleted"), ("waiting", "tried-again"), ("failed", "given-up")):
        wanted = TaskFilter(files=files)
        with parts.database.read() as session:
            assert name in {task.external_task_id for task in newest_tasks(session, wanted, None).rows}
        assert not scans(parts.database, lambda session, wanted=wanted: newest_tasks(session, wanted, None))


def test_acts_and_dispatches_are_found_by_an_index(parts: Parts) -> None:
    everything(parts)
    with parts.database.write() as session:
        told = list(session.exec(select(Event).order_by(col(Event.id))).all())
        record_act(session, "ann", "retry", "x", [told[0].task_id, None])
    assert not scans(parts.database, lambda session: events.newest_acts(session, 25))
    assert not scans(parts.database, lambda session: lists.dispatches_of(session, told))
    with parts.database.read() as session:
        assert [name for _, name in events.newest_acts(session, 25)] == [None, "waits-for-money"]


def test_an_old_failure_is_found_behind_more_tasks_than_a_page_reads(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "SCANNED", 2)
    insert_row(parts, external_task_id="old", state=TaskState.FAILED, archive=ArchiveState.INCOMPLETE)
    for number in range(4):
        insert_row(parts, created_at=LONG_AGO + timedelta(days=number + 1))
    with parts.database.read() as session:
        for wanted in (TaskFilter(state="failed"), TaskFilter(archive="incomplete")):
            assert [task.external_task_id for task in newest_tasks(session, wanted, None).rows] == ["old"]


@ON_SQLITE
@pytest.mark.parametrize(("does", "key"), [("refuses", "store"), ("hangs", "slow")])
def test_slow_or_unavailable_store_is_shown_on_the_overview(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, does: str, key: str
) -> None:
    monkeypatch.setattr(needs, "SLOW_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if does == "refuses":
            server.close()
        elsewhere = Bucket("none", endpoint_url=f"http://127.0.0.1:{port}", keys=("key", "secret"))
        seen = needs.Needs(dataclasses.replace(make_console(parts)._of, bucket=elsewhere))
        wait_until(lambda: seen._store.unanswered_seconds() > 0.3 or seen._store.state() not in ("ok", "no answer yet"))
        assert key in [each.key for each in seen.now().needs]


def test_provider_that_does_not_answer_is_shown(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    waits = {"due_at": LONG_AGO, "attempts": 1}
    said = "no connection to the provider (Connection refused)"
    insert_row(parts, state=TaskState.CREATED, step=Step.CREATE, note=said, **waits)
    insert_row(parts, note=f"{SILENT}; {said}", **waits)
    insert_row(parts, note=f"{DEFAULTED}its model", **waits)
    insert_row(parts, note=said, lease=uuid.uuid4(), **waits)
    show.show_latest(parts, 1)
    assert f"2 tasks wait: {said} · " in capsys.readouterr().out
    (need,) = [each for each in needs.Needs(make_console(parts)._of).now().needs if each.key == "provider"]
    assert (need.link, need.values) == ("/console/settings#check", {"n": 2, "reason": said})


@ON_SQLITE
def test_files_that_the_spool_folder_cannot_take_are_shown_once(parts: Parts) -> None:
    full = "the disk of the spool folder is full; free space there"
    new_assets(parts.database, 2, error=full, due_at=parts.database.now())
    new_assets(parts.database, 1, error="answered 503", due_at=parts.database.now())
    found = {each.key: each.values for each in needs.Needs(make_console(parts)._of).now().needs}
    assert (found["held"], found["again"]) == ({"n": 2, "reason": full}, {"n": 1})
    assert show.measured(parts).as_dict()["waiting_files"] == 2


@ON_SQLITE
def test_full_disk_is_shown_on_the_overview(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = needs.Needs(make_console(parts)._of)
    assert "room" not in [each.key for each in seen.now().needs]
    monkeypatch.setattr(free_space, "MIN_FREE_SHARE", 2.0)
    seen.forget()
    (need,) = [each for each in seen.now().needs if each.key == "room"]
    assert need.values["reason"].endswith("% free, and deliveries need 200 %")
    assert str(catalogue.cause("zh", need.values["reason"])).startswith("数据库所在磁盘仅剩 ")


def test_database_that_takes_no_writes_is_shown_in_place_of_its_workers(parts: Parts) -> None:
    seen = needs.Needs(make_console(parts)._of)
    set_read_only(parts.database, "on")
    try:
        wait_until(lambda: seen.forget() or "database" in keys_of(seen), every=0.3)
        assert "workers" not in keys_of(seen)
    finally:
        set_read_only(parts.database, "off")
    wait_until(lambda: seen.forget() or "workers" in keys_of(seen), every=0.3)


@ON_SQLITE
def test_page_without_its_database_names_it_and_the_command(
    parts: Parts, ann: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.database, "read", away)
    answer = ann.get("/batches")
    assert answer.status_code == 503
    assert "The database does not answer" in answer.text and "Run receiver check" in answer.text


def keys_of(seen: needs.Needs) -> set[str]:
    return {each.key for each in seen.now().needs}
