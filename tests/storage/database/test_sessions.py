"""Sessions, the database's clock, the turnstile and the wakers, on both databases where both have them."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlmodel import Session, func, select
from structlog.testing import capture_logs

from receiver.app import jobs
from receiver.app.wiring import Parts
from receiver.base import config
from receiver.gateway import gateway
from storage.database import wakers
from storage.database.clock import db_now
from storage.database.sessions import KEPT_CONNECTIONS, Database
from storage.database.urls import file_url, normal_url
from storage.database.wakers import Waker
from storage.errors import DatabaseUnavailable
from storage.rows.models import Worker
from tests.harness import wait_until
from tests.postgres import Postgres
from tests.webhook_receiver import SECRET

SECONDS = 30  # a longer wait hangs
# Threads that use the database beside those of lanes and jobs: waker, heartbeat, quarantine, renewal, checkpoints,
# group writer. In the web server: group commit and checkpoints; Starlette's threads for pages.
BACKGROUND, INBOX, PAGES = 6, 2, 40


@pytest.fixture
def file(tmp_path: Path, migrated_sqlite: Path) -> Path:
    copy = tmp_path / "receiver.db"
    copy.write_bytes(migrated_sqlite.read_bytes())
    return copy


@pytest.fixture
def sqlite(file: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{file}")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("given", "driver", "name"),
    [
        ("sqlite:///receiver.db", "sqlite", "receiver.db"),
        ("sqlite:////var/lib/receiver.db", "sqlite", "/var/lib/receiver.db"),
        ("postgresql://u:p@h/n", "postgresql+psycopg", "n"),
        ("postgres://u@h:5433/n?sslmode=require", "postgresql+psycopg", "n"),
        ("postgresql+psycopg://u@h/n", "postgresql+psycopg", "n"),
    ],
)
def test_valid_urls_are_accepted(given: str, driver: str, name: str) -> None:
    url = normal_url(given)
    assert (url.drivername, url.database) == (driver, name)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "receiver.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://data/receiver.db",
        "sqlite+aiosqlite:///a.db",
        "mysql://u:s3cret@h/n",
        "postgresql+psycopg2://u:s3cret@h/n",
        "postgresql://u:p@h:s3cret/n",
    ],
)
def test_invalid_url_is_refused_without_showing_its_password(given: str) -> None:
    with pytest.raises(ValueError, match="use sqlite:///FILE or postgresql://") as caught:
        normal_url(given)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("given", ["sqlite:///a?b.db", "sqlite:///a?", "sqlite:///a?b=c.db", "sqlite:///a?timeout=5"])
def test_question_mark_in_the_name_of_a_file_is_refused_with_what_to_write(given: str) -> None:
    with pytest.raises(ValueError, match=r"write a \? that is part of the file's name as %3F"):
        normal_url(given)


def test_encoded_characters_are_part_of_the_files_name(tmp_path: Path) -> None:
    file = tmp_path / "50%25?b#c ü.db"
    url = file_url(file)
    assert "50%2525%3Fb#c ü.db" in url
    database = Database(url)
    with database.write() as session:
        session.execute(text("CREATE TABLE found (id INTEGER)"))
    database.close()
    assert file.stat().st_size


def select_columns(database: Database, *columns: Any) -> tuple[Any, ...]:
    with database.read() as session:
        return tuple(session.execute(select(*columns)).one())


def test_db_now_adds_seconds_to_the_databases_time(database: Database) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)  # SQLite's clock has milliseconds
    now, soon, past, month = select_columns(database, db_now(), db_now(0.25), db_now(-90), db_now(2_592_000))
    assert before <= now <= datetime.now(UTC)
    for moment, seconds in ((soon, 0.25), (past, -90), (month, 2_592_000)):
        assert abs((moment - now).total_seconds() - seconds) < 5
    assert before <= database.now() <= datetime.now(UTC)


def test_db_now_advances_within_a_transaction(database: Database) -> None:
    with database.write() as session:
        first = session.execute(select(db_now())).scalar_one()
        wait_until(lambda: session.execute(select(db_now())).scalar_one() > first)


def test_db_now_compares_with_python_times(database: Database) -> None:
    moment = datetime.now(UTC)
    earlier, later = (moment + timedelta(hours=hours) for hours in (-1, 1))
    with database.read() as session:
        passed = select(db_now() > earlier, db_now() < later, db_now() > later)
        assert tuple(map(bool, session.execute(passed).one())) == (True, True, False)


def test_sqlite_syncs_every_commit(sqlite: Database) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    for open_session in (sqlite.read, sqlite.write):
        with open_session() as session:
            found = {name: session.execute(text(f"PRAGMA {name}")).scalar_one() for name in wanted}
        assert found == wanted


def fail_after(database: Database, act: Callable[[Session], object]) -> None:
    """A transaction that does something and then raises."""
    with pytest.raises(ZeroDivisionError), database.write() as session:
        divide(act(session))


def divide(_: object) -> None:
    raise ZeroDivisionError


def test_block_that_raises_is_rolled_back(database: Database) -> None:
    fail_after(database, add_worker)
    with database.read() as session:
        assert session.exec(select(func.count()).select_from(Worker)).one() == 0


def test_reader_does_not_see_an_open_transaction(sqlite: Database) -> None:
    with sqlite.write() as session:
        add_worker(session)
        with sqlite.read() as reader:
            assert count_workers(reader) == 0


def count_workers(session: Session) -> int:
    return session.exec(select(func.count()).select_from(Worker)).one()


def test_read_block_sees_one_snapshot(database: Database) -> None:
    with database.read() as reader:
        assert count_workers(reader) == 0
        with database.write() as session:
            add_worker(session)
        assert count_workers(reader) == 0
    with database.read() as reader:
        assert count_workers(reader) == 1


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_connection_writes_after_a_read_unless_the_server_is_read_only(database: Database, postgres: Postgres) -> None:
    mode = text("SELECT pg_backend_pid(), current_setting('transaction_read_only')")
    with database.read() as session:
        process, is_read_only = session.execute(mode).one()
        assert is_read_only == "on"
    with database.write() as session:
        assert session.execute(mode).one() == (process, "off")
    database.writer.dispose()
    with postgres.read_only(str(database.url.database)):
        with database.read() as session:
            session.execute(mode)
        with database.write() as session:
            assert session.execute(mode).one()[1] == "on"


def parts_of(database: Database, **settings: Any) -> Parts:
    url = database.url.render_as_string(hide_password=False)
    return Parts(config.load(s3_bucket="pictures", database_url=url, **settings))


def test_every_thread_has_a_connection_and_few_stay_open(database: Database) -> None:
    pool, readers = parts_of(database, worker_threads=8).database, 30
    together = threading.Barrier(readers, timeout=SECONDS)

    def read(_: int) -> int:
        with pool.read() as session:
            count = count_workers(session)
            together.wait()
            return count

    with ThreadPoolExecutor(readers) as threads:
        assert list(threads.map(read, range(readers))) == [0] * readers
    engine: Any = pool.reader
    assert (engine.pool.checkedin(), engine.pool.checkedout()) == (KEPT_CONNECTIONS, 0)
    pool.close()


def test_idle_connections_are_closed_and_used_ones_are_not(database: Database) -> None:
    """Threads read all the time while others' connections are closed. Afterwards as many may be open as before."""
    pool, readers = Database(database.url.render_as_string(hide_password=False), connections=8), 8
    ends_at = time.monotonic() + 0.5

    def read(_: int) -> int:
        count = 0
        while time.monotonic() < (ends_at if count else ends_at + SECONDS):  # all eight have a turn
            with pool.read() as session:
                count += count_workers(session) == 0
        return count

    with ThreadPoolExecutor(readers) as threads:
        counts = threads.map(read, range(readers))
        while time.monotonic() < ends_at:
            pool.close_idle()
    assert all(counts)
    pool.close_idle()
    engine: Any = pool.reader
    assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)
    with ExitStack() as held:
        assert [count_workers(held.enter_context(pool.read())) for _ in range(readers)] == [0] * readers
    pool.close()


def test_connection_that_outlives_its_database_is_closed_when_it_is_returned(database: Database) -> None:
    opened = Database(database.url.render_as_string(hide_password=False))
    drivers: list[Any] = []
    with opened.read() as session:
        drivers.append(session.connection().connection.driver_connection)
        opened.close()
    with opened.read() as session:  # as a thread does that has not noticed the end
        drivers.append(session.connection().connection.driver_connection)
    for driver in drivers:
        with pytest.raises(Exception, match="closed"):
            driver.execute("SELECT 1")


@pytest.mark.parametrize("sinks", [0, 20])
@pytest.mark.parametrize("threads", [8, 256])
def test_pool_has_a_connection_for_each_thread_of_a_process(sqlite: Database, threads: int, sinks: int) -> None:
    entries = " ".join(f"hook{number}=https://hooks.example.com/{number}" for number in range(sinks))
    parts = parts_of(sqlite, worker_threads=threads, event_sinks=entries, event_secrets=SECRET)
    lanes = parts.lanes()
    worker = (
        sum(lane.threads + lane.batches.most_lent + 1 for lane in lanes)
        + len(parts.periodic_jobs())
        + jobs.TASK_THREADS
        + BACKGROUND
    )
    web = PAGES + 2 * gateway.MAX_CREATES + gateway.SHORT_THREADS + INBOX
    assert max(worker, web) <= parts.database_threads
    assert max(sink.threads for sink in parts.sinks.values()) <= jobs.SINK_THREADS
    parts.close()


def test_turnstile_is_free_after_an_error(sqlite: Database) -> None:
    for _ in range(2):
        fail_after(sqlite, add_worker)
    with sqlite.write() as session:
        assert session.execute(text("SELECT 1")).scalar_one() == 1


def waiting(waker: Waker) -> Callable[[], bool]:
    """Wait in a thread for as long as it takes; call the answer to know whether it woke."""
    thread = threading.Thread(target=waker.wait, args=(SECONDS * 10,), daemon=True)
    thread.start()
    return lambda: not thread.is_alive()


def add_worker(session: Session) -> None:
    now = datetime.now(UTC)
    session.add(Worker(host="h", pid=1, threads=1, started_at=now, seen_at=now))
    session.flush()


def announce(database: Database) -> None:
    """Commit a row and wake the waiters."""
    with database.write() as session:
        add_worker(session)
        database.wake(session)


def test_commit_wakes_every_waiter(database: Database) -> None:
    wakers = [database.waker() for _ in range(3)]
    for waker in wakers:
        waker.wait(0)  # PostgreSQL starts to listen here
    woke = [waiting(waker) for waker in wakers]
    announce(database)
    wait_until(lambda: all(awake() for awake in woke), seconds=SECONDS)
    for waker in wakers:
        waker.close()


def test_commit_between_two_waits_is_not_missed(database: Database) -> None:
    waker = database.waker()
    waker.wait(0)
    announce(database)
    assert waker.wait(SECONDS)
    waker.close()


def test_own_commits_after_a_quiet_interval_wake_at_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of one delivery have no pause between them."""
    waker = database.waker()
    waker.wait(0)
    for name in ("SQLITE_POLL_INTERVAL_SECONDS", "WAKE_SECONDS"):
        monkeypatch.setattr(wakers, name, 10.0 * SECONDS)
    for _ in range(wakers.QUICK_WAKES):
        woke = waiting(waker)
        announce(database)
        wait_until(woke, seconds=SECONDS)
    waker.close()


def test_wait_ends_by_time_and_a_rolled_back_transaction_wakes_nobody(database: Database) -> None:
    waker = database.waker()
    waker.wait(0)
    fail_after(database, database.wake)
    assert not waker.wait(0.2)
    still = waiting(waker)
    assert not still()
    announce(database)
    wait_until(still, seconds=SECONDS)
    waker.close()


def test_unreachable_postgresql_is_unavailable_and_its_waker_only_waits() -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnavailable):
        away.now()
    with pytest.raises(DatabaseUnavailable), away.write() as session:
        session.execute(text("SELECT 1"))
    away.waker().wait(0)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.parametrize(("query", "milliseconds"), [("", 10_000), ("?tcp_user_timeout=4000", 4_000)])
def test_connection_to_a_vanished_postgresql_times_out(database: Database, query: str, milliseconds: int) -> None:
    """Checks the socket options: no address here drops packets silently."""
    opened = Database(database.url.render_as_string(hide_password=False) + query)
    with opened.read() as session:
        driver = session.connection().connection.driver_connection
        with socket.socket(fileno=os.dup(driver.fileno())) as connection:  # type: ignore[union-attr]
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == milliseconds
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
    opened.close()


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_connection_that_postgresql_closes_is_unavailable_once(database: Database, postgres: Postgres) -> None:
    waker = database.waker()
    waker.wait(0)
    with pytest.raises(DatabaseUnavailable), database.write() as session:
        break_and_use(session, postgres, str(database.url.database))
    waker.wait(0)
    assert database.now()
    waker.wait(0)
    woke = waiting(waker)
    wait_until(lambda: announce(database) or woke(), seconds=SECONDS)
    waker.close()


def break_and_use(session: Session, postgres: Postgres, name: str) -> None:
    """End every connection to the database, also of this session, then use the session."""
    add_worker(session)
    outside = Database(postgres.url())
    end = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
    with outside.read() as operator:
        operator.execute(end, {"name": name}).all()
    outside.close()
    add_worker(session)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_waker_reconnects_after_its_connection_breaks(database: Database) -> None:
    opened: list[Any] = []
    event.listen(database.reader, "connect", lambda connection, _: opened.append(connection))
    waker = database.waker()
    waker.wait(0)
    opened[-1].close()
    with capture_logs() as logs:
        waker.wait(0)
        waker.wait(0)
        woke = waiting(waker)
        announce(database)
        wait_until(woke, seconds=SECONDS)
    assert [line["event"] for line in logs] == ["waker.poll_failed"]
    waker.close()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_waker_goes_on_once_a_file_that_was_away_is_back(database: Database) -> None:
    """As on a volume that is unmounted for a moment. Its thread would have ended, and the worker only polled."""
    file = database.files["database"]
    database.now()
    database.close()  # so that the waker opens the file again
    away, waker = file.rename(file.with_suffix(".away")), database.waker()
    assert waker.wait(0)
    away.rename(file)
    waker.wait(0)
    woke = waiting(waker)
    announce(database)
    wait_until(woke, seconds=SECONDS)
    waker.close()


def test_waker_logs_a_missing_sqlite_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    waker = Database(f"sqlite:///{folder}/receiver.db").waker()
    with capture_logs() as logs:
        for _ in range(3):
            waker.wait(0)
        folder.mkdir()
        waker.wait(0)
    assert [line["event"] for line in logs] == ["waker.poll_failed"]
    waker.close()


def test_sqlite_file_in_a_missing_folder_is_unavailable(tmp_path: Path) -> None:
    away = Database(f"sqlite:///{tmp_path}/none/receiver.db")
    with pytest.raises(DatabaseUnavailable):
        away.now()
    with pytest.raises(DatabaseUnavailable), away.write():
        pass


def test_wrong_query_is_not_an_outage(database: Database) -> None:
    with pytest.raises(Exception, match="nonsense") as caught, database.read() as session:
        session.execute(text("SELECT nonsense FROM task"))
    assert not isinstance(caught.value, DatabaseUnavailable)


def test_a_new_sqlite_file_that_another_process_writes_to_is_waited_for(tmp_path: Path) -> None:
    """The switch to WAL fails at once while another writes, whatever the timeout is."""
    other = sqlite3.connect(tmp_path / "new.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    end = threading.Timer(0.5, lambda: other.execute("COMMIT"))
    end.start()
    database = Database(f"sqlite:///{tmp_path / 'new.db'}")
    with database.write() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    database.close()
    end.join()
    other.close()
