"""Measures: waiting and overdue rows, near deadlines, lost and late callbacks."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from prometheus_client import generate_latest
from sqlalchemy import delete, event, text
from sqlmodel import col, select, update

from receiver.app import check_events
from receiver.app.findings import Status
from receiver.app.wiring import Parts
from receiver.base import telemetry
from receiver.base.telemetry import DEPRECATED, WORK, WORK_OF_EACH
from receiver.cli import show
from receiver.gateway import client_callback
from receiver.sandbox import Sandbox
from receiver.tasks.operate import Operator
from storage.accounts.rate_limit import ReadRateLimit
from storage.bucket.store_errors import refusal
from storage.database.sessions import Database
from storage.filters import TaskFilter
from storage.operations import deadlines, heartbeats, measures, outbox
from storage.operations.lists import newest_tasks
from storage.operations.measures import AccountMeasures, Measures, SinkMeasures, measure
from storage.rows import events
from storage.rows.events import EventName
from storage.rows.models import Dispatch, Event, Task
from storage.states import ArchiveState, AssetState, DispatchState, TaskState
from tests.harness import wait_until
from tests.pipeline import Web, callbacks_of, deliver, drain, insert_row, run, running
from tests.plans import plans, scans
from tests.rows import LONG_AGO, event_names, new_asset, new_task, stored
from tests.unreported_tasks import OTHERS, REQUEST, states_of, submit


@pytest.fixture
def unpaced(parts: Parts) -> Parts:
    """Parts without a rate limit of reads."""
    parts.__dict__["read_rate_limit"] = ReadRateLimit(parts.database, per_second=10_000)
    return parts


def expiring(parts: Parts, hours: float, asset_state: AssetState = AssetState.DUE, **values: Any) -> Task:
    task = insert_row(parts, archive=ArchiveState.ARCHIVING, step=None, due_at=None)
    expires = parts.database.now() + timedelta(hours=hours)
    with parts.database.write() as session:
        new_asset(session, task, 0, state=asset_state, **values)
        session.execute(update(Task).where(col(Task.id) == task.id).values(files_expire_at=expires))
    return task


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_deadline_is_announced_once_hours_before(parts: Parts) -> None:
    near, past, far = (expiring(parts, hours) for hours in (5, -1, 7))
    done = expiring(parts, 5, AssetState.ARCHIVED)
    lead = deadlines.lead_seconds(30 * 86_400)
    assert [deadlines.announce(parts.database, lead) for _ in range(3)] == [2, 0, 0]
    named = [event_names(parts.database, task).count("task.deadline_near") for task in (near, past, far, done)]
    assert named == [1, 1, 0, 0]
    assert stored(parts.database, near)["deadline_near_at"] is not None


def test_lead_time_is_at_most_six_hours() -> None:
    assert [deadlines.lead_seconds(days * 86_400) / 3_600 for days in (30, 1, 1 / 24)] == [6, 6, 0.25]


def test_workers_announce_deadlines(parts: Parts) -> None:
    task = expiring(parts, 1, due_at=parts.database.now() + timedelta(minutes=30))  # the worker does not try it now
    with running(parts.worker([])):
        wait_until(lambda: "task.deadline_near" in event_names(parts.database, task))


def test_event_of_a_deadline_has_its_time(parts: Parts) -> None:
    task = expiring(parts, 1)
    deadlines.announce(parts.database, 6 * 3_600)
    with parts.database.read() as session:
        event = session.exec(select(Event).where(Event.name == "task.deadline_near")).one()
    assert event.data == {"files_expire_at": stored(parts.database, task)["files_expire_at"].isoformat()}


# -- numbers ----------------------------------------------------------------------------------------------------------


def measured(parts: Parts) -> Measures:
    with parts.database.read() as session:
        return measure(session, deadline_seconds=6 * 3_600)


def test_lost_and_late_callbacks_are_counted(web: Web, unpaced: Parts, sandbox: Sandbox) -> None:
    sandbox.set(callback_drop_rate=1)
    made = submit(unpaced, 3)
    assert states_of(unpaced, [drain(unpaced, task.external_task_id) for task in made]) == {TaskState.SUCCEEDED}
    sandbox.set(callback_drop_rate=0)
    heard = unpaced.submitter.submit(REQUEST).task
    wait_until(lambda: [each for each in callbacks_of(unpaced) if each.source == "push"])
    drain(unpaced, heard.external_task_id)
    late = unpaced.kling.read(provider_task_id=None, external_task_id=made[0].external_task_id)
    assert late is not None
    deliver(unpaced, made[0], late.body)
    assert measured(unpaced).callbacks_expected == 0  # a callback is expected after five minutes
    age(unpaced, minutes=10)
    found = measured(unpaced)
    assert (found.callbacks_expected, found.callbacks_lost, found.callbacks_late) == (4, 2, 1)
    assert (found.callback_loss_rate, found.late_seconds > 0, found.archived_day) == (0.5, True, 4)


def age(parts: Parts, *, minutes: int) -> None:
    """Move all times into the past."""
    earlier = timedelta(minutes=minutes)
    with parts.database.write() as session:
        for task in session.exec(select(Task)):
            assert task.completed_at is not None
            task.completed_at -= earlier
            task.end_called_back_at = task.end_called_back_at and task.end_called_back_at - earlier


@pytest.mark.databases("sqlite")
def test_unverified_callback_is_not_counted_as_lost(unpaced: Parts, sandbox: Sandbox) -> None:
    (task,) = submit(unpaced, 1, prompt="[fail]")
    wait_until(lambda: sandbox.ledger().tasks[0].status == "failed")
    deliver(unpaced, task, {"task_id": task.provider_task_id, "task_status": "failed", "task_status_msg": "no"})
    run(unpaced, "reads")
    age(unpaced, minutes=10)
    found = measured(unpaced)
    assert (found.callbacks_expected, found.callbacks_lost, found.failed_day) == (1, 0, 1)


def test_due_and_overdue_rows_are_counted(parts: Parts) -> None:
    insert_row(parts, due_at=parts.database.now())
    insert_row(parts, due_at=parts.database.now() - timedelta(minutes=10))
    insert_row(parts)
    deliver(parts, None, OTHERS)
    expiring(parts, 1)
    found = measured(parts)
    assert (found.due, found.overdue, found.unmatched, found.deadline_near) == (3, 2, 1, 1)
    assert found.oldest_due_seconds >= 600


def test_every_measure_has_its_gauge(parts: Parts) -> None:
    found = measured(parts).as_dict()
    unlabelled = {"store_waits", "provider_waits"}  # a message is no label
    assert WORK.keys() | DEPRECATED.keys() | WORK_OF_EACH.keys() == found.keys() - unlabelled
    assert {name: gauges.keys() for name, gauges in WORK_OF_EACH.items()} == {
        "accounts": asdict(AccountMeasures()).keys() - {"pauses"},
        "sinks": asdict(SinkMeasures()).keys(),
    }


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("changes", [{"metrics_token": "a-token"}])
def test_each_event_is_counted_once_over_all_scrapes(web: Web, parts: Parts) -> None:
    def scrape() -> dict[str, int]:
        text = httpx.get(f"{web.url}/metrics", headers={"Authorization": "Bearer a-token"}).text
        return {name: int(count) for name, count in re.findall(r'receiver_events_total{event="(.+)"} (\d+)', text)}

    def record(*names: EventName) -> None:
        with parts.database.write() as session:
            for name in names:
                events.record(session, name, None)
        outbox.sequence_all(parts.database, [])

    record(EventName.TASK_ARCHIVED)
    before = scrape()
    assert before.keys() == set(EventName)
    record(EventName.TASK_ARCHIVED, EventName.TASK_ARCHIVED, EventName.TASK_FAILED)
    assert Counter(scrape()) - Counter(before) == {"task.archived": 2, "task.failed": 1}
    record(EventName.TASK_ARCHIVED)
    assert Counter(scrape()) - Counter(before) == {"task.archived": 3, "task.failed": 1}
    assert "event_seq" in plans(parts.database, lambda session: events.count_after(session, 1))


# -- accounts, sinks --------------------------------------------------------------------------------------------------


def queued(parts: Parts, *, held: int, waiting: int) -> None:
    """Tasks that hold two slots each, and tasks that wait for one."""
    with parts.database.write() as session:
        for _ in range(held):
            new_task(session, slots=2, due_at=None)
        for _ in range(waiting):
            new_task(session, slots=-1, queued_at=LONG_AGO, due_at=None)


def tell(parts: Parts, sink: str, state: DispatchState, *, seconds_ago: float) -> None:
    """An event that is open for this sink, or dead."""
    with parts.database.write() as session:
        then = parts.database.now() - timedelta(seconds=seconds_ago)
        fact = Event(name="task.failed", at=then)
        session.add(fact)
        session.flush()
        fact.seq = fact.id
        session.add(Dispatch(sink=sink, event_id=fact.id, state=state, created_at=then))


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("changes", [{"kling_slots": 20}])
def test_slots_and_queue_are_measured_per_account(parts: Parts) -> None:
    queued(parts, held=3, waiting=2)
    assert show.measured(parts).accounts == {"kling": AccountMeasures(6, 20, 2)}
    with parts.database.write() as session:
        parts.slots.refused(session, 1)
    found = show.measured(parts)
    assert found.accounts["kling"].slot_limit == 5
    assert show.summary(found).startswith("0 due · kling: 6 of 5 slots held, 2 tasks wait · ")


@pytest.mark.databases("sqlite")
def test_account_without_a_limit_is_measured_from_its_rows(parts: Parts) -> None:
    assert measured(parts).accounts == {}
    queued(parts, held=1, waiting=1)
    assert measured(parts).accounts == {"kling": AccountMeasures(2, None, 1)}
    assert "kling: 1 task waits in the queue" in show.summary(measured(parts))


@pytest.mark.databases("sqlite")
def test_events_are_measured_per_sink(parts: Parts) -> None:
    for sink, state, age in (("a", "due", 60), ("a", "due", 10), ("a", "dead", 90), ("b", "dead", 5), ("b", "due", 5)):
        tell(parts, sink, DispatchState(state), seconds_ago=age)
    tell(parts, "c", DispatchState.DELIVERED, seconds_ago=5)
    tell(parts, client_callback.NAME, DispatchState.DUE, seconds_ago=900)  # its host is no fault of the receiver
    found = measured(parts)
    counts = {name: (each.events_open, each.events_dead) for name, each in found.sinks.items()}
    assert counts == {"a": (2, 1), "b": (1, 1), client_callback.NAME: (1, 0)}
    oldest = found.sinks["a"].oldest_event_seconds
    assert oldest == found.oldest_event_seconds >= 60 > found.sinks["b"].oldest_event_seconds
    assert (found.events_open, found.events_dead) == (3, 2)
    assert (
        "0 due · events to a: 2 wait, 1 given up · events to b: 1 wait, 1 given up · events to client: 1 wait"
        in show.summary(found)
    )


def test_dismissal_ends_the_alarm_of_files_that_were_given_up(parts: Parts) -> None:
    task = insert_row(parts, state=TaskState.SUCCEEDED, archive=ArchiveState.INCOMPLETE, step=None, due_at=None)
    with parts.database.write() as session:
        new_asset(session, task, 0, state=AssetState.FAILED, error="broken", due_at=None)
        new_asset(session, task, 1)

    def alarmed() -> tuple[int, int]:
        with parts.database.read() as session:
            return measured(parts).failed_assets, len(newest_tasks(session, TaskFilter(files="failed"), None).rows)

    assert alarmed() == (1, 1)
    Operator(parts.database, parts.providers, parts.schedule).dismiss(task.external_task_id, "gone")
    assert alarmed() == (0, 0)


def test_status_names_the_rows_that_need_a_person(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"state": TaskState.SUCCEEDED, "archive": ArchiveState.INCOMPLETE, "step": None, "due_at": None}
    for number in range(show.SHOWN_EACH + 1):
        made = LONG_AGO + timedelta(minutes=number)
        given_up = insert_row(parts, external_task_id=f"lost {number}", created_at=made, **lost)
        with parts.database.write() as session:
            new_asset(session, given_up, 0, state=AssetState.FAILED, error="broken", due_at=None)
    near = expiring(parts, hours=1)
    unmatched = deliver(parts, None, {"task_id": "nobody-has-this", "task_status": "succeed"})
    show.show_latest(parts, 1)
    said = capsys.readouterr().out.splitlines()
    assert "  files given up: 'lost 5' 'lost 4' 'lost 3' 'lost 2' 'lost 1' …" in said
    assert f"  near their deadline: {near.external_task_id}" in said
    assert f"  deliveries unmatched: {unmatched.id}" in said


@pytest.mark.parametrize("changes", [{"event_sinks": "b=stdout: c=file:///tmp/c.jsonl"}])
def test_check_says_what_sinks_answered(parts: Parts) -> None:
    for sink, state in (("a b", "dead"), ("b", "dead"), ("b", "due"), ("c", "due"), ("client", "dead")):
        tell(parts, sink, DispatchState(state), seconds_ago=60)
    with parts.database.write() as session:
        session.execute(update(Dispatch).where(col(Dispatch.sink) != "c").values(error="a-host answered 500"))
    found = {each.name: (each.line, each.advice) for each in check_events.undelivered(parts)}
    given_up = "1 event given up, the newest after: a-host answered 500"
    mend = "repair that receiver, then `receiver events redeliver --all-dead --sink"
    waits = "1 event waiting, the newest after: a-host answered 500"
    assert found == {
        "events to a b: given up": (given_up, check_events.REMOVED),
        "events to b: given up": (given_up, f"{mend} b`"),
        "events to b: waiting": (waits, "repair that receiver; they are sent again"),
    }


@pytest.mark.parametrize("changes", [{"event_sinks": "new=stdout:"}])
def test_check_names_a_sink_that_was_renamed_while_events_waited(parts: Parts) -> None:
    """The alarm on the oldest event led to a check that named nothing, or said that they are sent again."""
    for sink, state in (("old", "due"), ("old", "due"), ("new", "due"), ("client", "due"), ("gone", "dead")):
        tell(parts, sink, DispatchState(state), seconds_ago=60)
    with parts.database.write() as session:
        session.execute(update(Dispatch).where(col(Dispatch.id) == 1).values(error="a-host answered 500"))
    assert "events to old: waiting" not in {each.name for each in check_events.undelivered(parts)}
    [found] = check_events.left_behind(parts)
    assert (found.name, found.status) == ("events to old: waiting", Status.FAULT)
    assert found.line == "2 events waiting, and RECEIVER_EVENT_SINKS has no sink of this name"
    assert "`receiver events disable old`" in found.advice
    with parts.database.write() as session:  # as advised
        outbox.disable(session, "old", "by hand")
    outbox.end_disabled(parts.database)
    advised = {each.name: each.advice for each in check_events.undelivered(parts)}
    assert advised == dict.fromkeys(("events to gone: given up", "events to old: given up"), check_events.REMOVED)


@pytest.mark.parametrize("changes", [{"event_sinks": "a=stdout: b=file:///tmp/b.jsonl"}])
def test_check_names_a_sink_of_the_setting_that_gets_no_events(parts: Parts) -> None:
    """A webhook that once answered 410 had a good line: its address may be posted to."""
    with parts.database.write() as session:
        for sink in ("b", "of an earlier setting"):
            outbox.disable(session, sink, "b.example.com answered 410")
    [found] = check_events.disabled(parts)
    assert (found.name, found.status) == ("events to b: disabled", Status.FAULT)
    assert found.line == "disabled, so no event is queued for it: b.example.com answered 410"
    assert found.advice.startswith("`receiver events enable b`")


@pytest.mark.parametrize("changes", [{"metrics_token": "a-token"}])
def test_callbacks_that_a_client_never_accepts_are_shown_and_no_fault(web: Web, parts: Parts) -> None:
    """Three creates with a callback address that answers 410 would hide the loss of an operator's event for good."""

    def checks() -> tuple[str, ...]:
        found = httpx.get(f"{web.url}/readyz", headers={"Authorization": "Bearer a-token"}).json()
        return found["checks"]["events"], found["checks"]["clients"], found["status"]

    heartbeats.register(parts.database, 1)
    for sink in (client_callback.NAME, client_callback.NAME, "hook"):
        before = measured(parts).events_dead
        tell(parts, sink, DispatchState.DEAD, seconds_ago=5)
        assert measured(parts).events_dead - before == (sink == "hook")
        if sink != "hook":
            wait_until(lambda: checks()[1] != "ok")
            assert checks()[::2] == ("ok", "ok")
    wait_until(lambda: checks() == ("1 were given up", "2 callbacks were never accepted", "degraded"))
    assert measured(parts).sinks[client_callback.NAME].events_dead == 2


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("changes", [{"metrics_token": "a-token", "event_sinks": "new=stdout:"}])
def test_a_disabled_sink_is_a_fault_while_it_is_in_the_setting(web: Web, parts: Parts) -> None:
    """`receiver check` advises to take one that answered 410 from the setting. Then readyz stayed degraded for ever."""
    with parts.database.write() as session:
        for sink in ("new", "removed"):
            outbox.disable(session, sink, "answered 410")
    found = httpx.get(f"{web.url}/readyz", headers={"Authorization": "Bearer a-token"}).json()
    assert found["checks"]["events"] == "sink new is disabled"


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("changes", [{"metrics_token": "a-token"}])
def test_events_without_a_number_are_open_and_late_ones_are_a_fault(web: Web, parts: Parts) -> None:
    def ready() -> str:
        found = httpx.get(f"{web.url}/readyz", headers={"Authorization": "Bearer a-token"}).json()
        return str(found["checks"]["numbers"])

    tell(parts, "a", DispatchState.DUE, seconds_ago=5)
    with parts.database.write() as session:
        events.record(session, EventName.TASK_FAILED, None)
    assert (ready(), list(check_events.numbers(parts))) == ("ok", [])
    with parts.database.write() as session:
        events.record(session, EventName.TASK_FAILED, None)
        session.execute(update(Event).where(col(Event.seq).is_(None)).values(at=LONG_AGO))
    found = measured(parts)
    assert (found.events_open, found.sinks["a"].events_open) == (3, 1)
    assert found.oldest_event_seconds > 3_600 > found.sinks["a"].oldest_event_seconds
    assert "events without a number: 2" in show.summary(found)
    wait_until(lambda: ready().startswith("2 events have no number"))
    statuses = [next(check_events.numbers(parts)).status]
    heartbeats.register(parts.database, 1)
    assert [*statuses, next(check_events.numbers(parts)).status] == [Status.NOTE, Status.FAULT]


def test_events_without_a_number_are_found_by_their_index(database: Database) -> None:
    with database.write() as session:
        events.record(session, EventName.TASK_FAILED, None)
    assert scans(database, events.unnumbered) == []


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_gauges_of_idle_sinks_and_accounts_disappear(parts: Parts) -> None:
    def lines() -> set[str]:
        telemetry.update_work_gauges(measured(parts).as_dict())
        text = generate_latest(telemetry.REGISTRY).decode()
        return {line for line in text.splitlines() if "hook-of-mine" in line or 'account="kling"' in line}

    queued(parts, held=1, waiting=1)
    tell(parts, "hook-of-mine", DispatchState.DEAD, seconds_ago=5)
    found = lines()
    assert {'receiver_slots_held{account="kling"} 2.0', 'receiver_tasks_queued{account="kling"} 1.0'} < found
    assert 'receiver_sink_events_dead{sink="hook-of-mine"} 1.0' in found
    with parts.database.write() as session:
        session.execute(update(Task).values(slots=0, queued_at=None))
        session.execute(delete(Dispatch))
    assert lines() == set()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_no_measure_reads_a_whole_table(parts: Parts) -> None:
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(parts.database.reader, "before_cursor_execute", note)
    show.measured(parts)
    event.remove(parts.database.reader, "before_cursor_execute", note)
    with parts.database.read() as session:
        connection = session.connection()
        plans = [
            row[3]
            for statement, parameters in asked
            if statement.startswith("SELECT")
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
    assert len(plans) > 10
    whole = r"SCAN (task|callback|asset|event|dispatch)( AS .*| USING (COVERING )?INDEX sqlite_autoindex.*)?"
    assert [plan for plan in plans if re.fullmatch(whole, plan)] == []


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_rare_states_are_found_by_their_partial_indexes(database: Database) -> None:
    plans = []
    with database.read() as session:
        for question in (
            "SELECT id FROM callback WHERE external_task_id = 'x' AND state = 'unmatched'",
            "SELECT id FROM task WHERE archive = 'archiving' AND files_expire_at < '2026'",
        ):
            plans += [row[3] for row in session.execute(text(f"EXPLAIN QUERY PLAN {question}"))]
    assert [plan.split("INDEX ")[1].split()[0] for plan in plans] == ["callback_unmatched_external", "task_deadline"]


SPOOL_FULL = "the disk of the spool folder is full; free space there"
NO_SPOOL = "RECEIVER_SPOOL_DIR: /spool cannot be written (Permission denied): choose a folder that this user may write"


def refused_puts(parts: Parts) -> None:
    """Three files over a proxy's limit, one while the store was down, two that the spool folder could not take, and two
    that wait for other causes.
    """
    answer = {"Error": {"Code": "413"}, "ResponseMetadata": {"HTTPStatusCode": 413}}
    over = ClientError(answer, "PutObject")  # type: ignore[arg-type]
    away = EndpointConnectionError(endpoint_url="http://store.example:9000")
    errors = [str(refusal(over, "b", "http://store.example:9000", size)) for size in (1_000, 2_000_000, 3)]
    errors += [str(refusal(away, "b", "http://store.example:9000")), "cdn.example answered 503"]
    errors += [SPOOL_FULL, NO_SPOOL]
    task = insert_row(parts, archive=ArchiveState.ARCHIVING, step=None, due_at=None)
    with parts.database.write() as session:
        for index, error in enumerate((*errors, None)):
            new_asset(session, task, index, error=error, due_at=parts.database.now() + timedelta(minutes=index + 1))


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("changes", [{"metrics_token": "a-token"}])
def test_status_and_readiness_count_files_that_wait_for_the_store_or_the_spool(web: Web, parts: Parts) -> None:
    refused_puts(parts)
    causes = measured(parts).as_dict()["store_waits"]
    assert (sorted(causes.values()), causes[SPOOL_FULL], causes[NO_SPOOL]) == ([1, 1, 1, 3], 1, 1)
    limit = "3 files wait: a limit in front of the store at store.example:9000 refuses objects of their size"
    away = "1 file waits: the store at store.example:9000 cannot be reached"
    token = {"Authorization": "Bearer a-token"}
    with running(parts.worker([])):  # waiting files do not make the receiver degraded
        wait_until(lambda: httpx.get(f"{web.url}/readyz?strict=1", headers=token).status_code == 200)
        said = httpx.get(f"{web.url}/readyz", headers=token).json()["checks"]
    for words in (limit, away, f"1 file waits: {SPOOL_FULL}", f"1 file waits: {NO_SPOOL}"):
        assert words in show.summary(measured(parts))
        assert words in said["waiting"]


def test_files_that_wait_for_the_store_are_found_by_the_due_index(parts: Parts) -> None:
    refused_puts(parts)
    assert "asset_due" in plans(parts.database, measures.store_waits)
    assert scans(parts.database, measures.store_waits) == []


def test_status_prints_the_measures_in_one_line(parts: Parts) -> None:
    deliver(parts, None, OTHERS)
    line = show.summary(measured(parts))
    assert line == "0 due · 1 delivery unmatched · last 24 h: 0 archived, 0 incomplete, 0 failed"


@pytest.mark.parametrize("changes", [{"metrics_token": "a-token", "kling_slots": 20}])
def test_gauges_and_readiness_show_overdue_work(web: Web, parts: Parts) -> None:
    insert_row(parts, due_at=LONG_AGO)
    expiring(parts, 1)
    permitted = {"Authorization": "Bearer a-token"}
    numbers = httpx.get(f"{web.url}/metrics", headers=permitted).text
    shown = {"receiver_overdue_rows 2.0", "receiver_deadline_near_tasks 1.0", "receiver_unmatched_callbacks 0.0"}
    deprecated = {"receiver_overdue 2.0", "receiver_deadline_near 1.0", "receiver_unmatched 0.0"}
    assert shown | deprecated <= set(numbers.splitlines())
    assert 'receiver_slot_limit{account="kling"} 20.0' in numbers
    ready = httpx.get(f"{web.url}/readyz", headers=permitted)
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    late = {name: ready.json()["checks"][name] for name in ("work", "deadlines")}
    assert late == {"work": "2 rows are overdue", "deadlines": "1 task is about to lose files"}
