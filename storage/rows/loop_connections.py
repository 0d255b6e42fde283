"""Connections on which an event loop commits deliveries itself. The group commit uses them (group_commit.py).

`SqliteLoopReads` looks up what decides whether a delivery is stored.

Both raise an exception for any obstacle. The thread of the group commit decides what it means.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from storage.database.postgresql import FACTS, READ_ONLY, STALE_PLAN
from storage.database.sessions import Database
from storage.database.sqlite_file import SQLITE_PRAGMAS
from storage.database.urls import psycopg_arguments
from storage.rows.deliveries import Delivery, insert_sqlite, postgresql_inserts
from storage.states import CallbackState

if TYPE_CHECKING:
    from psycopg import AsyncConnection

# `state` is compared with a constant of ours.
_UNREADABLE = f"SELECT delivery_key FROM callback WHERE state = '{CallbackState.UNREADABLE}' AND delivery_key "  # noqa: S608 - our own constant
_UNREADABLE_SQLITE = _UNREADABLE + "IN (SELECT value FROM json_each(?))"  # noqa: S608 - our own constants
_TASK_NAMED = (
    "SELECT coalesce((SELECT id FROM task WHERE external_task_id = ?), "
    "(SELECT task_id FROM task_alias WHERE provider = ? AND provider_task_id = ?))"
)
_IS_STORED = "SELECT 1 FROM callback WHERE delivery_key = ? AND task_id IS NULL"
_UNREADABLE_POSTGRESQL = _UNREADABLE + "= ANY(%s)"


class Locked(Exception):
    """Another writer holds the SQLite file."""


class LoopConnection(Protocol):
    """One connection, used by one task of the loop at a time. Every statement is a transaction of its own."""

    async def insert(self, deliveries: Sequence[Delivery]) -> set[str]:
        """Commit at most 256 deliveries. Returns the keys that were new, once they are durable."""

    async def unreadable(self, keys: Collection[str]) -> set[str]:
        """Those of these keys whose deliveries are unreadable."""

    async def close(self) -> None: ...


class SqliteLoopConnection:
    """Begins at once or raises `Locked`: it waits neither at the turnstile nor for SQLite's own lock.

    It blocks the loop for as long as the disk takes, but never for a checkpoint, which `checkpoints.beside` makes.
    """

    def __init__(self, database: Database) -> None:
        assert database.turnstile is not None
        self._turnstile = database.turnstile
        self._connection = _sqlite(database, *SQLITE_PRAGMAS, "wal_autocheckpoint=0")

    async def insert(self, deliveries: Sequence[Delivery]) -> set[str]:
        if not self._turnstile.is_entered_at_once():
            raise Locked
        try:
            return insert_sqlite(self._connection.execute, deliveries)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise Locked from error
            raise
        finally:
            self._turnstile.leave()

    async def unreadable(self, keys: Collection[str]) -> set[str]:
        return {key for (key,) in self._connection.execute(_UNREADABLE_SQLITE, (json.dumps([*keys]),))}

    async def close(self) -> None:
        self._connection.close()


def _sqlite(database: Database, *pragmas: str) -> sqlite3.Connection:
    """A connection without transactions that waits for no lock."""
    (file,), options = database.writer.dialect.create_connect_args(database.url)
    no_wait: dict[str, Any] = {**options, "timeout": 0, "isolation_level": None, "check_same_thread": False}
    connection: sqlite3.Connection = sqlite3.connect(file, **no_wait)
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")
    return connection


class SqliteLoopReads:
    """Look-ups by an index in an event loop, some 15 µs each. SQLite's readers wait for no writer.

    Raises `sqlite3.Error`, and `UnicodeError` for what is not text.
    """

    def __init__(self, database: Database) -> None:
        self._connection = _sqlite(database, "query_only=ON")

    def task_named(self, provider: str, external_task_id: str | None, provider_task_id: str | None) -> uuid.UUID | None:
        """Our task with either id. The external id is tried first."""
        [found] = self._connection.execute(_TASK_NAMED, (external_task_id, provider, provider_task_id)).fetchone()
        return uuid.UUID(found) if found else None

    def is_stored(self, key: str) -> bool:
        """Whether there is a delivery with this key whose token names no task."""
        return self._connection.execute(_IS_STORED, (key,)).fetchone() is not None

    def close(self) -> None:
        self._connection.close()


class PostgresLoopConnection:
    """Waits for the server without blocking the loop. Reconnects after an error that broke the connection."""

    def __init__(self, database: Database) -> None:
        self._arguments = psycopg_arguments(database.url)
        self._sessions = database.sessions
        self._connection: AsyncConnection[Any] | None = None

    async def insert(self, deliveries: Sequence[Delivery]) -> set[str]:
        connection = await self._opened()
        new = set[str]()
        try:
            for each in postgresql_inserts(deliveries):
                result = await connection.execute(*each)
                new.update([key for key, _ in await result.fetchall()])
        except Exception as error:
            if getattr(error, "sqlstate", None) in (READ_ONLY, STALE_PLAN):
                await connection.close()  # a demoted server keeps its sessions permanently, and a session its plans
            raise
        return new

    async def unreadable(self, keys: Collection[str]) -> set[str]:
        connection = await self._opened()
        result = await connection.execute(_UNREADABLE_POSTGRESQL, ([*keys],))
        return {key for (key,) in await result.fetchall()}

    async def _opened(self) -> AsyncConnection[Any]:
        from psycopg import AsyncConnection  # its import takes 50 ms, and only PostgreSQL needs it

        if self._connection is None or self._connection.closed:
            self._connection = await AsyncConnection.connect(autocommit=True, **self._arguments)
            process_id, is_read_only = await (await self._connection.execute(FACTS)).fetchone() or (0, False)
            self._sessions.note(self._connection, process_id, is_read_only)
            if defaults := self._sessions.defaults(self._connection):
                await self._connection.execute(defaults)
        return self._connection

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()


def loop_connection(database: Database) -> LoopConnection:
    """Open the connection. Raises `sqlite3.Error` if the file cannot be opened; a server is connected to at the first
    insert.
    """
    return SqliteLoopConnection(database) if database.is_sqlite else PostgresLoopConnection(database)
