"""SQLite's log is copied outside of commits, and restarted although commits never stop."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from storage.database import checkpoints, turnstile
from storage.database.sessions import Database
from tests.harness import wait_until
from tests.postgres import Postgres

PAGE_BYTES = 4096


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/x.db")
    with database.write() as session:
        session.execute(text("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB)"))
    yield database
    database.close()


def commit(database: Database, pages: int = 8) -> None:
    with database.write() as session:
        session.execute(text("INSERT INTO t (b) VALUES (zeroblob(:size))"), {"size": pages * PAGE_BYTES})


def size(database: Database, end: str = "") -> int:
    return Path(f"{database.url.database}{end}").stat().st_size


def test_commits_make_no_checkpoints(sqlite: Database) -> None:
    before = size(sqlite)
    for _ in range(300):  # 2,400 pages, where SQLite's own limit is 1,000
        commit(sqlite)
    assert size(sqlite) == before


@contextmanager
def committing(database: Database) -> Iterator[None]:
    """One commit after the other during the block."""
    stopping = threading.Event()

    def write() -> None:
        while not stopping.is_set():
            commit(database)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        stopping.set()
        writer.join()


def beginnings(database: Database) -> int:
    """How often the log was restarted, which its header counts (https://sqlite.org/fileformat2.html#walformat)."""
    return int.from_bytes(Path(f"{database.url.database}-wal").read_bytes()[12:16])


@pytest.mark.parametrize("is_long", [False, True])
def test_commits_wait_only_while_a_long_log_is_copied(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    monkeypatch.setattr(checkpoints, "LONG_LOG_PAGES", 10 if is_long else 10_000)
    commit(sqlite, pages=20)
    with closing(sqlite.reader.raw_connection()) as connection:
        copying = threading.Thread(target=checkpoints.checkpoint, args=(sqlite, connection.cursor()))
        with sqlite.turn():
            copying.start()
            copying.join(0.5 if is_long else 20)
            assert copying.is_alive() == is_long
        copying.join(20)
        assert not copying.is_alive()


def test_log_stays_short_while_commits_never_stop(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is restarted again and again, so it holds only the writes between two checkpoints."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(checkpoints, "LONG_LOG_PAGES", 100)
    with sqlite.write() as session:
        session.execute(text("PRAGMA wal_autocheckpoint=0"))  # else a commit would do so in the end
    with checkpoints.beside(sqlite), committing(sqlite):
        wait_until(lambda: beginnings(sqlite) >= 10)


def test_commit_makes_a_checkpoint_of_a_long_log(sqlite: Database) -> None:
    before = size(sqlite)
    for _ in range(3):
        commit(sqlite, pages=6_000)  # 72 MB
    assert size(sqlite) > before


def test_log_that_an_open_transaction_makes_long_is_reported_once_and_given_back(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "DELAYED_PAGES", 1_000)
    with closing(sqlite3.connect(str(sqlite.url.database), isolation_level=None)) as other, capture_logs() as logs:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM t").fetchone()
        with checkpoints.beside(sqlite):
            for _ in range(3):
                commit(sqlite, pages=6_000)  # 72 MB
                wait_until(lambda: logs)
        other.execute("COMMIT")
        with checkpoints.beside(sqlite), committing(sqlite):
            wait_until(lambda: size(sqlite, "-wal") <= 64 * 1024 * 1024)
    assert [each["event"] for each in logs] == ["checkpoint.delayed"]
    assert f"`fuser {sqlite.url.database} {sqlite.url.database}.lock` lists processes" in logs[0]["error"]


def test_postgresql_needs_no_checkpoints(postgres: Postgres) -> None:
    database = Database(postgres.create_database("checkpoints"))
    threads = threading.active_count()
    with checkpoints.beside(database):
        assert threading.active_count() == threads
    database.close()


def test_the_end_does_not_wait_for_a_process_that_keeps_the_lock(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a long log is copied in a turn, which another process may have."""
    monkeypatch.setattr(checkpoints, "LONG_LOG_PAGES", 0)
    monkeypatch.setattr(turnstile, "CLOSE_SECONDS", 0.1)
    assert sqlite.turnstile is not None
    sqlite.outages.is_on = True  # as in `serve`: its waits for other processes have no limit
    commit(sqlite)
    other = turnstile.Turnstile(sqlite.turnstile._path)
    with ThreadPoolExecutor(1) as pool:
        ended = threading.Event()

        def serve() -> None:
            with checkpoints.beside(sqlite):
                ended.wait(20)

        with other.turn():
            ends = pool.submit(serve)
            wait_until(lambda: sqlite.turnstile and sqlite.turnstile._blocked_since)
            ended.set()
            ends.result(10)
    other.close()
