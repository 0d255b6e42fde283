"""Turns of the writers of one SQLite file: excluded from each other, and acknowledgements first."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlmodel import func, select

from storage.database import turnstile as turnstiles
from storage.database.sessions import Database
from storage.database.turnstile import Turnstile
from storage.rows import group_commit
from storage.rows.group_commit import Intake
from storage.rows.models import Callback
from tests import other_processes
from tests.harness import wait_until
from tests.other_processes import forked
from tests.storage.rows.test_group_commit import GOOD, InLoop

SECONDS = 30


def test_turnstile_excludes_threads_and_processes(tmp_path: Path) -> None:
    counter = tmp_path / "count"
    counter.write_text("0")
    turnstile = Turnstile(tmp_path / "db.lock")

    def take_turns(number: int) -> None:
        for _ in range(200):
            with turnstile.turn(is_urgent=bool(number % 2)):
                counter.write_text(str(int(counter.read_text()) + 1))

    with forked(other_processes.take_turns, tmp_path) as other, ThreadPoolExecutor(4) as pool:
        assert other.recv() == "ready"
        ours = [pool.submit(take_turns, number) for number in range(4)]
        other.send("go")
        assert other.poll(SECONDS) and other.recv() == "done"
        for turns in ours:
            turns.result(SECONDS)
    turnstile.close()
    assert counter.read_text() == "1000"


@pytest.fixture
def sqlite(migrated_sqlite: Path, tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path / 'receiver.db')}")
    made.outages.is_on = True  # as in servers: their waits for other processes have no limit
    yield made
    made.close()


@pytest.fixture
def turnstile(sqlite: Database) -> Turnstile:
    assert isinstance(sqlite.turnstile, Turnstile)
    return sqlite.turnstile


@pytest.fixture
def other_process(turnstile: Turnstile) -> Iterator[Turnstile]:
    """Another file description: it takes turns with the database's as another process does."""
    other = Turnstile(turnstile._path)
    yield other
    other.close()


@pytest.fixture
def intake(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[InLoop]:
    """Its thread commits."""
    monkeypatch.setattr(group_commit, "QUICK_COMMITS", math.inf)
    with InLoop(sqlite) as made:
        yield made


def count_deliveries(sqlite: Database) -> int:
    with sqlite.read() as session:
        return session.scalar(select(func.count()).select_from(Callback)) or 0


@pytest.mark.parametrize("waits", ["a thread of its process", "another process"])
def test_a_delivery_is_committed_before_a_writer_that_waited_longer(
    waits: str, sqlite: Database, turnstile: Turnstile, other_process: Turnstile, intake: InLoop
) -> None:
    """It needs no turn where its process has one."""
    waiting, holding = (other_process, turnstile) if waits == "another process" else (turnstile, other_process)

    def write() -> int:
        with other_process.turn() if waits == "another process" else sqlite.write():
            return count_deliveries(sqlite)

    with ThreadPoolExecutor(1) as pool:
        with holding.turn():
            seen = pool.submit(write)
            wait_until(lambda: waiting._blocked_since)
            answer = intake.put(GOOD)
            wait_until(lambda: turnstile._is_shared)
        assert (answer.result(SECONDS), seen.result(SECONDS)) == (Intake.NEW, 1)


def test_other_writers_have_turns_while_deliveries_never_end(turnstile: Turnstile, other_process: Turnstile) -> None:
    ended = threading.Event()

    def commit() -> None:
        while not ended.is_set():
            with turnstile.turn(is_urgent=True):
                pass

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(commit) for _ in range(2)]
        for _ in range(50):
            with turnstile.turn():
                pass
            with other_process.turn():
                pass
        ended.set()
        for end in ends:
            end.result(SECONDS)


def test_a_turnstile_is_closed_while_its_threads_take_turns(turnstile: Turnstile) -> None:
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            with turnstile.turn():
                pass

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write) for _ in range(2)]
        try:
            for _ in range(20):
                pool.submit(turnstile.close).result(SECONDS)
        finally:
            ended.set()
        for each in writers:
            each.result(SECONDS)


def test_a_turnstile_is_closed_once_the_last_thread_has_left(turnstile: Turnstile) -> None:
    with ThreadPoolExecutor(1) as pool:
        with turnstile.turn():
            closed = pool.submit(turnstile.close)
            wait_until(lambda: turnstile._is_closing)
            assert not closed.done()
        closed.result(SECONDS)


def test_closing_does_not_wait_for_a_process_that_keeps_the_lock(
    turnstile: Turnstile, other_process: Turnstile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that was stopped in a transaction held up the end of all others until they were killed."""
    monkeypatch.setattr(turnstiles, "CLOSE_SECONDS", 0.1)

    def write() -> None:
        with turnstile.turn():
            pass

    with ThreadPoolExecutor(2) as pool:
        with other_process.turn():
            waits = pool.submit(write)
            wait_until(lambda: turnstile._blocked_since)
            pool.submit(turnstile.close).result(SECONDS)
            assert not waits.done()
        waits.result(SECONDS)
    assert turnstile._file is None
