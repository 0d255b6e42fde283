"""Rows claimed ahead of a lane's threads: few, begun at once, and given back to any worker with an idle thread."""

from __future__ import annotations

import threading
from itertools import count
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import col, func, select

from receiver.workers import worker
from receiver.workers.lanes import Lane
from storage.database.sessions import Database
from storage.rows.models import Asset
from tests.harness import wait_until
from tests.receiver.workers.test_worker import Desk, assets_lane, running
from tests.receiver.workers.test_worker import desk as desk  # a fixture
from tests.rows import new_assets, stored

THREADS, AHEAD = 4, 2


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is not given back during the test."""
    monkeypatch.setattr(worker, "LASTING_SECONDS", 3_600.0)


def lane(desk: Desk, first: int = 0) -> Lane:
    """Its `first` rows are done at once, the others wait for the desk's gate.

    With one such row the second claim is full as well, and is made while all other threads are busy.
    """
    at_once, passed = Desk(desk.database), iter(range(first))

    def work(row: Any) -> None:
        (desk if next(passed, None) is None else at_once).work(row)

    return assets_lane(work, THREADS, ahead=AHEAD)


def claimed(database: Database) -> int:
    with database.read() as session:
        return session.exec(select(func.count()).where(col(Asset.lease).is_not(None))).one()


@pytest.mark.databases("sqlite")
@pytest.mark.usefixtures("patient")
def test_few_rows_are_claimed_ahead_and_given_back_at_the_end(database: Database, desk: Desk) -> None:
    """Giving back counts no attempt, and the row's losses stay."""
    desk.gate.clear()
    assets = new_assets(database, 14, losses=2)
    with running(database, lane(desk, first=1)) as at_work:
        wait_until(lambda: claimed(database) == THREADS + AHEAD)
        at_work.stop()
        wait_until(lambda: claimed(database) == THREADS)
        desk.gate.set()
    assert (len(desk.begun), len(desk.done)) == (THREADS, THREADS)
    rows = [stored(database, asset) for asset in assets]
    left = [row for row in rows if row["due_at"] is not None]
    assert len(left) == 9 and {(row["lease"], row["attempts"], row["losses"]) for row in left} == {(None, 0, 2)}
    assert all(row["due_at"] <= database.now() for row in left)


@pytest.mark.databases("sqlite")
@pytest.mark.usefixtures("patient")
def test_no_row_begins_once_the_worker_stops(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    assets = new_assets(database, 14)
    with running(database, lane(desk, first=1)) as at_work:
        wait_until(lambda: claimed(database) == THREADS + AHEAD)
        at_work.stop()
        desk.gate.set()
    assert len(desk.begun) == THREADS
    assert {stored(database, asset)["lease"] for asset in assets} == {None}


@pytest.mark.databases("sqlite")
@pytest.mark.usefixtures("patient")
def test_idle_thread_begins_a_row_at_once_while_none_can_be_claimed(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    new_assets(database, 14)
    may_end, numbers = threading.Event(), count()

    def work(row: Any) -> None:
        number = next(numbers)
        if number < 1:
            Desk(database).work(row)
        else:  # not settled, which would wait for the lock
            desk.begun.append(row.id)
            (desk.gate if number <= THREADS else may_end).wait(20)

    with running(database, assets_lane(work, THREADS, ahead=AHEAD), lease=60, grace=0):
        wait_until(lambda: claimed(database) == THREADS + AHEAD)
        with database.write() as session:
            if not database.is_sqlite:
                session.execute(text("LOCK TABLE asset IN EXCLUSIVE MODE"))
            desk.gate.set()
            wait_until(lambda: len(desk.begun) == THREADS + AHEAD)
        may_end.set()


@pytest.mark.databases("sqlite")
def test_row_that_would_wait_behind_slow_work_goes_to_another_worker(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LASTING_SECONDS", 0.3)
    desk.gate.clear()
    new_assets(database, 1 + THREADS + AHEAD)
    other = Desk(database)
    with running(database, lane(desk, first=1)):
        wait_until(lambda: len(desk.begun) == THREADS)
        with running(database, lane(other)):
            wait_until(lambda: len(other.done) == AHEAD)
        desk.gate.set()
    assert len(desk.done) == THREADS


@pytest.mark.databases("sqlite")
@pytest.mark.usefixtures("patient")
def test_nothing_is_claimed_ahead_while_no_rows_queue_up(database: Database, desk: Desk) -> None:
    """The last claim found less than it wanted, so the next rows are for any idle worker."""
    desk.gate.clear()
    new_assets(database, THREADS - 1)
    other = Desk(database)
    with running(database, lane(desk)):
        wait_until(lambda: len(desk.begun) == THREADS - 1)
        with running(database, lane(other)):
            new_assets(database, AHEAD + 1)
            wait_until(lambda: len(desk.begun) + len(other.done) == THREADS + AHEAD)
        desk.gate.set()
    assert len(desk.begun) <= THREADS


def test_every_row_is_worked_on_once_with_rows_claimed_ahead(database: Database, desk: Desk) -> None:
    assets = new_assets(database, 30)
    with running(database, lane(desk)):
        wait_until(lambda: len(desk.done) == len(assets))
    assert sorted(desk.done) == sorted(asset.id for asset in assets)
