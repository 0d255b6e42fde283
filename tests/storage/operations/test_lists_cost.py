"""What lists cost beside many rows: each enters by an index and reads a bounded number of rows."""

from __future__ import annotations

import pytest

from storage.database.sessions import Database
from storage.operations.lists import DeliveryFilter, TaskFilter, newest_deliveries, newest_tasks
from tests.plans import plans


@pytest.fixture
def database_kind() -> str:
    """PostgreSQL chooses its plans by how much there is."""
    return "sqlite"


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (TaskFilter(), "task_newest"),
        (TaskFilter(state="failed"), "task_failed"),
        (TaskFilter(since="2026-01-01", q="x"), "task_newest"),
    ],
)
def test_tasks_are_entered_by_the_time_of_their_creation(database: Database, wanted: TaskFilter, index: str) -> None:
    found = plans(database, lambda session: newest_tasks(session, wanted, "2026-01-01T00:00:00~" + "0" * 32))
    assert f"SEARCH task USING INDEX {index}" in found and "SCAN task\n" not in found


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (DeliveryFilter(), "callback_newest"),
        (DeliveryFilter(state="rejected", cause="x"), "callback_newest"),
        (DeliveryFilter(state="unmatched"), "callback_unmatched"),
    ],
)
def test_deliveries_are_entered_by_an_index(database: Database, wanted: DeliveryFilter, index: str) -> None:
    found = plans(database, lambda session: newest_deliveries(session, wanted, None))
    assert index in found and "SCAN callback\n" not in f"{found}\n"
