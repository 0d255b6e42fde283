"""Pages of events read a bounded number of rows for any names."""

from __future__ import annotations

import pytest

from storage.database.sessions import Database
from storage.operations import outbox
from storage.rows import events
from storage.rows.events import EventName, record
from tests.plans import plans, scans


def told(database: Database, *names: EventName) -> None:
    with database.write() as session:
        for name in names:
            record(session, name, None)
    outbox.sequence_all(database, [])


def pages(database: Database, *names: EventName) -> list[tuple[list[int | None], int]]:
    """The numbers on each page of two, and where it ended, until no page continues."""
    found, until = list[tuple[list[int | None], int]](), -1
    while not found or found[-1][1] != until:
        until = found[-1][1] if found else 0
        with database.read() as session:
            page = events.page(session, until, 2, names)
        found.append(([event.seq for event, _ in page.events], page.until))
    return found[:-1]


def test_page_reads_a_bounded_number_of_events_and_returns_the_last_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SCANNED", 4)
    told(database, *[EventName.TASK_CREATED] * 10, EventName.TASK_ARCHIVED)
    assert pages(database, EventName.TASK_ARCHIVED) == [([], 4), ([], 8), ([11], 11)]
    assert [seqs for seqs, _ in pages(database, EventName.TASK_CREATED)][:2] == [[1, 2], [3, 4]]


def test_rare_events_are_found_past_all_others(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SCANNED", 4)
    told(database, *[EventName.TASK_CREATED] * 10, EventName.TASK_FAILED, EventName.CALLBACK_REJECTED)
    assert pages(database, EventName.CALLBACK_REJECTED) == [([12], 12)]


@pytest.mark.parametrize("database_kind", ["sqlite"])  # PostgreSQL chooses its plans by how much there is
def test_pages_of_events_read_no_whole_table(database: Database) -> None:
    told(database, EventName.TASK_FAILED)
    assert not scans(database, lambda session: events.page(session, 0, 2, [EventName.TASK_CREATED]))
    rare = plans(database, lambda session: events.page(session, 0, 2, [EventName.TASK_FAILED]))
    assert "SEARCH event USING COVERING INDEX event_rare" in rare  # 5,000 rows of the table took 13 ms
