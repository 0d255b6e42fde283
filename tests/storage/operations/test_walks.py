"""Statements of commands and pages on a large database: none reads a whole table."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import event
from sqlmodel import col, select

from receiver.tasks.operate import Operator
from storage.database import walk
from storage.database.sessions import Database
from storage.operations import maintenance
from storage.rows import tasks
from storage.rows.models import Callback, Task
from storage.rows.reports import Schedule
from storage.states import ArchiveState, AssetState, CallbackState, TaskState
from tests.plans import plans, scans
from tests.rows import LONG_AGO, new_asset, new_task

DONE = {"state": TaskState.SUCCEEDED, "step": None, "due_at": None}
Look = Callable[[Operator], object]
LOOKS: dict[str, Look] = {
    "retry": lambda operator: operator.retry_failed(limit=10),
    "retry since": lambda operator: operator.retry_failed(since=LONG_AGO, limit=10),
    "replay": lambda operator: operator.replay(since=LONG_AGO, state=CallbackState.REJECTED),
    "reconcile": lambda operator: operator.reconcile(),
}


@pytest.fixture
def some(database: Database) -> Database:
    """A few rows of every kind, so that each query has results."""
    with database.write() as session:
        for number in range(3):
            task = new_task(session, **DONE, archive=ArchiveState.INCOMPLETE)
            new_asset(session, task, 0, state=AssetState.FAILED, due_at=None)
            new_task(session, **DONE, archive=ArchiveState.INCOMPLETE, created_at=LONG_AGO + timedelta(hours=number))
            key = uuid.uuid4().hex
            session.add(Callback(delivery_key=key, provider="kling", source="push", body=b"", received_at=LONG_AGO))
    return database


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("database_kind", ["sqlite"])  # PostgreSQL chooses its plans by how much there is
def test_commands_use_indexes(some: Database, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATCH", "PART"):
        monkeypatch.setattr(maintenance, name, 2)
    operator = Operator(some, {}, Schedule(), dry_run=True)
    assert scans(some, lambda _: look(operator)) == []


def test_pages_skip_tasks_within_the_index(some: Database) -> None:
    found = plans(some, lambda session: tasks.newest(session, 2, skip=2))
    words = "COVERING INDEX task_newest" if some.is_sqlite else "Index Only Scan Backward using task_newest"
    assert words in found


def test_page_of_tasks_has_the_newest_after_the_skipped_ones(some: Database) -> None:
    with some.read() as session:
        found = [task.created_at - LONG_AGO for task in tasks.newest(session, 2, skip=1)]
    assert found == [timedelta(hours=1), timedelta(0)]


def test_walk_visits_every_row_once(some: Database) -> None:
    order = (col(Task.created_at), col(Task.id))
    seen: list[uuid.UUID] = []
    for part, _ in walk.parts(some, order, 2):
        with some.read() as session:
            seen += (found := [task.id for task in session.exec(select(Task).where(*part))])
            assert len(found) <= 2
    assert len(seen) == len(set(seen)) == 6


def test_retry_takes_the_oldest_up_to_its_limit(some: Database) -> None:
    operator = Operator(some, {}, Schedule(), dry_run=True)
    counts = [operator.retry_failed(limit=limit).counts for limit in (2, 10)]
    assert [each["files_due"] for each in counts] == [2, 3]
    assert [each["finishs_due"] + each["reads_due"] for each in counts] == [2, 3]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_retry_looks_at_few_failed_rows_in_a_statement(some: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PART", 2)
    offsets = []
    event.listen(some.reader, "before_cursor_execute", lambda *given: "OFFSET" in given[2] and offsets.append(given[3]))
    Operator(some, {}, Schedule(), dry_run=True).retry_failed(limit=10)
    assert len(offsets) > 4 and {values[-1] for values in offsets} == {1}  # a part ends at its second row
