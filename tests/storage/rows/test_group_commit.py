"""An acknowledged delivery is a committed row, and the fault of one fails no other of its commit. On both databases."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlmodel import select
from structlog.testing import capture_logs

from storage.database import free_space
from storage.database.sessions import Database
from storage.errors import SessionReplaced
from storage.rows import deliveries, group_commit
from storage.rows.deliveries import Delivery
from storage.rows.group_commit import GroupCommit, Intake, QueueFull
from storage.rows.models import Callback
from storage.states import CallbackState
from tests.harness import wait_until
from tests.other_processes import forked, write

TASK = uuid.UUID(int=1)
GOOD = Delivery("kling", "push", TASK, b"{}")
SECONDS = 30  # a future that takes longer hangs


def body(number: int) -> Delivery:
    return replace(GOOD, task_id=uuid.UUID(int=1_000 + number), body=b"%d" % number)


class InLoop:
    """A group commit in an event loop of its own, which accepts deliveries from any thread."""

    def __init__(self, database: Database, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.inner = GroupCommit(database, **options)
        self._loop.call_soon_threadsafe(self.inner.start)

    def put(self, delivery: Delivery) -> Future[Intake]:
        """Returns once the delivery waits for its commit. Raises `QueueFull`."""
        future = asyncio.run_coroutine_threadsafe(self.inner.commit(delivery), self._loop)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(SECONDS)
        if future.done() and isinstance(future.exception(), QueueFull):
            future.result()
        return future

    def put_all(self, deliveries: Sequence[Delivery]) -> list[Intake | BaseException]:
        """Put all in one turn of the loop."""

        async def put() -> list[Intake | BaseException]:
            return await asyncio.gather(*map(self.inner.commit, deliveries), return_exceptions=True)

        return asyncio.run_coroutine_threadsafe(put(), self._loop).result(SECONDS)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.inner.stop(), self._loop).result(SECONDS)

    def __enter__(self) -> InLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)
        self._loop.close()

    @property
    def is_loops_turn(self) -> bool:
        return not self.inner._is_threads_turn


@pytest.fixture(params=["the loop", "the thread"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two commits: the loop or the thread."""
    monkeypatch.setattr(group_commit, "QUICK_COMMITS", 0 if request.param == "the loop" else math.inf)
    return str(request.param)


@pytest.fixture
def running(database: Database, way: str) -> Iterator[InLoop]:
    with InLoop(database) as intake:
        wait_until(lambda: intake.is_loops_turn == (way == "the loop"))
        yield intake


@contextmanager
def writers_wait(database: Database) -> Iterator[None]:
    """Let no other process commit a delivery before the end of the block."""
    with database.write() as session:
        if not database.is_sqlite:
            session.execute(text("LOCK TABLE callback IN EXCLUSIVE MODE"))
        yield


def answers(futures: list[Future[Intake]]) -> Counter[str]:
    """How many ended in each way: an outcome of the intake or an error's class."""
    ends = Counter[str]()
    for future in futures:
        error = future.exception(SECONDS)
        ends[type(error).__name__ if error else future.result().value] += 1
    return ends


def stored_bodies(database: Database) -> list[bytes]:
    with database.read() as session:
        return sorted(session.exec(select(Callback.body)))


def test_a_burst_shares_commits_and_every_delivery_is_stored_once(database: Database, running: InLoop) -> None:
    with writers_wait(database):
        with ThreadPoolExecutor(8) as pool:
            futures = list(pool.map(lambda number: running.put(body(number % 200)), range(400)))
    assert answers(futures) == {"new": 200, "duplicate": 200}
    assert stored_bodies(database) == sorted(b"%d" % number for number in range(200))
    assert count_commits(database) <= 4  # the delivery that was first, and three batches of at most 256


def count_commits(database: Database) -> int:
    """The number of transactions of the deliveries. On SQLite a statement has one time."""
    distinct = "received_at" if database.is_sqlite else "xmin::text"
    with database.read() as session:
        return int(session.execute(text(f"SELECT count(DISTINCT {distinct}) FROM callback")).scalar_one())


def test_an_acknowledged_delivery_is_visible_to_another_connection(database: Database, running: InLoop) -> None:
    other = Database(str(database.url.set(drivername=database.url.get_backend_name())))
    seen: list[int] = []

    def look(_: Future[Intake]) -> None:
        seen.append(len(stored_bodies(other)))

    for number in range(5):
        future = running.put(body(number))
        future.add_done_callback(look)
        future.result(SECONDS)
    wait_until(lambda: len(seen) == 5)
    other.close()
    assert [count >= place for place, count in enumerate(seen, 1)] == [True] * 5


POISON = {
    "a lone surrogate": replace(GOOD, body=b"bad", reason="\ud800"),
    "headers that are no JSON": replace(GOOD, body=b"bad", headers={"x": b"bytes"}),  # type: ignore[dict-item]
    "a NUL": replace(GOOD, body=b"bad", headers={"x": "\0"}, reason="\0"),
}


@pytest.mark.parametrize("poison", POISON)
def test_one_bad_delivery_fails_no_other(database: Database, running: InLoop, poison: str) -> None:
    if database.is_sqlite and poison == "a NUL":
        pytest.skip("SQLite keeps it")
    with writers_wait(database):
        good = [running.put(body(number)) for number in range(5)]
        bad = running.put(POISON[poison])
        good += [running.put(body(number)) for number in range(10)]
    assert answers(good) == {"new": 10, "duplicate": 5}
    assert bad.exception(SECONDS) is not None
    assert b"bad" not in stored_bodies(database)
    assert running.put(body(99)).result(SECONDS) is Intake.NEW


@pytest.mark.parametrize("poison", POISON)
def test_one_bad_delivery_in_a_batch_of_the_loop_fails_no_other(
    database: Database, running: InLoop, poison: str
) -> None:
    if database.is_sqlite and poison == "a NUL":
        pytest.skip("SQLite keeps it")
    good = [body(number) for number in range(20)]
    *ends, bad = running.put_all([*good, POISON[poison]])
    assert set(ends) <= {Intake.NEW, Intake.DUPLICATE} and isinstance(bad, Exception)
    assert stored_bodies(database) == sorted(delivery.body for delivery in good)


def test_a_look_for_unreadable_ones_that_an_old_session_refuses_makes_no_new_delivery_a_duplicate(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deliveries are committed by then."""
    refusals = iter([SessionReplaced("database: read-only")])

    def refused_once(*arguments: Any) -> None:
        for refusal in refusals:
            raise refusal
        deliveries.apply_unreadable_again(*arguments)

    monkeypatch.setattr(group_commit, "apply_unreadable_again", refused_once)
    with InLoop(database) as intake:
        assert intake.put(body(0)).result(SECONDS) is Intake.NEW
        with writers_wait(database):
            futures = [intake.put(body(number)) for number in (0, 1)]
        assert answers(futures) == {"duplicate": 1, "new": 1}
    assert stored_bodies(database) == [b"0", b"1"]


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.parametrize("task_id", [TASK, None])
def test_a_sequence_behind_its_table_makes_no_new_delivery_a_duplicate(
    database: Database, running: InLoop, task_id: uuid.UUID | None
) -> None:
    """Logical replication copies rows and no sequences, so the next id may be that of a row."""
    with database.write() as session:
        deliveries.store(session, list(map(body, range(20))))
        session.execute(text("SELECT setval(pg_get_serial_sequence('callback', 'id'), 1, false)"))
    ends = running.put_all([replace(GOOD, task_id=task_id), replace(GOOD, task_id=None, body=b"2")])
    assert set(map(type, ends)) == {IntegrityError}  # answered 503, and sent again
    assert len(stored_bodies(database)) == 20


def test_deliveries_of_one_turn_of_the_loop_share_a_commit(database: Database, running: InLoop, way: str) -> None:
    ends = running.put_all([*map(body, range(200)), body(7)])
    assert Counter(ends) == {Intake.NEW: 200, Intake.DUPLICATE: 1}
    assert count_commits(database) <= (1 if way == "the loop" else 2)  # the thread takes the first delivery


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest.mark.parametrize("count_from", [50, 0], ids=["new tasks", "tasks to count"])
def test_deliveries_that_arrive_while_the_thread_waits_for_its_turn_share_its_commit(
    database: Database, monkeypatch: pytest.MonkeyPatch, count_from: int
) -> None:
    monkeypatch.setattr(group_commit, "COUNT_FROM", count_from)
    with InLoop(database) as intake:
        with writers_wait(database):
            futures = [intake.put(body(0))]
            wait_until(lambda: database.turnstile._is_shared)  # type: ignore[union-attr]
            futures += [intake.put(body(number)) for number in range(1, 20)]
        assert answers(futures) == {"new": 20}
    assert count_commits(database) == 1


def test_the_loop_writes_large_bodies_in_small_batches(database: Database, running: InLoop, way: str) -> None:
    large = [replace(body(number), body=b"%d" % number + bytes(2**18)) for number in range(16)]
    assert running.put_all(large) == [Intake.NEW] * len(large)
    assert count_commits(database) >= (4 if way == "the loop" else 1)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_slow_commit_gives_the_turn_to_the_thread_until_commits_are_quick(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_as_slow(seconds: float) -> None:
        monkeypatch.setattr(group_commit, "SLOW_IN_LOOP_SECONDS", seconds)
        monkeypatch.setattr(group_commit, "SLOW_IN_THREAD_SECONDS", seconds)

    count_as_slow(math.inf)
    numbers = iter(range(100))
    with InLoop(database) as intake:

        def commit_some() -> None:
            for _ in range(group_commit.QUICK_COMMITS):
                assert intake.put(body(next(numbers))).result(SECONDS) is Intake.NEW

        assert not intake.is_loops_turn
        commit_some()
        wait_until(lambda: intake.is_loops_turn)
        count_as_slow(0)
        commit_some()
        assert not intake.is_loops_turn
        count_as_slow(math.inf)
        commit_some()
        wait_until(lambda: intake.is_loops_turn)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_neither_a_writing_worker_nor_the_intake_waits_long_for_the_other(database: Database, running: InLoop) -> None:
    longest, number = 0.0, 0
    with forked(write, str(database.url)) as worker:
        assert worker.recv() == "ready"
        while not worker.poll():
            started, number = time.monotonic(), number + 50
            assert set(running.put_all([body(number + each) for each in range(50)])) == {Intake.NEW}
            longest = max(longest, time.monotonic() - started)
        workers_longest = worker.recv()
    assert number
    assert max(longest, workers_longest) < 3


@pytest.mark.databases("sqlite")
def test_waiting_deliveries_are_bounded_in_number(
    database: Database, running: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "MAX_WAITING", 5)
    with writers_wait(database):
        put = put_until_full(running)
        if not running.inner.is_full:  # its thread began the first group in the meantime, and waits now
            put += put_until_full(running, len(put))
        assert running.inner.is_full
    assert answers(put) == {"new": len(put)}


@contextmanager
def on_disk(database: Database, monkeypatch: pytest.MonkeyPatch, free_share: Callable[[], float]) -> Iterator[InLoop]:
    """A group commit that checks its disk all the time."""
    monkeypatch.setattr(free_space, "FREE_SPACE_INTERVAL_SECONDS", 0.01)
    with InLoop(database, free_share=free_share) as intake:
        yield intake


@pytest.mark.databases("sqlite")
def test_a_nearly_full_disk_refuses_until_there_is_room_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [0.01]
    with on_disk(database, monkeypatch, lambda: free[0]) as intake:
        wait_until(lambda: intake.inner.is_full)
        with pytest.raises(QueueFull):
            intake.put(GOOD)
        free[0] = 0.5
        wait_until(lambda: not intake.inner.is_full)
        assert intake.put(GOOD).result(SECONDS) is Intake.NEW


@pytest.mark.databases("sqlite")
def test_a_nearly_full_disk_is_logged_once_when_it_begins_and_once_when_it_ends(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_space, "STEADY_SECONDS", 0.2)
    free = iter([0.0499, 0.03, 0.06, *[0.04] * 5])  # about the limit, then above it
    with capture_logs() as logs, on_disk(database, monkeypatch, lambda: next(free, 0.5)) as intake:
        wait_until(lambda: not intake.inner.is_full and len(logs) > 1)
        time.sleep(0.05)
    reason = "the disk of the database has 4.9 % free, and deliveries need 5 %"
    assert [(line["event"], line["log_level"], line.get("reason")) for line in logs] == [
        ("intake.paused", "error", reason),
        ("intake.resumed", "info", None),
    ]


@pytest.mark.databases("sqlite")
def test_event_loop_reads_the_free_space_without_touching_the_disk(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event loop calls it, and a disk may hang."""
    lookers: set[int] = set()
    with on_disk(database, monkeypatch, lambda: lookers.add(threading.get_ident()) or 1.0) as intake:
        wait_until(lambda: lookers)
        for _ in range(3):
            time.sleep(0.02)
            assert not intake.inner.is_full
            intake.put(GOOD).result(SECONDS)
    assert len(lookers) == 1 and threading.get_ident() not in lookers


@pytest.mark.databases("sqlite")
def test_failed_check_of_the_disk_refuses_no_delivery(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[str]()

    def gone() -> float:
        asked["times"] += 1
        raise OSError

    with on_disk(database, monkeypatch, gone) as intake:
        wait_until(lambda: asked["times"] > 2)
        assert intake.put(GOOD).result(SECONDS) is Intake.NEW


@pytest.mark.databases("sqlite")
def test_waiting_deliveries_are_bounded_in_bytes(
    database: Database, running: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "MAX_WAITING_BYTES", 50)
    with writers_wait(database):
        put = put_until_full(running)
    assert 50 / len(b"999") <= len(put) <= 50 + deliveries.MAX_BATCH
    assert answers(put) == {"new": len(put)}
    assert running.inner._bytes == 0


@pytest.mark.databases("sqlite")
def test_room_is_made_by_commits(database: Database, running: InLoop) -> None:
    with writers_wait(database):
        put = put_until_full(running)
    assert group_commit.MAX_WAITING <= len(put) <= group_commit.MAX_WAITING + deliveries.MAX_BATCH
    assert answers(put) == {"new": len(put)}
    assert running.put(body(9_999)).result(SECONDS) is Intake.NEW


def put_until_full(running: InLoop, first: int = 0) -> list[Future[Intake]]:
    """At most twice as many as may wait: a queue that is never full fails a test and does not hold it up for ever."""
    put: list[Future[Intake]] = []
    with suppress(QueueFull):
        while len(put) < 2 * group_commit.MAX_WAITING:
            put.append(running.put(body(first + len(put))))
    return put


@pytest.mark.databases("sqlite")
def test_stop_answers_waiting_deliveries_and_refuses_more(database: Database, running: InLoop) -> None:
    with writers_wait(database):
        futures = [running.put(body(number)) for number in range(300)]
        stop = threading.Thread(target=running.stop)
        stop.start()
        wait_until(lambda: refuses(running))
    stop.join(SECONDS)
    assert answers(futures) == {"new": 300}
    assert len(stored_bodies(database)) == 300


def refuses(stopping: InLoop) -> bool:
    try:
        stopping.put(GOOD).cancel()  # a delivery from before the stop has no handler
    except QueueFull:
        return True
    return False


def test_a_database_that_does_not_answer_does_not_hold_up_the_end(
    database: Database, running: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STOP_SECONDS", 0.2)
    with writers_wait(database):
        future = running.put(GOOD)
        running.stop()
        assert not future.done()


@pytest.mark.databases("sqlite")
def test_a_handler_that_timed_out_does_not_affect_other_deliveries(database: Database, running: InLoop) -> None:
    with writers_wait(database):
        running.put(body(0))
        gone = [running.put(body(number)) for number in (1, 2)]
        assert gone[1].cancel()
        last = running.put(body(3))
    assert last.result(SECONDS) is Intake.NEW


def test_an_unreachable_database_refuses_and_the_next_delivery_is_tried_again(way: str) -> None:
    with InLoop(Database("postgresql://nobody@127.0.0.1:1/none")) as away:
        for _ in range(2):
            assert answers([away.put(GOOD)]) == {"DatabaseUnavailable": 1}


@contextmanager
def freed_at_once(count: int) -> Iterator[list[Delivery]]:
    """Deliveries that only this list holds. The block leaves none of them to the collector of garbage."""
    gc.freeze()  # what earlier tests have left is not searched
    gc.disable()
    try:
        made = [body(number) for number in range(count)]
        bodies = {each.body for each in made}
        yield made
        wait_until(lambda: not any(type(each) is Delivery and each.body in bodies for each in gc.get_objects()))
    finally:
        gc.enable()


def test_deliveries_of_an_outage_are_freed_at_once_and_not_hashed(way: str) -> None:
    """Their bodies stayed in memory, each as long as the error of its commit referred to itself."""
    with InLoop(Database("postgresql://nobody@127.0.0.1:1/none")) as away, freed_at_once(3) as made:
        assert answers([away.put(each) for each in made]) == {"DatabaseUnavailable": 3}
        assert [each._key for each in made] == [None] * 3, "the loop would hash them, 60 µs for 64 KiB"
        made.clear()


def test_a_late_delivery_is_freed_once_it_is_committed(
    database: Database, running: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "COMMIT_SECONDS", 0.05)
    with freed_at_once(1) as made:
        with writers_wait(database):
            assert answers([running.put(made.pop())]) == {"TimeoutError": 1}


@pytest.mark.databases("sqlite")
def test_deliveries_that_a_bug_fails_are_freed_at_once(
    running: InLoop, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "_as_json", lambda _: 1 / 0)
    monkeypatch.setattr(deliveries, "_document", lambda *_: 1 / 0)
    with freed_at_once(3) as made:
        assert {type(each) for each in running.put_all(made)} == {ZeroDivisionError}
        made.clear()


SIGNED = replace(GOOD, webhook_id="w1")
REJECTED = replace(GOOD, state=CallbackState.REJECTED)


@pytest.mark.databases("sqlite")
def test_a_refused_delivery_never_shadows_the_genuine_one(database: Database, running: InLoop) -> None:
    puts = [REJECTED, GOOD, REJECTED, GOOD]
    assert [running.put(delivery).result(SECONDS) for delivery in puts] == [Intake.NEW] * 2 + [Intake.DUPLICATE] * 2
    with database.read() as session:
        rows = session.exec(select(Callback).order_by(Callback.state)).all()
        assert [(row.state, row.due_at is None) for row in rows] == [("received", False), ("rejected", True)]


def test_delivery_is_stored_unchanged(database: Database, running: InLoop) -> None:
    raw = replace(SIGNED, body=bytes(range(256)), headers={"x-a": "1", "é": "\x01"})
    running.put(raw).result(SECONDS)
    with database.read() as session:
        row = session.exec(select(Callback)).one()
    kept = (row.provider, row.source, row.task_id, row.body, row.headers, row.webhook_id, row.delivery_key)
    assert kept == ("kling", "push", TASK, raw.body, raw.headers, "w1", raw.key)
    assert row.received_at.tzinfo is not None
