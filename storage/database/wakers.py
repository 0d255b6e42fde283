"""Waking idle workers: how a process notices that another one has committed work."""

from __future__ import annotations

import select
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import PoolProxiedConnection

from storage.database.postgresql import FACTS, is_pooled, keep_idle
from storage.database.urls import psycopg_arguments
from storage.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from psycopg import Connection

    from storage.database.sessions import Database

log = structlog.get_logger()

# How often a waiting thread checks an SQLite file for commits. 20 checks a second cost 0.05 % of a core.
SQLITE_POLL_INTERVAL_SECONDS = 0.05
# Commits that wake at once after a quiet interval. A delivery is four steps: applied, archived, finished, events sent.
# On SQLite these are commits of this process itself, since other commits are found by checking.
QUICK_WAKES = 4
# PostgreSQL notifies of each commit, and a woken process queries for work of every kind. With eight workers that was 60
# queries for each commit, more CPU than the pictures took. The first QUICK_WAKES notifications wake at once, the
# following ones together after this time. A lane with work in hand claims more without being woken.
WAKE_SECONDS = 0.2
# A pooler that lends a server connection for one transaction passes no notifications on, so a process looks for work
# this often, for all its lanes in one query. The server counts six transactions a second of an idle worker.
POOLED_INTERVAL_SECONDS = 0.2
# A notification takes milliseconds. `receiver check` waits this long for one.
CHECK_SECONDS = 2.0


class Waker(Protocol):
    """Waits for a commit of work, at most for the given time. Each waiting thread has its own.

    `wait` returns False if there was none, True if there was one or there may have been.
    """

    def wait(self, seconds: float) -> bool: ...

    def close(self) -> None: ...


class SqliteWaker:
    """Polls `data_version`, in which SQLite counts commits of other connections: some microseconds and no lock.

    After an error it opens the file again, and waits end by time alone until that works. The error is logged once.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: PoolProxiedConnection | None = None
        self._seen: int | None = None  # per connection, because each counts separately
        self._is_lost = False
        self._quick_left = QUICK_WAKES

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        try:
            while self._seen == (version := self._version()) and time.monotonic() < deadline:
                self._pause()
        except (sqlite3.Error, SQLAlchemyError, DatabaseUnavailable) as error:
            if not self._is_lost:
                log.warning("waker.poll_failed", error=type(error).__name__)
            self._is_lost = True
            self._disconnect()
            time.sleep(min(seconds, 1))  # the database is down; its caller polls meanwhile
            return True
        before, self._seen, self._is_lost = self._seen, version, False
        return before != version

    def _pause(self) -> None:
        """Wait until the next check. A commit of this process ends the wait, QUICK_WAKES times after a quiet pause."""
        woken = self._database.woken
        if not self._quick_left:
            time.sleep(SQLITE_POLL_INTERVAL_SECONDS)
        elif woken.wait(SQLITE_POLL_INTERVAL_SECONDS):
            woken.clear()
            self._quick_left -= 1
            return
        if not woken.is_set():
            self._quick_left = QUICK_WAKES
        woken.clear()

    def _version(self) -> int:
        if self._connection is None:
            self._connection = self._database.reader.raw_connection()
        cursor = self._connection.cursor()
        return int(cursor.execute("PRAGMA data_version").fetchone()[0])

    def _disconnect(self) -> None:
        connection, self._connection, self._seen = self._connection, None, None
        if connection is not None:
            connection.invalidate()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class WakeFault(Exception):
    """Notifications do not arrive. `is_pooler`: because a pooler stands in between."""

    def __init__(self, message: str, *, is_pooler: bool = False) -> None:
        super().__init__(message)
        self.is_pooler = is_pooler


class PostgresWaker:
    """Listens for the notifications of `Database.wake`, at the direct URL if there is one. It reconnects after an
    error, and when sessions turned out to belong to a demoted server.

    Behind a pooler it does not listen, and waits for `POOLED_INTERVAL_SECONDS` at most.
    """

    def __init__(self, database: Database, channel: str) -> None:
        import psycopg  # its import takes 50 ms, and only PostgreSQL needs it

        self._driver = psycopg
        self._database = database
        self._channel = channel
        self._connection: psycopg.Connection[Any] | None = None
        self._connected_at = self._woke_at = float("-inf")
        self._quick_left = QUICK_WAKES
        self._is_pooled = False

    def wait(self, seconds: float) -> bool:
        if self._is_pooled:
            time.sleep(min(seconds, POOLED_INTERVAL_SECONDS))
            return True
        if self._connected_at < self._database.sessions.replaced_at:
            self.close()
        try:
            if self._connection is None:
                self._listen()
                return True
            if not self._hears(self._connection, seconds):
                return False
            self._pause()
            for _ in self._connection.notifies(timeout=0):  # drop the notifications that came meanwhile
                pass
            self._woke_at = time.monotonic()
        except self._driver.Error:  # a standby's refusal to listen, too
            self.close()
            time.sleep(min(seconds, 1))  # the database is down; its caller polls meanwhile
        return True

    def _pause(self) -> None:
        """Pause before a wake-up, unless it is one of the QUICK_WAKES after a quiet interval."""
        left = self._woke_at + WAKE_SECONDS - time.monotonic()
        if left <= 0:
            self._quick_left = QUICK_WAKES
        elif self._quick_left > 1:
            self._quick_left -= 1
        else:
            time.sleep(left)

    @staticmethod
    def _hears(connection: Connection[Any], seconds: float) -> bool:
        """Whether a notification arrives. The driver itself wakes ten times a second while it waits for one."""
        incoming = select.poll()
        incoming.register(connection, select.POLLIN)
        return bool(incoming.poll(seconds * 1_000)) and any(True for _ in connection.notifies(timeout=0, stop_after=1))

    def check(self) -> None:
        """Listen, notify over the other URL, and receive it. Raises `WakeFault`, `DatabaseUnavailable`."""
        try:
            self._listen()
            if self._connection is None:
                raise WakeFault("it is a pooler, which passes no notifications on", is_pooler=True)
            with self._database.write() as session:
                self._database.wake(session)
            if not any(True for _ in self._connection.notifies(timeout=CHECK_SECONDS, stop_after=1)):
                raise WakeFault("it is another database: a notification did not arrive")
        except self._driver.Error as error:
            raise WakeFault(str(error)) from error

    def _listen(self) -> None:
        self._connected_at = time.monotonic()
        arguments = psycopg_arguments(self._database.direct_url or self._database.url)
        self._connection = self._driver.connect(autocommit=True, **arguments)
        process_id, _ = self._connection.execute(FACTS).fetchone() or (0, False)
        self._is_pooled = is_pooled(self._connection, process_id)
        if self._is_pooled:
            self.close()
        else:
            self._connection.execute("; ".join([*keep_idle(self._connection), f"LISTEN {self._channel}"]))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
