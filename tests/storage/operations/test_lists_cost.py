"""The cost of lists with many rows: each uses an index and reads a bounded number of rows."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sqlalchemy import event

from storage.accounts import batches
from storage.database.sessions import Database
from storage.filters import DeliveryFilter, TaskFilter
from storage.operations import lists, outbox
from storage.operations.lists import newest_deliveries, newest_tasks
from storage.operations.maintenance import failed_files
from storage.operations.measures import measure
from storage.rows import tasks
from tests.plans import plans


@pytest.fixture
def database_kind() -> str:
    """PostgreSQL chooses its plans by the number of rows."""
    return "sqlite"


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (TaskFilter(), "task_newest"),
        (TaskFilter(state="failed"), "task_failed"),
        (TaskFilter(since="2026-01-01", q="x"), "task_newest"),
    ],
)
def test_tasks_are_found_by_the_index_of_their_creation(database: Database, wanted: TaskFilter, index: str) -> None:
    found = plans(database, lambda session: newest_tasks(session, wanted, "2026-01-01T00:00:00~" + "0" * 32))
    assert f"SEARCH task USING INDEX {index}" in found and "SCAN task\n" not in found


def test_tasks_of_a_client_are_found_among_those_of_others(database: Database) -> None:
    found = plans(database, lambda session: tasks.newest(session, 500, skip=500, of_client="a fingerprint"))
    assert "SEARCH task USING COVERING INDEX task_of_client (client=?)" in found and "SCAN task\n" not in f"{found}\n"


def test_files_that_were_given_up_are_counted_in_their_index(database: Database) -> None:
    """Each row of a failed file was read: 36 ms of each scrape with 15,000 of them."""
    for look in (
        lambda session: measure(session, deadline_seconds=0),
        lambda session: newest_tasks(session, TaskFilter(files="failed"), None),
        lambda _: failed_files(database, since=None, error=None, limit=10),
    ):
        assert "INDEX asset_given_up" in plans(database, look)


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (DeliveryFilter(), "callback_newest"),
        (DeliveryFilter(state="rejected", cause="x"), "callback_newest"),
        (DeliveryFilter(state="unmatched"), "callback_unmatched"),
        (DeliveryFilter(state="received"), "callback_due"),
    ],
)
def test_deliveries_are_found_by_an_index(database: Database, wanted: DeliveryFilter, index: str) -> None:
    found = plans(database, lambda session: newest_deliveries(session, wanted, None))
    assert index in found and "SCAN callback\n" not in f"{found}\n"
    if wanted.state in ("unmatched", "received"):  # it reads the few matching rows, not all rows in order of time
        assert "callback_newest" not in found


@pytest.mark.parametrize(
    ("state", "sink", "entry"),
    [
        ("", "", "INTEGER PRIMARY KEY (rowid<?)"),
        ("delivered", "", "INTEGER PRIMARY KEY (rowid<?)"),
        ("", "hook", "(sink=? AND event_id<?)"),
        ("delivered", "hook", "(sink=? AND event_id<?)"),
        ("dead", "hook", "dispatch_dead"),
        ("due", "hook", "dispatch_open"),
    ],
)
def test_dispatches_are_found_by_an_index(database: Database, state: str, sink: str, entry: str) -> None:
    found = plans(database, lambda session: outbox.newest(session, state, sink, before=9)).splitlines()
    first = next(step for step in found if "dispatch" in step)
    assert entry in first, found
    assert not any(step in ("SCAN dispatch", "SCAN event", "SCAN task") for step in found), found


def test_failures_of_a_batch_are_read_by_its_index(database: Database) -> None:
    found = plans(database, lambda session: batches.not_kept(session, uuid.UUID(int=1)))
    assert "SEARCH task USING INDEX task_batch (batch_id=?)" in found and "SCAN asset\n" not in found


@pytest.mark.parametrize("wanted", [TaskFilter(), TaskFilter(state="failed"), TaskFilter(archive="incomplete")])
def test_a_list_in_the_order_of_an_index_reads_no_more_than_its_page(database: Database, wanted: TaskFilter) -> None:
    asked: list[tuple[Any, ...]] = []
    event.listen(database.reader, "before_cursor_execute", lambda *given: asked.append(tuple(given[3])))
    with database.read() as session:
        newest_tasks(session, wanted, None)
    assert asked and not any(lists.SCANNED in values for values in asked)


def test_the_end_of_a_search_is_found_in_the_index_alone(database: Database) -> None:
    found = plans(database, lambda session: newest_tasks(session, TaskFilter(q="absent"), None)).splitlines()
    assert "SCAN task USING COVERING INDEX task_newest" in found
