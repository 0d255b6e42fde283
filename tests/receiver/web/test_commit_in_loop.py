"""The event loop commits and never hangs: not at a lock, a slow disk or a database that does not answer."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from storage.database import outages
from storage.database.sessions import Database
from storage.rows import group_commit
from tests.harness import wait_until
from tests.pipeline import Web, callbacks_of, insert_row

QUICK_SECONDS = 0.1
# A busy machine delays one answer in four for longer, but none for as long as a hang.
HANG_SECONDS = 1.0
HELD_SECONDS = 3.0
FSYNC_SECONDS = 1.5


class Deliveries:
    """Posts new deliveries of one task from threads of the test."""

    def __init__(self, web: Web, parts: Parts) -> None:
        self._place = web.url.removeprefix("http://")
        self._path = f"/callbacks/kling/{parts.tokens.sign('kling', insert_row(parts).id)}"
        self._pool = ThreadPoolExecutor(32)
        self._count = 0
        self.posted: list[Future[int]] = []

    def post(self) -> Future[int]:
        """Ends with the answer's status."""
        self._count += 1
        body = b'{"task_id": "901", "task_status": "processing", "n": %d}' % self._count
        return self._pool.submit(self._status, body)

    def post_some(self) -> None:
        """Send one of thirty deliveries."""
        if len(self.posted) < 30:
            self.posted.append(self.post())

    def _status(self, body: bytes) -> int:
        with contextlib.closing(http.client.HTTPConnection(self._place, timeout=20)) as connection:
            connection.request("POST", self._path, body)
            return connection.getresponse().status


@pytest.fixture
def deliveries(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deliveries]:
    """Deliveries to a receiver whose event loop commits."""
    made = Deliveries(web, parts)
    for _ in range(group_commit.QUICK_COMMITS + 1):
        assert made.post().result() == 200
    yield made
    made._pool.shutdown()


def health_waits(web: Web, seconds: float, each: Callable[[], None]) -> list[float]:
    """The duration of each `/healthz` meanwhile, `each` called between."""
    waits, end = list[float](), time.monotonic() + seconds
    connection = http.client.HTTPConnection(web.url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        while time.monotonic() < end:
            each()
            started = time.monotonic()
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            waits.append(time.monotonic() - started)
            time.sleep(0.02)
    return waits


def assert_quick(waits: list[float]) -> None:
    assert statistics.quantiles(waits, n=4)[-1] < QUICK_SECONDS
    assert max(waits) < HANG_SECONDS


@contextmanager
def stranger(database: Database) -> Iterator[None]:
    """A program without our turnstile holds the lock that every commit needs."""
    if database.is_sqlite:
        with contextlib.closing(sqlite3.connect(str(database.url.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    with database.write() as session:
        session.execute(text("LOCK TABLE callback IN EXCLUSIVE MODE"))
        yield


def test_health_answers_while_another_program_holds_the_databases_lock(
    web: Web, parts: Parts, deliveries: Deliveries
) -> None:
    with stranger(parts.database):
        waits = health_waits(web, HELD_SECONDS, deliveries.post_some)
        assert not any(each.done() for each in deliveries.posted)
    assert_quick(waits)
    assert {each.result() for each in deliveries.posted} == {200}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Once set, every insert of a delivery into an SQLite file takes as long as a slow fsync, in any thread."""
    is_slow, connect = threading.Event(), sqlite3.connect

    def connect_slowly(*words: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*words, **options)
        connection.set_trace_callback(
            lambda sql: time.sleep(FSYNC_SECONDS) if is_slow.is_set() and "INTO callback" in sql else None
        )
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_slowly)
    monkeypatch.setattr(sqlite3.dbapi2, "connect", connect_slowly)
    yield is_slow
    is_slow.clear()


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_health_answers_while_each_fsync_takes_more_than_a_second(
    disk: threading.Event, web: Web, deliveries: Deliveries
) -> None:
    disk.set()
    assert deliveries.post().result() == 200  # the commit at which the loop notices
    waits = health_waits(web, HELD_SECONDS, deliveries.post_some)
    assert_quick(waits)
    assert {each.result() for each in deliveries.posted} == {200}


@contextmanager
def stopped_backends(database: Database) -> Iterator[None]:
    """Stop PostgreSQL's processes for this database, like a disk that does not answer."""
    url = database.url.set(drivername="postgresql").render_as_string()
    asked = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(url, autocommit=True) as other:
        backends = [process_id for (process_id,) in other.execute(asked)]
    for process_id in backends:
        os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        for process_id in backends:
            os.kill(process_id, signal.SIGCONT)


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_health_answers_while_postgresql_does_not_answer(web: Web, parts: Parts, deliveries: Deliveries) -> None:
    with stopped_backends(parts.database):
        waits = health_waits(web, HELD_SECONDS, deliveries.post_some)
    assert_quick(waits)
    assert {each.result() for each in deliveries.posted} == {200}


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "COMMIT_SECONDS", 0.5)


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_delivery_is_503_in_time_while_postgresql_does_not_answer(
    impatience: None, parts: Parts, deliveries: Deliveries
) -> None:
    before = len(callbacks_of(parts))
    with stopped_backends(parts.database):
        assert deliveries.post().result(3) == 503
    wait_until(lambda: len(callbacks_of(parts)) == before + 1)
    assert deliveries.post().result() == 200


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_a_database_that_does_not_answer_is_an_outage_in_the_log(
    impatience: None, parts: Parts, deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement fails, as where a commit waits for a standby that is gone."""
    monkeypatch.setattr(outages, "STEADY_SECONDS", 0.3)
    with capture_logs() as logs:
        with stopped_backends(parts.database):
            assert [deliveries.post().result(3) for _ in range(2)] == [503, 503]
        time.sleep(0.4)
        wait_until(
            lambda: deliveries.post().result() == 200 and "database.recovered" in {each["event"] for each in logs}
        )
    [lost] = [each for each in logs if each["event"] == "database.lost"]
    assert lost["error"].endswith("no commit ended in 0.5 s")
