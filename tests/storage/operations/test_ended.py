"""Tasks that ended within a day: counted in parts, each again in its turn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import delete, func, select, update
from sqlmodel import col

from storage.database.sessions import Database
from storage.operations import ended, rollups
from storage.operations.ended import Ended, EndedLastDay
from storage.rows.deleted_callbacks import delete_callbacks
from storage.rows.models import Callback, Counter, Task
from storage.states import ArchiveState, TaskState
from tests.plans import scans
from tests.rows import new_task

TASKS = 12


def fill(database: Database, now: datetime) -> None:
    """Tasks that ended every two hours, from one hour ago on, and one that ended before the day."""
    with database.write() as session:
        for number in range(TASKS + 1):
            new_task(
                session, external_task_id=f"t{number}", state=TaskState.SUCCEEDED, archive=ArchiveState.ARCHIVING,
                completed_at=now - timedelta(hours=2 * number + 1), callback_url="https://a/b", due_at=None,
            )  # fmt: skip


def read(database: Database, day: EndedLastDay, now: datetime) -> Ended:
    with database.read() as session:
        return day.read(session, now)


def test_late_change_of_a_task_is_counted_in_its_turn(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "ROWS", 3)
    monkeypatch.setattr(ended, "STATEMENT_ROWS", 3)
    day, now = EndedLastDay(), database.now()
    fill(database, now)
    assert read(database, day, now) == Ended(rows=TASKS, callbacks_expected=TASKS, callbacks_lost=TASKS)
    values = {"archive": ArchiveState.ARCHIVED, "end_called_back_at": now}
    with database.write() as session:
        session.execute(update(Task).where(col(Task.external_task_id).in_(["t3", "t9"])).values(values))
    seen = [read(database, day, now) for _ in range(8)]
    assert seen[0].archived < 2
    assert (seen[-1].archived, seen[-1].callbacks_lost, seen[-1].callbacks_late) == (2, TASKS - 2, 2)
    assert seen[-1].late_seconds == pytest.approx(19 * 3_600, abs=0.01)


def test_tasks_that_ended_over_a_day_ago_are_not_counted(database: Database) -> None:
    day, now = EndedLastDay(), database.now()
    fill(database, now)
    read(database, day, now)
    assert read(database, day, now + timedelta(hours=12)).rows == TASKS // 2
    assert read(database, day, now + timedelta(days=2)) == Ended()


def test_ended_tasks_are_found_by_the_index_of_their_end(database: Database) -> None:
    assert not scans(database, lambda session: EndedLastDay().read(session, database.now()))


def test_a_dismissed_task_is_one_failure_of_its_hour(database: Database) -> None:
    hour = datetime(2026, 11, 28, 10, tzinfo=UTC)
    ends = [(TaskState.FAILED, ArchiveState.INCOMPLETE), (TaskState.SUCCEEDED, ArchiveState.INCOMPLETE)]
    ends += [(TaskState.FAILED, ArchiveState.NONE), (TaskState.SUCCEEDED, ArchiveState.ARCHIVED)]
    with database.write() as session:
        for number, (state, archive) in enumerate(ends):
            moment = hour + timedelta(minutes=14 * number)
            new_task(session, external_task_id=f"t{number}", state=state, archive=archive, completed_at=moment)
    with database.read() as session:
        assert [rollups.read_hour(session, each).failures for each in (hour, hour + rollups.HOUR)] == [3, 0]


def test_callbacks_of_an_hour_are_counted_once(database: Database) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    insert_callbacks(database, 3, hour + timedelta(minutes=1))
    arrivals = rollups.Arrivals()
    with database.write() as session:
        assert arrivals.count(session, hour) == 3
        session.execute(delete(Callback))
        assert arrivals.count(session, hour) == 3


def test_callbacks_that_arrive_after_a_count_are_added(database: Database) -> None:
    now, arrivals = database.now(), rollups.Arrivals()
    hour = now.replace(minute=0, second=0, microsecond=0)
    for count in (2, 4, 6):
        insert_callbacks(database, 2, now)
        with database.read() as session:
            assert arrivals.count(session, hour) == count


def test_callbacks_that_arrive_during_a_slow_reading_are_added(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollups, "LATE", timedelta())
    now, arrivals, count = database.now(), rollups.Arrivals(), ended.count
    hour = now.replace(minute=0, second=0, microsecond=0)

    def slow(*given: Any) -> Any:
        found = count(*given)
        insert_callbacks(database, 2, database.now())
        return found

    monkeypatch.setattr(ended, "count", slow)
    with database.read() as session:
        rollups.read_hour(session, hour, arrivals)
    monkeypatch.setattr(ended, "count", count)
    with database.read() as session:
        assert rollups.read_hour(session, hour, arrivals).callbacks == 2


def test_callbacks_after_the_clock_was_set_back_are_added(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals, hour = rollups.Arrivals(), database.now().replace(minute=0, second=0, microsecond=0)
    for minute, came in ((30, 0), (20, 2)):
        moment = hour + timedelta(minutes=minute)
        insert_callbacks(database, came, moment)
        monkeypatch.setattr(rollups.tasks, "now", lambda _, now=moment: now + timedelta(seconds=30))
        with database.read() as session:
            assert arrivals.count(session, hour) == came


@pytest.mark.parametrize(("recounted", "at_last"), [(100, 3), (1, 2)])
def test_callback_of_a_slow_commit_is_counted_an_hour_after_its_hour(
    database: Database, monkeypatch: pytest.MonkeyPatch, recounted: int, at_last: int
) -> None:
    monkeypatch.setattr(rollups, "RECOUNTED", recounted)
    arrivals, hour = rollups.Arrivals(), datetime(2026, 11, 28, 10, tzinfo=UTC)
    for minutes, came, counted in ((30, 2, 2), (70, 1, 2), (125, 0, at_last), (190, 1, at_last)):
        insert_callbacks(database, came, hour + timedelta(minutes=10))
        assert count_at(database, monkeypatch, arrivals, hour, minutes) == counted


def test_deleted_callbacks_stay_counted_in_every_process(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    times = [hour + timedelta(minutes=10), hour + timedelta(minutes=29, seconds=50)]
    for moment in times:
        insert_callbacks(database, 2, moment)
    arrivals = rollups.Arrivals()
    assert count_at(database, monkeypatch, arrivals, hour, 30) == 4
    with database.write() as session:
        session.add(Counter(name="callbacks deleted 20200101000000", value=7))
        session.flush()
        for moment in times:  # one of the counted ones, and one of those that are counted again
            newest = select(func.max(Callback.id)).where(col(Callback.received_at) == moment).scalar_subquery()
            assert delete_callbacks(session, (col(Callback.id) == newest,)) == 1
    insert_callbacks(database, 1, hour + timedelta(minutes=30, seconds=10))
    for each in (arrivals, rollups.Arrivals()):
        assert count_at(database, monkeypatch, each, hour, 32) == 5
        assert count_at(database, monkeypatch, each, hour, 190) == 5
    with database.read() as session:
        names = session.scalars(select(Counter.name).where(col(Counter.name).startswith("callbacks"))).all()
    assert sorted(names) == [f"callbacks deleted {moment:%Y%m%d%H%M%S}" for moment in times]


def count_at(
    database: Database, monkeypatch: pytest.MonkeyPatch, arrivals: rollups.Arrivals, hour: datetime, minutes: int
) -> int:
    """The callbacks of the hour, counted so many minutes after its begin."""
    monkeypatch.setattr(rollups.tasks, "now", lambda _: hour + timedelta(minutes=minutes))
    with database.read() as session:
        return arrivals.count(session, hour)


def insert_callbacks(database: Database, count: int, received_at: datetime) -> None:
    with database.write() as session:
        for _ in range(count):
            row = Callback(provider="kling", source="push", delivery_key=uuid4().hex, body=b"", received_at=received_at)
            session.add(row)
