"""An idle worker runs few statements, and misses no work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event
from sqlmodel import select

from receiver.workers import worker
from receiver.workers.due_checks import DueChecks
from receiver.workers.lanes import Lane
from receiver.workers.wake_ups import WakeUps
from receiver.workers.worker import Worker
from storage.database.sessions import Database
from storage.rows import claims
from storage.rows.models import Asset, Task
from storage.states import Step
from tests.harness import wait_until
from tests.receiver.workers.test_worker import Desk, running
from tests.rows import new_assets


def lanes(work: Callable[[object], None]) -> list[Lane]:
    tasks = [Lane(step.value, Task, work, 1, (Task.step == step,)) for step in Step]
    return [*tasks, Lane("assets", Asset, work, 2), Lane("images", Asset, work, 1, (Asset.kind == "image",))]


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the intervals, so that as many of them pass in a quarter of the time."""
    for name in ("IDLE_SECONDS", "REST_SECONDS", "QUARANTINE_INTERVAL_SECONDS"):
        monkeypatch.setattr(worker, name, getattr(worker, name) / 4)


@pytest.mark.usefixtures("shorter")
def test_idle_lanes_share_one_statement(database: Database) -> None:
    statements: list[str] = []
    for engine in {database.reader, database.writer}:
        event.listen(engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    with running(database, *lanes(lambda _: None)):
        time.sleep(6 * worker.IDLE_SECONDS)
    # one for each wake-up, and two for rows in quarantine; each of five lanes alone: 45
    assert len([each for each in statements if "due_at" in each]) <= 18


@pytest.fixture
def rests(shorter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REST_AFTER_SECONDS", 0.2)


@pytest.mark.usefixtures("rests")
def test_worker_at_rest_checks_less_often_and_keeps_one_connection(database: Database) -> None:
    statements: list[str] = []
    engine: Any = database.reader
    with running(database, *lanes(lambda _: None)) as at_rest:
        wait_until(lambda: at_rest._interval == worker.REST_SECONDS)
        for each in {database.reader, database.writer}:
            event.listen(each, "before_cursor_execute", lambda *call: statements.append(call[2]))
        began = time.monotonic()
        time.sleep(3 * worker.REST_SECONDS)
        found = len([each for each in statements if "due_at" in each]), time.monotonic() - began
        wait_until(lambda: engine.pool.checkedin() <= 1)
    # one wake-up in each interval; on SQLite a heartbeat is a commit and causes two more. Without a rest, four times
    # as many
    assert found[0] <= found[1] / worker.REST_SECONDS + 4


@pytest.mark.databases("sqlite")
@pytest.mark.usefixtures("rests")
def test_timers_of_a_worker_at_rest_are_few(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up of a thread costs about as much as the check that then finds nothing."""
    waits = Counter[str]()
    counted = WakeUps.wait

    def wait(self: WakeUps, name: str, seconds: float) -> None:
        counted(self, name, seconds)
        waits[name] += 1

    monkeypatch.setattr(worker, "REST_SECONDS", 0.15)
    beside = Lane("beside", Asset, lambda _: None, 1, beside=lambda _lasting: None)
    with running(database, *lanes(lambda _: None), beside) as at_rest:
        wait_until(lambda: at_rest._interval == worker.REST_SECONDS)
        monkeypatch.setattr(WakeUps, "wait", wait)
        began = time.monotonic()
        time.sleep(10 * worker.REST_SECONDS)
        passed = (time.monotonic() - began) / worker.REST_SECONDS
    # a lane that is looked for by others looks each five intervals, which heartbeats on SQLite may shorten
    assert all(waits[lane] <= passed / 4 + 1 for lane in (*Step, "assets", "images", "beside")), waits


@pytest.mark.usefixtures("rests")
def test_commit_ends_the_rest_at_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REST_SECONDS", 3_600.0)
    desk = Desk(database)
    with running(database, *lanes(desk.work)) as at_rest:
        wait_until(lambda: at_rest._interval == worker.REST_SECONDS)
        time.sleep(0.3)  # by then the waker waits
        new_assets(database, 2)
        with database.write() as session:
            database.wake(session)
        wait_until(lambda: len(desk.done) == 2)
        assert at_rest._interval == worker.IDLE_SECONDS


@pytest.mark.usefixtures("shorter")
def test_each_lane_sees_work_that_came_while_it_was_idle(database: Database) -> None:
    desk = Desk(database)
    with running(database, *lanes(desk.work)):
        for count in range(1, 4):
            wait_until(lambda: len(desk.done) == 2 * (count - 1))  # noqa: B023 - called at once
            time.sleep(1.2 * worker.IDLE_SECONDS)
            new_assets(database, 2)
        wait_until(lambda: len(desk.done) == 6)


def test_a_wake_up_runs_one_statement_for_lanes_jobs_and_quarantine(database: Database) -> None:
    new_assets(database, 1)
    checks, asked = DueChecks(database, lanes(lambda _: None), {"job": select(Asset.id)}), list[str]()
    for engine in {database.reader, database.writer}:
        event.listen(engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    assert checks.is_any("assets") and checks.is_any("job")
    assert not checks.is_any(Step.READ.value) and not checks.quarantined_lanes()
    assert len(asked) == 1


def test_work_until_idle_checks_all_lanes_in_one_statement_after_each_row(database: Database) -> None:
    new_assets(database, 2)

    def settle(row: Any) -> None:
        with database.write() as session:
            claims.settle(session, row, due_in=None)

    at_once, asked = Worker(database, lanes(settle), lease_seconds=30, grace_seconds=1), list[str]()
    for engine in {database.reader, database.writer}:
        event.listen(engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    assert at_once.run_until_idle() == 2
    # one before each row, and one that finds none
    assert len([each for each in asked if each.startswith("SELECT") and "due_at" in each]) == 3


def test_quarantine_shares_the_statement_of_a_wake_up_in_any_order(database: Database) -> None:
    checks, asked = DueChecks(database, lanes(lambda _: None), {}), list[str]()
    for engine in {database.reader, database.writer}:
        event.listen(engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    assert not checks.quarantined_lanes() and not checks.is_any("assets")
    assert len(asked) == 1


def test_second_call_after_one_check_makes_another(database: Database) -> None:
    checks = DueChecks(database, lanes(lambda _: None), {"job": select(Asset.id)})
    assert not checks.is_any("job") and not checks.quarantined_lanes()
    new_assets(database, 1, losses=claims.QUARANTINE_AFTER)
    assert checks.is_any("job")
    assert [lane.name for lane in checks.quarantined_lanes()] == ["assets", "images"]
