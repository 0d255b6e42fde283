"""What prune removes and what it does not."""

from __future__ import annotations

import uuid
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import delete, event, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, func, select

from receiver.tasks.operate import Operator
from storage.database.sessions import Database
from storage.operations import pruning
from storage.operations.outbox import Subscription, sequence_all
from storage.operations.rollups import Arrivals
from storage.rows import events
from storage.rows.events import EventName, record
from storage.rows.models import Asset, Callback, Dispatch, Event, Task
from storage.rows.reports import Schedule
from storage.states import ArchiveState, CallbackState, DispatchState, Step, TaskState
from tests.plans import plans, scans
from tests.rows import LONG_AGO, new_asset, new_task, stored

RETENTION = timedelta(days=30)
DONE = {"state": TaskState.SUCCEEDED, "archive": ArchiveState.ARCHIVED, "step": None, "due_at": None}
ARCHIVED = Subscription("hook", frozenset({EventName.TASK_ARCHIVED}))
CLIENT = "https://client.example.com/done?token=a-secret"
WAITS = {"state": TaskState.PROCESSING, "step": Step.READ}


@pytest.fixture
def operator(database: Database) -> Operator:
    return Operator(database, {}, Schedule())


def old(database: Database, **values: Any) -> Task:
    """An old task with a request, one file, one delivery, and two events of which one was sent."""
    with database.write() as session:
        request = {"request": {"prompt": "a boat"}, "request_hash": "h", "client_callback_url": CLIENT}
        task = new_task(session, **request | DONE | values)
        new_asset(session, task, 0, due_at=None)
        session.add(delivery(task.id))
        record(session, EventName.TASK_ARCHIVED, task.id)
        session.flush()
        session.execute(update(Event).values(at=LONG_AGO))
    sequence_all(database, [ARCHIVED])
    dispatch(database, DispatchState.DELIVERED)
    return task


def dispatch(database: Database, state: DispatchState) -> None:
    """Set the state of all dispatches."""
    with database.write() as session:
        session.execute(update(Dispatch).values(state=state, due_at=None))


def delivery(task_id: uuid.UUID | None, **values: Any) -> Callback:
    start = {"delivery_key": uuid.uuid4().hex, "provider": "kling", "source": "push", "body": b"{}"}
    return Callback(**start | {"task_id": task_id, "received_at": LONG_AGO, "state": CallbackState.APPLIED} | values)


def left(database: Database) -> dict[str, int]:
    with database.read() as session:
        tables = {"deliveries": Callback, "dispatches": Dispatch, "events": Event, "tasks": Task, "files": Asset}
        return {name: session.exec(select(func.count()).select_from(model)).one() for name, model in tables.items()}


def test_old_data_of_ended_tasks_is_pruned_but_the_task_stays(database: Database, operator: Operator) -> None:
    task = old(database)
    assert dict(operator.prune(RETENTION).counts) == {
        "deliveries": 1,
        "dispatches": 1,
        "events": 2,
        "requests": 1,
    }
    assert left(database) == {"deliveries": 0, "dispatches": 0, "events": 0, "tasks": 1, "files": 1}
    row = stored(database, task)
    assert (row["request"], row["request_hash"], row["client_callback_url"]) == ({}, "h", None)
    assert operator.prune(RETENTION).counts.total() == 0


def test_pruned_deliveries_stay_counted_for_a_month(database: Database, operator: Operator) -> None:
    """As a process that has just started counts them. A poll is no callback."""
    hours = [database.now() - timedelta(days=days) for days in (20, 40)]
    with database.write() as session:
        task = new_task(session, **DONE)
        for at in hours:
            session.add_all([delivery(task.id, received_at=at) for _ in range(3)])
            session.add(delivery(task.id, received_at=at, source="poll"))
    assert operator.prune(timedelta(days=10)).counts["deliveries"] == 8
    with database.read() as session:
        counted = [Arrivals().count(session, at.replace(minute=0, second=0, microsecond=0)) for at in hours]
    assert counted == [3, 0]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "values",
    [
        WAITS,
        {"archive": ArchiveState.ARCHIVING},
        {"step": Step.READ, "due_at": LONG_AGO},
        {"state": TaskState.CREATED, "archive": ArchiveState.NONE, "step": Step.CREATE},
    ],
)
def test_prune_keeps_everything_of_a_task_that_is_not_over(
    database: Database, operator: Operator, values: dict[str, Any]
) -> None:
    old(database, **values)
    before = left(database)
    assert operator.prune(RETENTION).counts.total() == 0
    assert left(database) == before


def test_prune_keeps_recent_and_waiting_rows(database: Database, operator: Operator) -> None:
    task, now = old(database), database.now()
    with database.write() as session:
        session.execute(update(Callback).values(received_at=now))
        session.execute(update(Event).values(at=now))
        session.execute(update(Task).values(archived_at=now))
        session.add(delivery(task.id, state=CallbackState.RECEIVED, due_at=now))
        session.add(delivery(uuid.uuid4(), state=CallbackState.UNMATCHED, received_at=now))
        session.add(delivery(uuid.uuid4(), state=CallbackState.UNMATCHED, due_at=now))
    before = left(database)
    assert operator.prune(RETENTION).counts.total() == 0
    assert left(database) == before


def test_prune_removes_failed_tasks_and_old_unmatched_deliveries(database: Database, operator: Operator) -> None:
    old(database, state=TaskState.FAILED, archive=ArchiveState.NONE)
    with database.write() as session:
        session.add(delivery(uuid.uuid4(), state=CallbackState.UNMATCHED))
    assert operator.prune(RETENTION).counts["deliveries"] == 2


@pytest.mark.databases("sqlite")
def test_prune_keeps_unnamed_deliveries_while_an_older_task_is_not_over(database: Database, operator: Operator) -> None:
    with database.write() as session:
        session.add(delivery(None))
        task = new_task(session, **WAITS, created_at=LONG_AGO)
    assert operator.prune(RETENTION).counts["deliveries"] == 0
    with database.write() as session:
        session.execute(update(Task).where(col(Task.id) == task.id).values(created_at=LONG_AGO + RETENTION))
    assert operator.prune(RETENTION).counts["deliveries"] == 1


def test_prune_continues_batch_by_batch(
    database: Database, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "PART", 2)
    with database.write() as session:
        unfinished = new_task(session, **WAITS)
        session.add_all([delivery(unfinished.id) for _ in range(3)])
        session.add_all([delivery(uuid.uuid4()) for _ in range(5)])
        session.add_all([delivery(unfinished.id)])
    assert operator.prune(RETENTION).counts["deliveries"] == 5
    assert left(database)["deliveries"] == 4


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(("state", "gone"), [(DispatchState.DEAD, 2), (DispatchState.DUE, 1)])
def test_prune_keeps_an_undelivered_event(
    database: Database, operator: Operator, state: DispatchState, gone: int
) -> None:
    old(database)
    dispatch(database, state)
    counts = operator.prune(RETENTION).counts
    assert (counts["dispatches"], counts["events"]) == (gone - 1, gone)


@pytest.mark.parametrize("state", [DispatchState.DELIVERED, DispatchState.DEAD])
def test_an_event_that_is_sent_while_prune_runs_leaves_no_dispatch(database: Database, state: DispatchState) -> None:
    """SQLite gives the numbers of removed rows again: a new event could not be queued beside such a dispatch."""
    old(database)
    dispatch(database, DispatchState.DUE)
    before = database.now() - RETENTION
    with database.read() as session:
        kinds = {kind.name: kind for kind in pruning.prunable(session, before)}
    assert pruning.prune(database, kinds["dispatches"], before) == 0
    dispatch(database, state)
    assert pruning.prune(database, kinds["events"], before) == 2
    assert left(database)["dispatches"] == 0
    with database.write() as session:
        for _ in range(2):
            record(session, EventName.TASK_ARCHIVED, None)
    assert sequence_all(database, [ARCHIVED]) == 2


def test_a_dispatch_without_its_event_is_pruned(database: Database, operator: Operator) -> None:
    """As a prune of 0.1.0 left it. A dead one was counted for good."""
    old(database)
    dispatch(database, DispatchState.DEAD)
    with database.write() as session:
        session.execute(delete(Event))
    assert operator.prune(RETENTION).counts["dispatches"] == 1
    assert left(database)["dispatches"] == 0


def test_a_dispatch_of_an_earlier_event_with_the_id_of_a_new_one_is_pruned(
    database: Database, operator: Operator
) -> None:
    """SQLite uses the ids of removed rows again. The new event kept itself and all later ones without numbers."""
    old(database)
    dispatch(database, DispatchState.DEAD)
    with database.write() as session:
        session.execute(update(Event).values(seq=None))
    with pytest.raises(IntegrityError):
        sequence_all(database, [ARCHIVED])
    assert operator.prune(RETENTION).counts["dispatches"] == 1
    assert sequence_all(database, [ARCHIVED]) == 2


def test_event_numbers_continue_after_prune(database: Database, operator: Operator) -> None:
    old(database)
    assert operator.prune(RETENTION).counts["events"] == 2
    with database.read() as session:
        assert (events.after(session, 0, 10), events.newest_seq(session)) == ([], 2)


@pytest.mark.databases("sqlite")
def test_prune_keeps_an_event_without_a_number(database: Database, operator: Operator) -> None:
    old(database)
    with database.write() as session:
        session.execute(update(Event).values(seq=None))
    assert operator.prune(RETENTION).counts["events"] == 0


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("untold", [{Dispatch.state: DispatchState.DUE}, {Event.seq: None}], ids=["on its way", "new"])
def test_prune_keeps_the_callback_url_until_the_client_was_called(
    database: Database, operator: Operator, untold: dict[Any, Any]
) -> None:
    task = old(database)
    with database.write() as session:
        ((column, value),) = untold.items()
        session.execute(update(column.class_).values({column: value}))
    assert operator.prune(RETENTION).counts["requests"] == 0
    assert stored(database, task)["client_callback_url"] == CLIENT


@pytest.mark.databases("sqlite")
def test_prune_removes_a_callback_url_without_a_request(database: Database, operator: Operator) -> None:
    task = old(database, request={})
    assert operator.prune(RETENTION).counts["requests"] == 1
    assert stored(database, task)["client_callback_url"] is None


@pytest.mark.parametrize("database_kind", ["sqlite"])  # PostgreSQL chooses its plans by how much there is
def test_prune_reads_no_whole_table(database: Database, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor every event without a number for each task. A walk along row ids calls its first step a scan."""
    monkeypatch.setattr(pruning, "PART", 1)
    for _ in range(3):
        old(database)

    def look(session: Session) -> None:
        before = database.now() - RETENTION
        for kind in pruning.prunable(session, before):
            pruning.count(database, kind, before)

    assert scans(database, look) == ["SCAN dispatch", "SCAN event"]
    assert "event_unsequenced" not in plans(database, look)


@pytest.mark.parametrize("part", [30, 2_000])  # one write may be of several reads
def test_prune_begins_with_few_rows_and_at_most_doubles_them(
    database: Database, operator: Operator, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(pruning, "PART", part)
    sizes: list[int] = []

    def note(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.startswith("DELETE FROM callback"):
            given = values.values() if isinstance(values, dict) else values
            sizes.append(sum(isinstance(each, int) for each in given))  # the ids

    with database.write() as session:
        session.add_all([delivery(uuid.uuid4()) for _ in range(350)])
    event.listen(database.writer, "after_cursor_execute", note)
    assert operator.prune(RETENTION).counts["deliveries"] == 350
    assert sizes[0] == pruning.FIRST_ROWS
    assert all(size <= 2 * before for before, size in pairwise([pruning.FIRST_ROWS, *sizes]))
