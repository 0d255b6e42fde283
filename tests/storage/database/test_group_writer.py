"""Writes that share a transaction: answered after its commit, and none shares another's fault. On both databases."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select
from structlog.testing import capture_logs

from storage.database import group_writer
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable, LostClaim, SessionReplaced
from storage.rows import claims, tasks
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Asset, Task
from storage.states import AssetState
from tests.harness import wait_until
from tests.rows import new_asset, new_assets, new_task, stored

SECONDS = 30  # a call that takes longer hangs
Operation = Callable[[Session], Any]


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine splits no group."""
    monkeypatch.setattr(group_writer, "MAX_GROUP_SECONDS", SECONDS)


def claimed(database: Database, count: int) -> list[Asset]:
    new_assets(database, count)
    with database.write() as session:
        return claims.claim(session, Asset, limit=count, lease_seconds=60)


def settling(asset: Asset) -> Operation:
    return lambda session: claims.settle(session, asset, due_in=None, state=AssetState.ARCHIVED)


def states(database: Database, assets: Sequence[Asset]) -> list[str]:
    return [stored(database, asset)["state"] for asset in assets]


@contextmanager
def busy(database: Database) -> Iterator[None]:
    """The writer is in the middle of a transaction until the block ends."""
    begun, go_on = threading.Event(), threading.Event()

    def occupy(_: Session) -> None:
        begun.set()
        go_on.wait(SECONDS)

    def write() -> None:
        with suppress(DatabaseUnavailable):  # set while commits fail
            database.write_in_group(occupy)

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait(SECONDS)
    try:
        yield
    finally:
        go_on.set()
        thread.join(SECONDS)


def together(database: Database, *operations: Operation) -> list[Any]:
    """The outcomes of operations that wait at the same time: results and exceptions."""
    with ThreadPoolExecutor(len(operations)) as threads:
        with busy(database):
            futures = [threads.submit(database.write_in_group, each) for each in operations]
            wait_until(lambda: database._group_writer._waiting.qsize() == len(operations))
        return [future.exception(SECONDS) or future.result() for future in futures]


@contextmanager
def at_commit(database: Database, call: Callable[[], object]) -> Iterator[list[None]]:
    """Call this before each commit. Returns the number of calls."""
    commits: list[None] = []

    def listen(_: Any) -> None:
        commits.append(None)
        call()

    event.listen(database.writer, "commit", listen)
    yield commits
    event.remove(database.writer, "commit", listen)


def test_a_settle_is_acknowledged_after_the_commit_of_its_group(database: Database) -> None:
    assets, go_on = claimed(database, 2), threading.Event()
    with ThreadPoolExecutor(2) as threads, at_commit(database, lambda: go_on.wait(SECONDS)) as commits:
        futures = [threads.submit(database.write_in_group, settling(asset)) for asset in assets]
        wait_until(lambda: commits)
        for future in futures:
            with pytest.raises(NotYet):
                future.result(0.3)
        go_on.set()
        for future in futures:
            future.result(SECONDS)
    assert states(database, assets) == [AssetState.ARCHIVED] * 2


def test_waiting_operations_share_a_commit(database: Database) -> None:
    assets = claimed(database, 6)
    with at_commit(database, lambda: None) as commits:
        assert together(database, *map(settling, assets)) == [None] * 6
    assert len(commits) <= 2  # one commit kept the writer busy
    assert states(database, assets) == [AssetState.ARCHIVED] * 6


def test_a_group_that_takes_long_is_committed_in_parts(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQLite deliveries wait for each transaction."""
    monkeypatch.setattr(group_writer, "MAX_GROUP_SECONDS", 0)
    assets = claimed(database, 3)
    with at_commit(database, lambda: None) as commits:
        assert together(database, *map(settling, assets)) == [None] * 3
    assert len(commits) == 4  # one of them kept the writer busy
    assert states(database, assets) == [AssetState.ARCHIVED] * 3


def test_a_fault_of_the_groups_last_operation_fails_none(database: Database) -> None:
    def fail(session: Session) -> None:
        session.execute(text("SELECT no_such_column"))

    database.at_group_end = fail
    assets = claimed(database, 2)
    with capture_logs() as logs:
        assert together(database, *map(settling, assets)) == [None] * 2
    assert states(database, assets) == [AssetState.ARCHIVED] * 2
    assert [(each["event"], each["job"]) for each in logs] == [("worker.step_failed", "group_end")]


def test_a_fault_of_what_the_last_operation_returned_fails_none(database: Database) -> None:
    def fail_later(_: Session) -> Future[bool]:
        is_committed = Future[bool]()
        is_committed.add_done_callback(lambda _: 1 // 0)
        return is_committed

    database.at_group_end = fail_later
    assets = claimed(database, 2)
    for asset in assets:
        database.write_in_group(settling(asset))
    assert states(database, assets) == [AssetState.ARCHIVED] * 2


def test_a_lost_lease_fails_itself_alone(database: Database) -> None:
    assets = claimed(database, 5)
    assets[2].lease = uuid.uuid4()
    outcomes = together(database, *map(settling, assets))
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), LostClaim, type(None), type(None)]
    assert states(database, assets) == [AssetState.ARCHIVED] * 2 + [AssetState.DUE] + [AssetState.ARCHIVED] * 2


def test_a_statement_that_fails_undoes_no_other_operation(database: Database) -> None:
    assets = claimed(database, 2)

    def insert_twice(session: Session) -> None:
        new_asset(session, new_task(session), 0, id=assets[0].id)

    outcomes = together(database, settling(assets[0]), insert_twice, settling(assets[1]))
    assert [type(outcome) for outcome in outcomes] == [type(None), IntegrityError, type(None)]
    assert states(database, assets) == [AssetState.ARCHIVED] * 2


def test_a_failed_commit_acknowledges_none_of_its_group(database: Database) -> None:
    assets = claimed(database, 3)

    def fail() -> None:
        raise database.writer.dialect.loaded_dbapi.OperationalError("disk I/O error")

    with at_commit(database, fail):
        outcomes = together(database, *map(settling, assets))
    assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 3
    assert states(database, assets) == [AssetState.DUE] * 3
    assert together(database, *map(settling, assets)) == [None] * 3


def test_a_caller_waits_no_longer_than_its_patience(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = claimed(database, 1)
    with busy(database), monkeypatch.context() as impatient:
        impatient.setattr(group_writer, "WAIT_SECONDS", 0.2)
        with pytest.raises(DatabaseUnavailable, match="no commit within"):
            database.write_in_group(settling(assets[0]))
    database.write_in_group(lambda _: None)
    assert states(database, assets) == [AssetState.DUE]  # given up, so not done later


def test_a_write_that_is_given_up_while_its_transaction_cannot_begin_is_never_applied(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller has answered that nothing was kept."""
    begins, go_on = threading.Event(), threading.Event()
    transaction = database._group_writer._transaction

    @contextmanager
    def late() -> Iterator[Session]:
        begins.set()
        go_on.wait(SECONDS)
        with transaction() as session:
            yield session

    assets = claimed(database, 2)
    with monkeypatch.context() as impatient, ThreadPoolExecutor(1) as threads:
        impatient.setattr(database._group_writer, "_transaction", late)
        impatient.setattr(group_writer, "WAIT_SECONDS", 0.2)
        given_up = threads.submit(database.write_in_group, settling(assets[0]))
        assert begins.wait(SECONDS)
        assert isinstance(given_up.exception(SECONDS), DatabaseUnavailable)
        go_on.set()
    database.write_in_group(settling(assets[1]))
    assert states(database, assets) == [AssetState.DUE, AssetState.ARCHIVED]


def test_an_outage_reaches_the_others_of_a_group_in_which_a_write_was_given_up(database: Database) -> None:
    given_up, other = (group_writer._Write(lambda _: None, None) for _ in range(2))

    @contextmanager
    def interrupted() -> Iterator[Session]:
        with database.write() as session:
            given_up.durable.cancel()
            yield session
            raise DatabaseUnavailable("away")

    group_writer.GroupWriter(interrupted, interrupted, lambda: None, lambda _: None)._commit([given_up, other])
    assert str(other.durable.exception(SECONDS)) == "away"


def test_a_caller_whose_write_has_begun_waits_for_its_outcome(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets, begun, go_on = claimed(database, 1), threading.Event(), threading.Event()

    def settle_late(session: Session) -> None:
        begun.set()
        go_on.wait(SECONDS)
        settling(assets[0])(session)

    monkeypatch.setattr(group_writer, "WAIT_SECONDS", 1)
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(database.write_in_group, settle_late)
        assert begun.wait(SECONDS)
        with pytest.raises(NotYet):
            outcome.result(1.2)
        go_on.set()
        assert outcome.exception(SECONDS) is None
    assert states(database, assets) == [AssetState.ARCHIVED]


def test_groups_of_two_processes_lock_the_same_tasks_in_one_order(database: Database, database_url: str) -> None:
    with database.write() as session:
        task_ids = [new_task(session).id for _ in range(8)]
    other = Database(database_url)

    def lock_all(each: Database, order: list[uuid.UUID]) -> None:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda it: each.write_in_group(lambda s: tasks.lock_unattached(s, it), task_id=it), order))

    with ThreadPoolExecutor(2) as threads:
        rounds: list[Future[None]] = []
        for _ in range(5):
            rounds += [threads.submit(lock_all, database, task_ids), threads.submit(lock_all, other, task_ids[::-1])]
        for future in rounds:
            future.result(SECONDS)  # a deadlock is `DatabaseUnavailable`
    other.close()


def test_a_delivery_is_stored_beside_eight_busy_threads(database: Database, database_url: str) -> None:
    web, stop, slowest = Database(database_url), threading.Event(), 0.0

    def write() -> None:
        while not stop.is_set():
            database.write_in_group(lambda session: new_task(session, due_at=None))

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(write) for _ in range(8)]
        for number in range(20):
            started = time.monotonic()
            with web.write() as session:
                store(session, [Delivery("kling", "push", None, b"%d" % number)])
            slowest = max(slowest, time.monotonic() - started)
        stop.set()
        for future in futures:
            future.result(SECONDS)
    web.close()
    assert slowest < 2  # 0.02 s on an idle machine


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)  # SQLite has one writer at a time
def test_an_operation_that_waits_for_a_row_delays_no_other(database: Database) -> None:
    assets = claimed(database, 2)
    task_id = assets[0].task_id
    with ThreadPoolExecutor(1) as threads:
        with database.write() as session:
            tasks.lock(session, task_id)
            waits = threads.submit(
                database.write_in_group, lambda s: tasks.lock_unattached(s, task_id), task_id=task_id
            )
            database.write_in_group(settling(assets[1]))
            assert states(database, assets) == [AssetState.DUE, AssetState.ARCHIVED]
            assert not waits.done()
        assert waits.result(SECONDS) is not None


def test_writers_connection_is_kept_between_groups_and_returned_at_rest(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[Any]()
    event.listen(database.writer, "checkout", lambda connection, *_: opened.append(connection))
    for _ in range(3):
        database.write_in_group(lambda session: new_task(session))
    assert len(opened) == 1
    monkeypatch.setattr(group_writer, "KEEP_SECONDS", 0)
    database.write_in_group(lambda _: None)  # the wait before this write began with the old KEEP_SECONDS
    pool = database.writer.pool
    wait_until(lambda: pool.checkedout() == 0)  # type: ignore[attr-defined]


def test_other_writes_continue_while_the_writer_keeps_its_connection(database: Database) -> None:
    assets = claimed(database, 2)
    for asset in assets:
        database.write_in_group(settling(asset))
        with database.write() as session:
            new_task(session)
    assert states(database, assets) == [AssetState.ARCHIVED] * 2


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_a_connection_that_the_server_closed_between_two_groups_is_replaced(database: Database) -> None:
    (asset,) = claimed(database, 1)
    kept = database.write_in_group(lambda session: session.scalar(text("SELECT pg_backend_pid()")))
    with database.write() as session:
        session.execute(text("SELECT pg_terminate_backend(:kept, 5000)"), {"kept": kept})
    database.write_in_group(settling(asset))
    assert states(database, [asset]) == [AssetState.ARCHIVED]


def test_an_operation_after_the_close_is_committed_too(database: Database) -> None:
    assets = claimed(database, 2)
    database.write_in_group(settling(assets[0]))
    database.close()
    database.write_in_group(settling(assets[1]))
    assert states(database, assets) == [AssetState.ARCHIVED] * 2


def test_a_write_that_outlasts_the_close_is_committed_before_the_next_writer_begins(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets, begun, go_on = claimed(database, 2), threading.Event(), threading.Event()

    def settle_slowly(session: Session) -> None:
        settling(assets[0])(session)
        begun.set()
        go_on.wait(SECONDS)

    monkeypatch.setattr(group_writer, "CLOSE_SECONDS", 0)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(database.write_in_group, settle_slowly)
        assert begun.wait(SECONDS)
        database._group_writer.close()
        later = threads.submit(database.write_in_group, settling(assets[1]))
        with pytest.raises(NotYet):
            later.result(0.3)
        go_on.set()
        assert (slow.exception(SECONDS), later.exception(SECONDS)) == (None, None)
    assert states(database, assets) == [AssetState.ARCHIVED] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_a_bug_has_ended_is_replaced(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_writer, "KEEP_SECONDS", 0.01)
    bugs = [MemoryError()]

    def rest() -> None:
        if bugs:
            raise bugs.pop()

    writer = group_writer.GroupWriter(database.write, database.write, rest, lambda _: None)
    assets = claimed(database, 2)
    writer.commit(settling(assets[0]))
    wait_until(lambda: writer._thread is None)
    writer.commit(settling(assets[1]))
    assert states(database, assets) == [AssetState.ARCHIVED] * 2


def test_a_close_while_the_writer_is_being_started_fails_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asset,) = claimed(database, 1)
    start = threading.Thread.start

    def close_first(thread: threading.Thread) -> None:
        if thread.name == "group-writer":
            database._group_writer.close()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", close_first)
    database.write_in_group(settling(asset))
    assert states(database, [asset]) == [AssetState.ARCHIVED]


def test_what_was_acknowledged_is_there_and_what_failed_is_not(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads write while operations and commits fail at random, and while the writer is closed again and again."""
    transaction, chance, stop = database._group_writer._transaction, random.Random(1), threading.Event()
    there, absent = set[str](), set[str]()

    @contextmanager
    def unreliable() -> Iterator[Session]:
        with transaction() as session:
            yield session
            if chance.random() < 0.1:
                raise chance.choice([DatabaseUnavailable("away"), SessionReplaced("read-only")])

    def write() -> None:
        while not stop.is_set():
            name, fails = uuid.uuid4().hex, chance.random() < 0.1

            def insert(session: Session, name: str = name, fails: bool = fails) -> None:
                new_task(session, external_task_id=name, due_at=None)
                if fails:
                    raise LostClaim(name)

            try:
                database.write_in_group(insert)
                there.add(name)
            except (LostClaim, DatabaseUnavailable):
                absent.add(name)

    monkeypatch.setattr(database._group_writer, "_transaction", unreliable)
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(write) for _ in range(4)]
        for _ in range(10):
            time.sleep(0.01)
            database._group_writer.close()
        stop.set()
        for future in futures:
            future.result(SECONDS)
    with database.read() as session:
        found = set(session.scalars(select(Task.external_task_id)))
    assert there and absent and (there - found, absent & found) == (set(), set())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_writes_as_its_parent_does(database: Database) -> None:
    (asset,) = claimed(database, 1)
    database.write_in_group(lambda session: None)  # the writer's thread and a connection are there
    child = os.fork()
    if not child:
        with suppress(BaseException):
            database.write_in_group(settling(asset))
        os._exit(0)
    try:
        wait_until(lambda: states(database, [asset]) == [AssetState.ARCHIVED], seconds=SECONDS)
        database.write_in_group(lambda session: None)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_last_operation_hears_of_a_commit_that_an_old_session_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the rows that it claimed would be counted as under way for ever."""
    told, refusals = list[bool](), iter([SessionReplaced("database: read-only")])
    transaction = database._group_writer._transaction

    @contextmanager
    def refused_once() -> Iterator[Session]:
        with transaction() as session:
            yield session
            for refusal in refusals:
                raise refusal

    monkeypatch.setattr(database._group_writer, "_transaction", refused_once)

    def claim(_: Session) -> Future[bool]:
        is_committed = Future[bool]()
        is_committed.add_done_callback(lambda ended: told.append(ended.result()))
        return is_committed

    database.at_group_end = claim
    database.write_in_group(lambda _: None)
    wait_until(lambda: told == [False, True])
