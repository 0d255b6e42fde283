"""Quarantine: a row that has ended three workers is worked on by a process that does nothing else meanwhile."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlmodel import col, update

from receiver.app.worker import QUARANTINE_INTERVAL_SECONDS, Lane, Worker
from storage.accounts.slots import Slots
from storage.circuit import FIRST_PAUSE_SECONDS, PAUSE_CAP_SECONDS
from storage.rows import claims
from storage.rows.database import Database
from storage.rows.models import Asset, Task
from storage.states import Step
from tests.harness import wait_until
from tests.receiver.app.test_worker import Desk, assets_lane, running, waiting
from tests.receiver.app.test_worker import desk as desk  # a fixture
from tests.rows import LONG_AGO, is_any_blocked, new_assets, new_task, stored
from tests.storage.test_circuit import Clock, opened


def lost(database: Database, asset: Asset, times: int) -> None:
    """The asset as left by a worker that died holding it, for the `times`-th time."""
    with database.write() as session:
        values = {"losses": times - 1, "lease": uuid.uuid4(), "due_at": LONG_AGO}
        session.execute(update(Asset).where(col(Asset.id) == asset.id).values(**values))


def test_a_suspect_is_worked_on_alone(database: Database, desk: Desk) -> None:
    """A row that has ended three workers waits until nothing else is in hand, and nothing else is taken meanwhile."""
    desk.gate.clear()
    suspect, *others = new_assets(database, 5)
    lost(database, suspect, 3)
    alone: list[set[Any]] = []

    def work(row: Any) -> None:
        if row.id == suspect.id:
            alone.append(set(desk.begun) - set(desk.done))
        desk.work(row)

    with running(database, assets_lane(work, 2)):
        wait_until(lambda: len(desk.begun) == 2)
        assert suspect.id not in desk.begun
        desk.gate.set()
        wait_until(lambda: not waiting(database))
    assert alone == [set()]
    assert len(desk.done) == len(others) + 1


@contextmanager
def claims_of_creates_wait(database: Database) -> Iterator[Lane]:
    """A lane whose claim waits in the database, for the row of the account, as long as the block runs."""
    slots = Slots("kling", 4)
    with database.write() as session:
        new_task(session, due_at=None, queued_at=LONG_AGO, slots=-1)
    with database.write() as session:
        slots.reserve(session, 1)  # locks the account's row
        yield Lane("creates", Task, Desk(database).work, 1, (col(Task.step) == Step.CREATE,), slots=slots)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)  # SQLite has one writer at a time by itself
def test_a_lane_whose_claim_waits_stops_no_other_lane(database: Database, desk: Desk) -> None:
    with ExitStack() as worker:
        with claims_of_creates_wait(database) as creates:
            worker.enter_context(running(database, creates, assets_lane(desk.work)))
            wait_until(lambda: is_any_blocked(database))
            assets = new_assets(database, 6)
            wait_until(lambda: len(desk.done) == len(assets))


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_a_suspect_waits_for_the_claims_under_way(database: Database, desk: Desk) -> None:
    (suspect,) = new_assets(database, 1, due_at=None)
    with ExitStack() as worker:
        with claims_of_creates_wait(database) as creates:
            at_work = worker.enter_context(running(database, creates, assets_lane(desk.work)))
            wait_until(lambda: is_any_blocked(database))
            lost(database, suspect, 3)
            wait_until(lambda: at_work._in_hand.is_quarantined)
            time.sleep(0.3)
            assert desk.begun == []
        wait_until(lambda: desk.done == [suspect.id])


def test_a_suspect_that_lets_its_worker_live_is_none_any_more(database: Database, desk: Desk) -> None:
    (asset,) = new_assets(database, 1)
    lost(database, asset, 4)
    with running(database, assets_lane(desk.work)):
        wait_until(lambda: desk.done)
    assert stored(database, asset)["losses"] == 0


def test_a_suspect_is_worked_on_where_nothing_runs_for_long(database: Database, desk: Desk) -> None:
    suspect, other = new_assets(database, 2)
    lost(database, suspect, 3)
    worker = Worker(database, [assets_lane(desk.work)], lease_seconds=5, grace_seconds=0)
    assert (worker.run_until_idle(), desk.done) == (1, [other.id])
    assert (worker.run_suspects(), desk.done) == (1, [other.id, suspect.id])
    assert worker.run_suspects() == 0


def test_who_stops_begins_with_no_suspect(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    suspect, other = new_assets(database, 2)
    lost(database, suspect, 3)
    with running(database, assets_lane(desk.work)) as worker:
        wait_until(lambda: worker._in_hand.is_quarantined)
        worker.stop()
        wait_until(lambda: not worker._in_hand.is_quarantined)
        desk.gate.set()
    assert desk.begun == [other.id]


def test_a_suspect_whose_circuit_is_open_stops_no_other_lane(database: Database, desk: Desk) -> None:
    """Nor while a long piece of work is in hand, which it would have to wait for."""
    clock, suspects = Clock(), Desk(database)
    circuit = opened(clock)
    clock.seconds += FIRST_PAUSE_SECONDS  # a trial may start
    with database.write() as session:
        new_task(session, losses=claims.QUARANTINE_AFTER)
        new_task(session, step=Step.READ)
    creates = Lane("creates", Task, suspects.work, 1, (col(Task.step) == Step.CREATE,), circuit=circuit)
    reads = Lane("reads", Task, desk.work, 1, (col(Task.step) == Step.READ,))
    free = Desk(database)
    desk.gate.clear()
    with running(database, creates, reads, assets_lane(free.work)):
        wait_until(lambda: desk.begun)
        look_until = time.monotonic() + 2.5 * QUARANTINE_INTERVAL_SECONDS
        while time.monotonic() < look_until:
            (asset,) = new_assets(database, 1)
            wait_until(lambda wanted=asset.id: wanted in free.done, seconds=5)  # type: ignore[misc]
        assert suspects.begun == []
        circuit.succeeded()
        desk.gate.set()
        wait_until(lambda: suspects.done)


def test_the_trial_of_an_open_circuit_is_a_suspects_when_nobody_else_takes_it(database: Database, desk: Desk) -> None:
    clock = Clock()
    new_assets(database, 1, losses=claims.QUARANTINE_AFTER)
    lane = assets_lane(desk.work, circuit=opened(clock))
    worker = Worker(database, [lane], lease_seconds=5, grace_seconds=0)
    clock.seconds += FIRST_PAUSE_SECONDS
    assert worker.run_suspects() == 0
    clock.seconds += PAUSE_CAP_SECONDS
    assert worker.run_suspects() == 1


def test_losses_reach_the_work_so_that_it_can_park_the_row(database: Database, desk: Desk) -> None:
    (asset,) = new_assets(database, 1)
    lost(database, asset, claims.PARK_LOSSES)
    losses: list[int] = []

    def work(row: Any) -> None:
        losses.append(row.losses)
        desk.work(row)

    with running(database, assets_lane(work)):
        wait_until(lambda: desk.done)
    assert losses == [claims.PARK_LOSSES]
