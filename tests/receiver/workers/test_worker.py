"""The worker: lanes, threads, leases and the end, with any behaviour of the work and the database.

The lanes have a test's own work, which can hang, fail and count. Rows and claims are real.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlmodel import col, delete, select, update
from structlog.testing import capture_logs

from receiver.workers import worker
from receiver.workers.lanes import Lane, PeriodicJob
from receiver.workers.worker import Worker
from storage.archive.folders import sweep_uploads
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.operations import heartbeats
from storage.rows import claims, models
from storage.rows.models import Asset, Task
from storage.states import Step
from tests.harness import wait_until
from tests.postgres import Postgres
from tests.rows import LONG_AGO, new_assets, new_task, stored


class Desk:
    """Work that records its rows, waits for the gate, then settles them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.begun: list[Any] = []
        self.done: list[Any] = []
        self.unsettled: list[Any] = []
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def work(self, row: Any) -> None:
        self.begun.append(row.id)
        self.gate.wait(20)
        try:
            with self.database.write() as session:
                claims.settle(session, row, due_in=None)
        except DatabaseUnavailable:
            self.unsettled.append(row.id)
            raise
        self.done.append(row.id)

    def work_many(self, rows: list[Any]) -> None:
        self.batches.append(len(rows))
        for row in rows:
            self.work(row)


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


@contextmanager
def running(
    database: Database, *lanes: Lane, lease: float = 5, grace: float = 10, periodic_jobs: Sequence[PeriodicJob] = ()
) -> Iterator[Worker]:
    """A worker in a thread. It has stopped when the block ends."""
    worker = Worker(database, lanes, lease_seconds=lease, grace_seconds=grace, periodic_jobs=periodic_jobs)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        wait_until(lambda: heartbeats.count_alive(database))
        yield worker
    finally:
        worker.stop()
        thread.join(30)
        assert not thread.is_alive()


def assets_lane(work: Callable[[Any], None], threads: int = 4, **options: Any) -> Lane:
    return Lane("assets", Asset, work, threads, **options)


def waiting(database: Database) -> int:
    with database.read() as session:
        return len(session.exec(select(Asset.id).where(col(Asset.due_at).is_not(None))).all())


def test_every_due_row_is_worked_on_once(database: Database, desk: Desk) -> None:
    assets = new_assets(database, 12)
    with running(database, assets_lane(desk.work)):
        wait_until(lambda: not waiting(database))
    assert sorted(desk.done) == sorted(asset.id for asset in assets)


def test_lanes_take_only_their_own_step(database: Database, desk: Desk) -> None:
    with database.write() as session:
        reads = [new_task(session, step=Step.READ).id for _ in range(2)]
        new_task(session, step=Step.CREATE)
    lane = Lane("reads", Task, desk.work, 1, (col(Task.step) == Step.READ,))
    assert Worker(database, [lane], lease_seconds=5, grace_seconds=0).run_until_idle() == 2
    assert sorted(desk.done) == sorted(reads)


@pytest.mark.databases("sqlite")
def test_worker_without_a_thread_for_its_rows_ends_and_gives_them_back(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def few(thread: threading.Thread) -> None:
        if thread.name.startswith("assets_"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    assets = new_assets(database, 2)
    with ThreadPoolExecutor(1) as caller:
        ended = caller.submit(Worker(database, [assets_lane(desk.work)], lease_seconds=60, grace_seconds=60).run)
        with pytest.raises(worker.TooFewThreads, match="can't start new thread: raise the limit"):
            ended.result(20)
    assert {stored(database, asset)["lease"] for asset in assets} == {None}


@pytest.mark.databases("sqlite")
def test_a_bug_in_the_feeding_of_a_lane_ends_the_worker(database: Database, desk: Desk) -> None:
    """Its process is started again. Otherwise the lane stood still in a worker that seemed to live."""
    desk.gate.clear()
    assets = new_assets(database, 3)
    lane = Lane("ended", Asset, desk.work, 1, claim_pause_seconds="soon")  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as caller:
        ended = caller.submit(Worker(database, [lane], lease_seconds=60, grace_seconds=0).run)
        with pytest.raises(TypeError):
            ended.result(20)
        assert {stored(database, asset)["lease"] for asset in assets} == {None}
        desk.gate.set()


@pytest.mark.databases("sqlite")
def test_worker_without_a_thread_for_a_lane_gives_back_what_the_others_hold(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six such starts would have parked an honest row."""
    start, begun, ended = threading.Thread.start, threading.Event(), threading.Event()

    def few(thread: threading.Thread) -> None:
        if thread.name == "feed-second":
            assert begun.wait(20)
            raise RuntimeError("can't start new thread")
        start(thread)

    def lasts(_: object) -> None:
        begun.set()
        ended.wait(20)

    monkeypatch.setattr(threading.Thread, "start", few)
    (asset,) = new_assets(database, 1)
    lanes = [assets_lane(lasts), Lane("second", Task, lasts, 1)]
    with pytest.raises(worker.TooFewThreads, match="can't start new thread: raise the limit"):
        Worker(database, lanes, lease_seconds=60, grace_seconds=0).run()
    assert stored(database, asset)["lease"] is None and stored(database, asset)["losses"] == 0
    ended.set()
    wait_until(lambda: not any(each.name.startswith("assets_") for each in threading.enumerate()))


@pytest.mark.databases("sqlite")
def test_thread_works_on_the_rows_for_which_no_other_can_be_started(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, list[str]()

    def one(thread: threading.Thread) -> None:
        if thread.name.startswith("assets_"):
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one)
    new_assets(database, 9)
    with running(database, assets_lane(desk.work)):
        wait_until(lambda: not waiting(database))
    assert len(desk.done) == 9


@pytest.mark.databases("sqlite")
def test_processes_share_the_threads_of_a_lane(database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 1.0)
    other = heartbeats.register(database, 1)
    desk.gate.clear()
    with running(database, assets_lane(desk.work, is_shared=True), grace=0):
        wait_until(lambda: heartbeats.count_alive(database) == 2)
        new_assets(database, 6)
        wait_until(lambda: len(desk.begun) == 2)
        time.sleep(2 * worker.IDLE_SECONDS)
        assert len(desk.begun) == 2
        heartbeats.unregister(database, other)
        wait_until(lambda: len(desk.begun) == 4)
        desk.gate.set()
        wait_until(lambda: not waiting(database))


@pytest.mark.databases("sqlite")
def test_worker_whose_row_is_gone_registers_again(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover to a standby that had not got it yet."""
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.1)
    with running(database, assets_lane(desk.work)):
        with database.write() as session:
            session.execute(delete(models.Worker))
        wait_until(lambda: heartbeats.count_alive(database) == 1)
    assert heartbeats.count_alive(database) == 0


@pytest.mark.databases("sqlite")
def test_second_process_shares_the_threads_from_its_first_claim(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    heartbeats.register(database, 4)
    assets = new_assets(database, 5)
    with running(database, assets_lane(desk.work, is_shared=True), grace=0):
        wait_until(lambda: len(desk.begun) == 2)
        claimed = [asset for asset in assets if stored(database, asset)["lease"] is not None]
        desk.gate.set()
    assert len(claimed) == 2


@pytest.mark.parametrize(("processes", "threads"), [(0, 4), (1, 4), (2, 2), (3, 1), (4, 1), (50, 1)])
def test_each_process_has_a_thread_of_a_shared_lane(processes: int, threads: int) -> None:
    assert assets_lane(lambda _: None, is_shared=True).threads_of(processes) == threads
    assert assets_lane(lambda _: None).threads_of(processes) == 4


def test_stuck_lane_does_not_delay_others(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    (asset,) = new_assets(database, 1)
    free = Desk(database)
    with running(database, assets_lane(desk.work, 1), Lane("tasks", Task, free.work, 1)):
        wait_until(lambda: desk.begun)
        with database.write() as session:
            task = new_task(session)
        wait_until(lambda: free.done == [task.id])
        assert desk.done == []
        desk.gate.set()
    assert desk.done == [asset.id]


def test_lane_with_batches_takes_rows_in_batches(database: Database, desk: Desk) -> None:
    new_assets(database, 11)
    lane = assets_lane(desk.work, 2, work_many=desk.work_many, batch=lambda: 5)
    assert Worker(database, [lane], lease_seconds=5, grace_seconds=0).run_until_idle() == 11
    assert desk.batches == [5, 5]  # a single row goes to `work`


@pytest.mark.databases("sqlite")
def test_batches_are_spread_over_the_threads(database: Database, desk: Desk) -> None:
    new_assets(database, 10)
    with running(database, assets_lane(desk.work, 2, work_many=desk.work_many, batch=lambda: 5)):
        wait_until(lambda: not waiting(database))
    assert len(desk.done) == 10
    assert max(desk.batches) <= 5


def test_stop_finishes_rows_in_hand_and_claims_no_more(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    new_assets(database, 4)
    with running(database, assets_lane(desk.work, 2)) as worker:
        wait_until(lambda: len(desk.begun) == 2)
        worker.stop()
        desk.gate.set()
    assert (len(desk.done), waiting(database)) == (2, 2)
    assert heartbeats.count_alive(database) == 0


def test_leases_are_renewed_during_work_and_while_draining(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    (asset,) = new_assets(database, 1)
    with running(database, assets_lane(desk.work), lease=1) as worker:
        wait_until(lambda: desk.begun)
        worker.stop()
        first = stored(database, asset)["due_at"]
        wait_until(lambda: (stored(database, asset)["due_at"] - first).total_seconds() > 1)
        desk.gate.set()
    assert desk.done == [asset.id]


@pytest.mark.databases("sqlite")
def test_row_that_outlives_the_grace_time_is_released(database: Database, desk: Desk) -> None:
    """A released row is due at once, so that no worker waits for its lease, and the attempt is not counted."""
    desk.gate.clear()
    (asset,) = new_assets(database, 1)
    with running(database, assets_lane(desk.work, 1), lease=600, grace=0.1):
        wait_until(lambda: desk.begun)
    row = stored(database, asset)
    assert (row["lease"], row["attempts"], row["losses"]) == (None, 0, 0)
    assert row["due_at"] <= database.now()
    desk.gate.set()
    wait_until(lambda: [t for t in threading.enumerate() if t.name.startswith("assets")] == [])
    assert desk.done == []  # the claim was lost by then


@pytest.mark.databases("sqlite")
def test_row_claimed_again_while_its_old_claim_ends_is_still_in_hand(database: Database, desk: Desk) -> None:
    """A report takes a claim away and makes the row due. One worker may then hold the row twice."""
    (asset,) = new_assets(database, 1)
    first_may_end, second_may_end = threading.Event(), threading.Event()
    gates = iter((first_may_end, second_may_end))
    lock = threading.Lock()

    def work(row: Any) -> None:
        desk.begun.append(row.id)
        with lock:
            gate = next(gates)
        gate.wait(20)
        desk.done.append(row.id)

    with running(database, assets_lane(work), grace=0.1):
        wait_until(lambda: len(desk.begun) == 1)
        with database.write() as session:
            session.execute(update(Asset).values(lease=None, due_at=LONG_AGO))
        wait_until(lambda: len(desk.begun) == 2)
        first_may_end.set()
        wait_until(lambda: len(desk.done) == 1)
    assert stored(database, asset)["lease"] is None  # released at the end of the grace time
    second_may_end.set()


@pytest.mark.databases("sqlite")
def test_row_that_meets_a_bug_is_retried_later_and_others_continue(database: Database, desk: Desk) -> None:
    bad, good = new_assets(database, 2)

    def work(row: Any) -> None:
        if row.id == bad.id:
            raise ZeroDivisionError
        desk.work(row)

    with running(database, assets_lane(work)):
        wait_until(lambda: desk.done == [good.id] and stored(database, bad)["lease"] is None)
    row = stored(database, bad)
    assert row["due_at"] is not None
    assert (row["attempts"] >= 1, row["losses"]) == (True, 0)


def test_bug_in_a_batch_settles_each_row_of_it(database: Database) -> None:
    assets = new_assets(database, 3)

    def fail(_rows: Any) -> None:
        raise ZeroDivisionError

    lane = assets_lane(fail, work_many=fail, batch=lambda: 3)
    Worker(database, [lane], lease_seconds=600, grace_seconds=0).run_until_idle()
    assert [stored(database, asset)["lease"] for asset in assets] == [None] * 3


def test_run_until_idle_renews_leases(database: Database, desk: Desk) -> None:
    (asset,) = new_assets(database, 1)

    def work(row: Any) -> None:
        wait_until(lambda: stored(database, asset)["due_at"] > row.due_at)
        desk.work(row)

    assert Worker(database, [assets_lane(work)], lease_seconds=1.5, grace_seconds=0).run_until_idle() == 1


@pytest.mark.databases("sqlite")
def test_renewal_continues_after_an_unexpected_error(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asset,) = new_assets(database, 1)
    desk.gate.clear()
    renew, bugs = claims.renew, [ZeroDivisionError()]

    def renew_badly(*arguments: Any) -> None:
        if bugs:
            raise bugs.pop()
        renew(*arguments)

    monkeypatch.setattr(claims, "renew", renew_badly)
    with running(database, assets_lane(desk.work), lease=1.5):
        wait_until(lambda: desk.begun)
        claimed_until = stored(database, asset)["due_at"]
        wait_until(lambda: stored(database, asset)["due_at"] > claimed_until)
        assert not bugs
        desk.gate.set()


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_worker_waits_at_its_start_for_a_database_that_is_away(
    database: Database, desk: Desk, postgres: Postgres
) -> None:
    new_assets(database, 1)
    postgres.stop()
    worker = Worker(database, [assets_lane(desk.work)], lease_seconds=5, grace_seconds=10)
    with ThreadPoolExecutor(1) as pool, capture_logs() as logs:
        running = pool.submit(worker.run)
        try:
            wait_until(lambda: logs)
            postgres.start()
            wait_until(lambda: desk.done)
        finally:
            worker.stop()
        running.result(30)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_rows_unsettled_while_the_database_was_down_are_released(
    database: Database, desk: Desk, postgres: Postgres
) -> None:
    """The rows are released when the database returns, long before their leases end."""
    desk.gate.clear()
    assets = new_assets(database, 3)
    with running(database, assets_lane(desk.work, 2), lease=9):
        wait_until(lambda: len(desk.begun) == 2)
        postgres.stop()
        desk.gate.set()
        wait_until(lambda: len(desk.unsettled) == 2)
        postgres.start()
        wait_until(lambda: not waiting(database), seconds=30)
    assert sorted(desk.done) == sorted(asset.id for asset in assets)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_rows_of_a_bug_are_released_if_the_database_went_down_with_it(
    database: Database, desk: Desk, postgres: Postgres
) -> None:
    (asset,) = new_assets(database, 1)
    desk.gate.clear()

    def work(row: Any) -> None:
        if not desk.begun:
            desk.begun.append(row.id)
            desk.gate.wait(20)
            raise ZeroDivisionError
        desk.work(row)

    with capture_logs() as logs, running(database, assets_lane(work), lease=30):
        wait_until(lambda: desk.begun)
        postgres.stop()
        desk.gate.set()
        wait_until(lambda: "worker.step_failed" in [line["event"] for line in logs])
        postgres.start()
        wait_until(lambda: desk.done == [asset.id], seconds=25)  # long before the lease ends


@pytest.mark.databases("sqlite")
@pytest.mark.usefixtures("s3_environment")
def test_unreachable_bucket_is_not_logged_as_the_database(database: Database, desk: Desk) -> None:
    away = Bucket("away", endpoint_url="http://127.0.0.1:9")
    job = PeriodicJob("uploads", 60, lambda: sweep_uploads(away))
    with capture_logs() as logs, running(database, assets_lane(desk.work), periodic_jobs=[job]):
        (line,) = wait_until(lambda: [each for each in logs if each.get("job") == "uploads"])
    assert line["event"] == "worker.store_not_reached"
    assert "cannot be reached" in line["error"]
