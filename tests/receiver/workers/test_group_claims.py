"""Rows are claimed for idle threads in the transaction that makes them due. On both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlmodel import Session

from receiver.workers.group_claims import GroupClaims
from receiver.workers.in_hand import RowsInHand
from receiver.workers.lanes import Lane
from receiver.workers.wake_ups import WakeUps
from storage.circuit import FAILURES
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows.models import Asset
from tests.rows import new_asset, new_task, stored
from tests.storage.database.test_group_writer import at_commit


class Claims:
    """The claims of a worker with one lane."""

    def __init__(self, database: Database) -> None:
        self.lane = Lane("assets", Asset, lambda _: None, threads=2)
        self.in_hand, self.given_back = RowsInHand(), list[Any]()
        wake_ups = WakeUps([self.lane.name])
        self.inner = GroupClaims(
            database, [self.lane], self.in_hand, wake_ups, self.given_back.extend, lease_seconds=60
        )
        database.at_group_end = self.inner.claim

    def want(self) -> None:
        self.inner.want(self.lane, 2)

    def take(self) -> list[Any]:
        return self.inner.take(self.lane)


@pytest.fixture
def made(database: Database) -> Claims:
    return Claims(database)


def write_files(database: Database) -> None:
    """Three files become due in a group of writes."""

    def write(session: Session) -> None:
        task = new_task(session, due_at=None)
        for index in range(3):
            new_asset(session, task, index)
        database.wake(session)

    database.write_in_group(write)


def test_rows_are_claimed_in_the_transaction_that_makes_them_due(database: Database, made: Claims) -> None:
    made.want()
    with at_commit(database, lambda: None) as commits:
        write_files(database)
    rows = made.take()
    assert (len(commits), len(rows), made.take()) == (1, 2, [])
    assert {stored(database, row)["lease"] for row in rows} == {rows[0].lease}
    assert {row.id for row in made.in_hand.rows} == {row.id for row in rows}


def test_nothing_is_claimed_for_a_lane_that_does_not_wait(database: Database, made: Claims) -> None:
    made.want()
    assert made.take() == []
    write_files(database)
    assert (made.take(), made.in_hand.rows) == ([], [])


def test_nothing_is_claimed_while_the_other_side_is_down(database: Database, made: Claims) -> None:
    for _ in range(FAILURES):
        made.lane.circuit.failed()
    made.want()
    write_files(database)
    assert made.take() == []


def test_rows_of_a_lane_that_has_ended_meanwhile_are_given_back(database: Database, made: Claims) -> None:
    made.want()
    with at_commit(database, lambda: made.inner.end(made.lane)):
        write_files(database)
    assert (len(made.given_back), made.take()) == (2, [])


def test_a_failed_commit_claims_nothing_and_blocks_no_quarantine(database: Database, made: Claims) -> None:
    def fail() -> None:
        raise database.writer.dialect.loaded_dbapi.OperationalError("disk I/O error")

    made.want()
    with at_commit(database, fail), pytest.raises(DatabaseUnavailable):
        write_files(database)
    assert made.take() == []
    assert made.in_hand.wait_until_empty(0)
