"""An acknowledged delivery is a committed row; what shares its commit does not share its fate. On both databases."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlmodel import select

from storage.errors import DatabaseUnavailable
from storage.rows import deliveries, free_space, group_commit
from storage.rows.database import Database
from storage.rows.deliveries import Delivery
from storage.rows.group_commit import GroupCommit, Intake, QueueFull
from storage.rows.models import Callback
from storage.states import CallbackState
from tests.harness import wait_until

TASK = uuid.UUID(int=1)
GOOD = Delivery("kling", "push", TASK, b"{}")
SECONDS = 30  # a future that takes longer hangs


def body(number: int) -> Delivery:
    return replace(GOOD, task_id=uuid.UUID(int=1_000 + number), body=b"%d" % number)


@pytest.fixture
def running(database: Database) -> Iterator[GroupCommit]:
    intake = GroupCommit(database)
    intake.start()
    yield intake
    intake.stop()


@contextmanager
def writers_wait(database: Database) -> Iterator[None]:
    """Nobody else commits a delivery before the end of the block."""
    with database.write() as session:
        if not database.is_sqlite:
            session.execute(text("LOCK TABLE callback IN EXCLUSIVE MODE"))
        yield


def answers(futures: list[Future[Intake]]) -> Counter[str]:
    """How many ended how: with an intake's word or an error's class."""
    ends = Counter[str]()
    for future in futures:
        error = future.exception(SECONDS)
        ends[type(error).__name__ if error else future.result().value] += 1
    return ends


def stored_bodies(database: Database) -> list[bytes]:
    with database.read() as session:
        return sorted(session.exec(select(Callback.body)))


def test_a_burst_shares_commits_and_every_delivery_is_stored_once(database: Database, running: GroupCommit) -> None:
    commits: list[Any] = []
    with writers_wait(database):
        event.listen(database.writer, "commit", commits.append)
        with ThreadPoolExecutor(8) as pool:
            futures = list(pool.map(lambda number: running.put(body(number % 200)), range(400)))
    assert answers(futures) == {"new": 200, "duplicate": 200}
    assert stored_bodies(database) == sorted(b"%d" % number for number in range(200))
    assert len(commits) <= 5  # the block's own, the delivery that was first, and three batches of at most 256


def test_an_acknowledged_delivery_is_visible_to_another_connection(database: Database, running: GroupCommit) -> None:
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
def test_one_bad_delivery_fails_no_other(database: Database, running: GroupCommit, poison: str) -> None:
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


def test_what_waits_in_memory_is_bounded_by_number(database: Database) -> None:
    idle = GroupCommit(database)
    for _ in range(group_commit.MAX_WAITING):
        idle.put(GOOD)
    assert idle.is_full
    with pytest.raises(QueueFull):
        idle.put(GOOD)


@contextmanager
def on_disk(
    database: Database, monkeypatch: pytest.MonkeyPatch, free_share: Callable[[], float]
) -> Iterator[GroupCommit]:
    """An inbox that looks at its disk all the time."""
    monkeypatch.setattr(free_space, "FREE_SPACE_INTERVAL_SECONDS", 0.01)
    intake = GroupCommit(database, free_share=free_share)
    intake.start()
    yield intake
    intake.stop()


def test_a_nearly_full_disk_refuses_until_there_is_room_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [0.01]
    with on_disk(database, monkeypatch, lambda: free[0]) as intake:
        wait_until(lambda: intake.is_full)
        with pytest.raises(QueueFull):
            intake.put(GOOD)
        free[0] = 0.5
        wait_until(lambda: not intake.is_full)
        assert intake.put(GOOD).result(SECONDS) is Intake.NEW


def test_who_asks_for_room_does_not_look_at_the_disk(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop asks, and a disk may hang."""
    lookers: set[int] = set()
    with on_disk(database, monkeypatch, lambda: lookers.add(threading.get_ident()) or 1.0) as intake:
        wait_until(lambda: lookers)
        for _ in range(3):
            time.sleep(0.02)
            assert not intake.is_full
            intake.put(GOOD).result(SECONDS)
    assert len(lookers) == 1 and threading.get_ident() not in lookers


def test_a_disk_that_cannot_be_looked_at_stops_no_delivery(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[str]()

    def gone() -> float:
        asked["times"] += 1
        raise OSError

    with on_disk(database, monkeypatch, gone) as intake:
        wait_until(lambda: asked["times"] > 2)
        assert intake.put(GOOD).result(SECONDS) is Intake.NEW


def test_what_waits_in_memory_is_bounded_by_bytes(database: Database) -> None:
    idle = GroupCommit(database)
    large = replace(GOOD, body=bytes(2**20))
    for _ in range(group_commit.MAX_WAITING_BYTES // 2**20):
        idle.put(large)
    with pytest.raises(DatabaseUnavailable):  # QueueFull is one: the sender tries again
        idle.put(GOOD)


def test_room_is_made_by_commits(database: Database, running: GroupCommit) -> None:
    with writers_wait(database):
        put = put_until_full(running)
    assert group_commit.MAX_WAITING <= len(put) <= group_commit.MAX_WAITING + deliveries.MAX_BATCH
    assert answers(put) == {"new": len(put)}
    assert running.put(body(9_999)).result(SECONDS) is Intake.NEW


def put_until_full(running: GroupCommit) -> list[Future[Intake]]:
    put: list[Future[Intake]] = []
    with suppress(QueueFull):
        while True:
            put.append(running.put(body(len(put))))
    return put


def test_stop_answers_what_was_put_and_refuses_more(database: Database) -> None:
    stopping = GroupCommit(database)
    stopping.start()
    with writers_wait(database):
        futures = [stopping.put(body(number)) for number in range(300)]
        stop = threading.Thread(target=stopping.stop)
        stop.start()
        wait_until(lambda: refuses(stopping))
    stop.join(SECONDS)
    assert answers(futures) == {"new": 300}
    assert len(stored_bodies(database)) == 300


def refuses(stopping: GroupCommit) -> bool:
    try:
        stopping.put(GOOD).cancel()  # one that got in before the stop is nobody's
    except QueueFull:
        return True
    return False


def test_a_database_that_does_not_answer_does_not_hold_up_the_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STOP_SECONDS", 0.2)
    intake = GroupCommit(database)
    intake.start()
    with writers_wait(database):
        future = intake.put(GOOD)
        intake.stop()
        assert not future.done()
    assert future.result(SECONDS) is Intake.NEW


def test_a_waiter_that_gave_up_harms_nobody(database: Database, running: GroupCommit) -> None:
    with writers_wait(database):
        running.put(body(0))
        gone = [running.put(body(number)) for number in (1, 2)]
        assert gone[1].cancel()
        last = running.put(body(3))
    assert last.result(SECONDS) is Intake.NEW


def test_an_unreachable_database_refuses_and_the_inbox_lives_on() -> None:
    away = GroupCommit(Database("postgresql://nobody@127.0.0.1:1/none"))
    away.start()
    for _ in range(2):
        assert answers([away.put(GOOD)]) == {"DatabaseUnavailable": 1}
    away.stop()


SIGNED = replace(GOOD, webhook_id="w1")
REJECTED = replace(GOOD, state=CallbackState.REJECTED)


def test_a_refused_delivery_never_shadows_the_genuine_one(database: Database, running: GroupCommit) -> None:
    puts = [REJECTED, GOOD, REJECTED, GOOD]
    assert [running.put(delivery).result(SECONDS) for delivery in puts] == [Intake.NEW] * 2 + [Intake.DUPLICATE] * 2
    with database.read() as session:
        rows = session.exec(select(Callback).order_by(Callback.state)).all()
        assert [(row.state, row.due_at is None) for row in rows] == [("received", False), ("rejected", True)]


def test_a_delivery_is_kept_as_it_came(database: Database, running: GroupCommit) -> None:
    raw = replace(SIGNED, body=bytes(range(256)), headers={"x-a": "1", "é": "\x01"})
    running.put(raw).result(SECONDS)
    with database.read() as session:
        row = session.exec(select(Callback)).one()
    kept = (row.provider, row.source, row.task_id, row.body, row.headers, row.webhook_id, row.delivery_key)
    assert kept == ("kling", "push", TASK, raw.body, raw.headers, "w1", raw.key)
    assert row.received_at.tzinfo is not None
