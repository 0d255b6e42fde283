"""Quarantine: a row that ended three workers is worked on while its process does nothing else."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlmodel import col, update

from receiver.workers.lanes import Lane
from receiver.workers.worker import QUARANTINE_INTERVAL_SECONDS, Worker
from storage.accounts.slots import Slots
from storage.circuit import FIRST_PAUSE_SECONDS, PAUSE_CAP_SECONDS
from storage.database.sessions import Database
from storage.rows import claims
from storage.rows.models import Asset, Task
from storage.states import Step
from tests.harness import wait_until
from tests.receiver.workers.test_worker import Desk, assets_lane, running, waiting
from tests.receiver.workers.test_worker import desk as desk  # a fixture
from tests.rows import LONG_AGO, is_any_blocked, new_assets, new_task, stored
from tests.storage.test_circuit import Clock, opened


def lost(database: Database, asset: Asset, times: int) -> None:
    """The asset in the state after `times` workers have died while they held it."""
    with database.write() as session:
        values = {"losses": times - 1, "lease": uuid.uuid4(), "due_at": LONG_AGO}
        session.execute(update(Asset).where(col(Asset.id) == asset.id).values(**values))


def test_quarantined_row_is_worked_on_alone(database: Database, desk: Desk) -> None:
    """The claim waits until nothing else is in hand, and no other claim starts meanwhile."""
    desk.gate.clear()
    bad, *others = new_assets(database, 5)
    lost(database, bad, 3)
    alone: list[set[Any]] = []

    def work(row: Any) -> None:
        if row.id == bad.id:
            alone.append(set(desk.begun) - set(desk.done))
        desk.work(row)

    with running(database, assets_lane(work, 2)):
        wait_until(lambda: len(desk.begun) == 2)
        assert bad.id not in desk.begun
        desk.gate.set()
        wait_until(lambda: not waiting(database))
    assert alone == [set()]
    assert len(desk.done) == len(others) + 1


@contextmanager
def claims_of_creates_wait(database: Database) -> Iterator[Lane]:
    """A lane whose claim waits in the database for the account's row until the block ends."""
    slots = Slots("kling", 4)
    with database.write() as session:
        new_task(session, due_at=None, queued_at=LONG_AGO, slots=-1)
    with database.write() as session:
        slots.reserve(session, 1)  # locks the account's row
        yield Lane("creates", Task, Desk(database).work, 1, (col(Task.step) == Step.CREATE,), slots=slots)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)  # SQLite has one writer at a time
def test_claim_that_waits_delays_no_other_lane(database: Database, desk: Desk) -> None:
    with ExitStack() as worker:
        with claims_of_creates_wait(database) as creates:
            worker.enter_context(running(database, creates, assets_lane(desk.work)))
            wait_until(lambda: is_any_blocked(database))
            assets = new_assets(database, 6)
            wait_until(lambda: len(desk.done) == len(assets))


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_quarantined_row_waits_for_claims_under_way(database: Database, desk: Desk) -> None:
    (row,) = new_assets(database, 1, due_at=None)
    with ExitStack() as worker:
        with claims_of_creates_wait(database) as creates:
            at_work = worker.enter_context(running(database, creates, assets_lane(desk.work)))
            wait_until(lambda: is_any_blocked(database))
            lost(database, row, 3)
            wait_until(lambda: at_work._in_hand.is_quarantined)
            time.sleep(0.3)
            assert desk.begun == []
        wait_until(lambda: desk.done == [row.id])


def test_quarantine_ends_when_the_worker_survives(database: Database, desk: Desk) -> None:
    (asset,) = new_assets(database, 1)
    lost(database, asset, 4)
    with running(database, assets_lane(desk.work)):
        wait_until(lambda: desk.done)
    assert stored(database, asset)["losses"] == 0


def test_run_quarantined_works_on_one_row(database: Database, desk: Desk) -> None:
    row, other = new_assets(database, 2)
    lost(database, row, 3)
    worker = Worker(database, [assets_lane(desk.work)], lease_seconds=5, grace_seconds=0)
    assert (worker.run_until_idle(), desk.done) == (1, [other.id])
    assert (worker.run_quarantined(), desk.done) == (1, [other.id, row.id])
    assert worker.run_quarantined() == 0


def test_stopping_worker_starts_no_quarantined_row(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    row, other = new_assets(database, 2)
    lost(database, row, 3)
    with running(database, assets_lane(desk.work)) as worker:
        wait_until(lambda: worker._in_hand.is_quarantined)
        worker.stop()
        wait_until(lambda: not worker._in_hand.is_quarantined)
        desk.gate.set()
    assert desk.begun == [other.id]


def test_quarantined_row_behind_an_open_circuit_stops_no_lane(database: Database, desk: Desk) -> None:
    """Long work is in hand, and the quarantine would have to wait for it."""
    clock, quarantined = Clock(), Desk(database)
    circuit = opened(clock)
    clock.seconds += FIRST_PAUSE_SECONDS  # a trial may start
    with database.write() as session:
        new_task(session, losses=claims.QUARANTINE_AFTER)
        new_task(session, step=Step.READ)
    creates = Lane("creates", Task, quarantined.work, 1, (col(Task.step) == Step.CREATE,), circuit=circuit)
    reads = Lane("reads", Task, desk.work, 1, (col(Task.step) == Step.READ,))
    free = Desk(database)
    desk.gate.clear()
    with running(database, creates, reads, assets_lane(free.work)):
        wait_until(lambda: desk.begun)
        ends_at = time.monotonic() + 2.5 * QUARANTINE_INTERVAL_SECONDS
        while time.monotonic() < ends_at:
            (asset,) = new_assets(database, 1)
            wait_until(lambda wanted=asset.id: wanted in free.done, seconds=5)  # type: ignore[misc]
        assert quarantined.begun == []
        circuit.succeeded()
        desk.gate.set()
        wait_until(lambda: quarantined.done)


def test_quarantined_row_takes_a_trial_that_no_other_row_takes(database: Database, desk: Desk) -> None:
    clock = Clock()
    new_assets(database, 1, losses=claims.QUARANTINE_AFTER)
    lane = assets_lane(desk.work, circuit=opened(clock))
    worker = Worker(database, [lane], lease_seconds=5, grace_seconds=0)
    clock.seconds += FIRST_PAUSE_SECONDS
    assert worker.run_quarantined() == 0
    clock.seconds += PAUSE_CAP_SECONDS
    assert worker.run_quarantined() == 1


def test_work_sees_the_losses_of_its_row(database: Database, desk: Desk) -> None:
    (asset,) = new_assets(database, 1)
    lost(database, asset, claims.PARK_LOSSES)
    losses: list[int] = []

    def work(row: Any) -> None:
        losses.append(row.losses)
        desk.work(row)

    with running(database, assets_lane(work)):
        wait_until(lambda: desk.done)
    assert losses == [claims.PARK_LOSSES]
