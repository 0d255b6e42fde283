"""One database, an SQLite file or PostgreSQL: connections, sessions and transactions."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    CursorResult,
    Executable,
    create_engine,
    event,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import Pool, QueuePool
from sqlalchemy.util.queue import Empty
from sqlmodel import Session

from storage import forks
from storage.database import free_space
from storage.database.clock import db_now
from storage.database.group_writer import WAITED, GroupWriter
from storage.database.outages import AT_FAULT, LOCK_TIMEOUT, Outages, words
from storage.database.postgresql import READ_ONLY, Sessions
from storage.database.prepared import KeptSession
from storage.database.sqlite_file import NO_BEGIN, SqliteFile, sqlite_engine
from storage.database.turnstile import SQLITE_BUSY_SECONDS, Turnstile
from storage.database.urls import CONNECT_SECONDS, normal_url, place, psycopg_arguments
from storage.database.wakers import PostgresWaker, SqliteWaker, Waker
from storage.errors import DatabaseUnavailable, SessionReplaced

Result = TypeVar("Result")

# Connections kept open when idle. Others are closed after use: each process has its own pool, and PostgreSQL allows 100
# connections by default. A process at rest keeps one, because twelve idle workers used all of these 100.
KEPT_CONNECTIONS, KEPT_AT_REST = 12, 1
WAKE_CHANNEL = "receiver_work"
# The INSERT with ON CONFLICT of each kind of database, by its name in SQLAlchemy.
INSERTS: dict[str, Callable[[Any], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
# SQLite's messages for a fault of the file. Faults of the statement have the same error class.
SQLITE_OUTAGES = ("locked", "disk", "unable to open", "readonly database", "not a database")
# How long a group waits for a row that another transaction holds. Other transactions hold one for 20 ms at most.
GROUP_LOCK_MILLISECONDS = 200
BEGIN_GROUP = f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {GROUP_LOCK_MILLISECONDS}"


def run(
    session: Session, statement: Executable, values: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> CursorResult[Any]:
    """Execute a statement on tables (not classes) that was built once, with the `values` of its parameters.

    Building a statement each time and running it through the ORM takes three times the CPU. Settling a picture took 3.9
    ms that way and takes 1.3 ms this way, noting its key 0.9 and 0.5 ms, claiming it 1.9 and 0.9 ms. The session's
    changes so far are flushed first, as before a statement of the ORM.
    """
    session.flush()
    return session.connection().execute(statement, values)


def again_on_new_session(write: Callable[[], Result]) -> Result:
    """Write, and once more if an old session refused the write, because nothing was committed then."""
    try:
        return write()
    except SessionReplaced:
        return write()


def insert_or_ignore(
    session: Session, model: Any, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Insert one row or many, except those whose unique keys are taken. Returns the primary keys of the new rows.

    Many rows are passed as parameters, so the statement is compiled once; their values hold no SQL expressions.
    """
    table = model.__table__
    statement = INSERTS[session.get_bind().dialect.name](table)
    statement = statement.on_conflict_do_nothing().returning(*table.primary_key)
    if isinstance(values, Mapping):
        return list(session.scalars(statement.values(values)))
    return list(session.scalars(statement, values))


class _Pool(QueuePool):
    def close_idle(self) -> None:
        """Close idle connections until KEPT_AT_REST are left. One that is in use, or is taken meanwhile, stays open.

        SQLAlchemy's `dispose` would replace the pool, and connections in use would then be returned to the old one.
        """
        while self.checkedin() > KEPT_AT_REST:
            try:
                idle = self._pool.get(False)  # no other thread can take it now
            except Empty:
                return
            try:
                idle.close()
            finally:
                self._dec_overflow()


class Database:
    """Sessions on one database.

    `write()` is one transaction, committed at the end of the block and rolled back if the block raises. `read()` sees
    one snapshot, taken at its first statement, and writes nothing. Raises `DatabaseUnavailable` if the database cannot
    be reached, accepts no writes or has no connection free for 4 s. `connections`: the most at once. `direct_url`: of
    PostgreSQL itself if `url` is a pooler's; it is for waking alone.
    """

    def __init__(self, url: str, *, direct_url: str | None = None, connections: int = 32) -> None:
        self.url = normal_url(url)
        self.direct_url = normal_url(direct_url) if direct_url else None
        self.outages = Outages()
        self._is_bounded = False
        self.sessions = Sessions(is_pooled=True if direct_url else None)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.woken = threading.Event()  # set after a commit of this process that wakes workers
        self.turnstile: Turnstile | None = None
        kept = min(connections, KEPT_CONNECTIONS)
        pool: dict[str, Any] = {"poolclass": _Pool, "pool_size": kept, "max_overflow": connections - kept}
        pool["pool_timeout"] = CONNECT_SECONDS
        if self.is_sqlite:
            self._file = SqliteFile(Path(self.url.database or ""), self.files["database.open"])
            self.turnstile = self._make_turnstile()
            self.writer = sqlite_engine(self.url, self._file, "BEGIN IMMEDIATE", pool_size=1, max_overflow=1)
            self.reader = sqlite_engine(self.url, self._file, "BEGIN", **pool)
            self._autocommit_writer = self.writer.execution_options(**{NO_BEGIN: True})
            self._autocommit_reader = self.reader.execution_options(**{NO_BEGIN: True})
        else:
            self.writer = create_engine(
                self.url,
                pool_use_lifo=True,
                connect_args=psycopg_arguments(self.url),
                isolation_level="READ COMMITTED",  # the database may have another default
                hide_parameters=True,
                **pool,
            )
            self.sessions.watch(self.writer)
            # The driver puts both into its BEGIN, so a snapshot costs no round trip.
            self.reader = self.writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._autocommit_writer = self._autocommit_reader = self.writer.execution_options(
                isolation_level="AUTOCOMMIT"
            )
        # The last operation of each group of writes. What it returns is resolved with whether the group was committed.
        self.at_group_end: Callable[[Session], Future[bool] | None] = lambda _: None
        self._make_group_writer()
        forks.renew_in_children(self)

    def bound_waits(self, seconds: float = SQLITE_BUSY_SECONDS) -> None:
        """Wait at most this long for a lock of another session, then raise `DatabaseUnavailable`. For commands on
        PostgreSQL.

        Workers and web never need it: their own transactions are short, and they continue when another program's ends.
        """
        if self.is_sqlite:  # SQLite's own timeout does this anyway
            return
        self._is_bounded = True

        @event.listens_for(self.writer, "begin")
        def bound(connection: Connection) -> None:
            # In a read without a transaction the server would warn in its log, and nothing would be set.
            if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(seconds * 1_000)}")

    def keep_forks_out(self) -> None:
        """Let this process fork while no thread of it uses SQLite. For the library, whose program may fork at any time.

        SQLite's own locks would stay taken in the child. It then waited for ever inside its turn, and so did every
        writer of the file.
        """
        unavailable = self._unavailable

        @contextmanager
        def unforked() -> Iterator[None]:
            with forks.unforked(), unavailable():
                yield

        if self.is_sqlite:
            self._unavailable = unforked  # type: ignore[method-assign]

    def _make_group_writer(self) -> None:
        begin = "BEGIN IMMEDIATE" if self.is_sqlite else BEGIN_GROUP
        self._group_session = KeptSession(self._autocommit_writer, begin)
        self._group_writer = GroupWriter(
            self.group_write, self.write, self._group_session.close, lambda session: self.at_group_end(session)
        )
        # Like `write`, in a transaction that is shared with other threads.
        self.write_in_group, self.begin_in_group = self._group_writer.commit, self._group_writer.begin

    def _make_turnstile(self) -> Turnstile:
        return Turnstile(self.files["database.lock"], self._file.check, is_patient=lambda: self.outages.is_on)

    def begin_in_child(self) -> None:
        """Leave connections and the writer's thread to the parent. Otherwise a child's write waited a minute for a
        thread that only the parent has.
        """
        self._group_session.abandon()
        self._make_group_writer()
        self.woken = threading.Event()
        if self.is_sqlite:
            self._file.begin_in_child()
            self.turnstile = self._make_turnstile()
            self.reader.dispose(close=False)
        self.writer.dispose(close=False)

    def turn(self, *, is_urgent: bool = False) -> AbstractContextManager[None]:
        """A turn of SQLite's writers. PostgreSQL needs none."""
        return nullcontext() if self.turnstile is None else self.turnstile.turn(is_urgent=is_urgent)

    @contextmanager
    def write(self) -> Iterator[Session]:
        with self._unavailable(), self.turn():
            with Session(self.writer, expire_on_commit=False) as session, session.begin():
                yield session
        self.outages.wrote()
        if session.info.get(WAKE_CHANNEL):
            self.woken.set()

    @contextmanager
    def write_schema(self) -> Iterator[Session]:
        """`write` for a change of the schema. On SQLite foreign keys are off: dropping a table that is rebuilt would
        delete the rows that reference it. Inside a transaction they cannot be switched off.
        """
        if not self.is_sqlite:
            with self.write() as session:
                yield session
            return
        with self._unavailable(), self.turn(), self._autocommit_writer.connect() as connection:
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                with Session(connection, expire_on_commit=False) as session:
                    yield session
                    session.flush()
                connection.commit()
            finally:
                connection.rollback()
                connection.exec_driver_sql("PRAGMA foreign_keys=ON")

    @contextmanager
    def group_write(self) -> Iterator[Session]:
        """`write` for the group writer: its session is kept, and does not wait long for a row."""
        with self._unavailable(), self.turn(), self._group_session.transaction() as session:
            yield session
        self.outages.wrote()
        if session.info.pop(WAKE_CHANNEL, False):
            self.woken.set()

    @contextmanager
    def autocommit_writer(self, *, is_urgent: bool = False) -> Iterator[Connection]:
        """A connection on which each statement is a transaction of its own, durable when it returns.

        `is_urgent`: an acknowledgement waits for it.

        For the single statement of a group commit: BEGIN and COMMIT are a round trip each on PostgreSQL, and on SQLite
        a wait for the interpreter lock beside a busy event loop.
        """
        with self._unavailable(), self.turn(is_urgent=is_urgent), self._autocommit_writer.connect() as connection:
            yield connection
        self.outages.wrote()

    @contextmanager
    def autocommit_reader(self) -> Iterator[Connection]:
        """The same for reads: idle lanes poll without a transaction."""
        with self._unavailable(), self._autocommit_reader.connect() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._unavailable(), Session(self.reader, expire_on_commit=False) as session:
            yield session

    def now(self) -> datetime:
        with self.read() as session:
            now: datetime = session.execute(select(db_now())).scalar_one()
            return now

    @property
    def files(self) -> dict[str, Path]:
        """Every file that an SQLite database may have, by what it is; nothing for PostgreSQL."""
        ends = ("", "-wal", "-shm", ".lock", ".open") if self.is_sqlite else ()
        return {f"database{end}": Path(f"{self.url.database}{end}") for end in ends}

    def free_share(self) -> float:
        """The free part (0..1) of the disk under an SQLite file. 1 where the disk tells no size, and for PostgreSQL,
        whose disk we cannot see.
        """
        if not self.is_sqlite:
            return 1.0
        usage = shutil.disk_usage(Path(self.url.database or ".").absolute().parent)
        return usage.free / usage.total if usage.total else 1.0

    def shortage(self) -> str:
        """Why the web server accepts no delivery for lack of room on the disk; empty if there is room."""
        return free_space.shortage(self.free_share())

    @contextmanager
    def _unavailable(self) -> Iterator[None]:
        try:
            yield
        # The driver's own errors come from prepared statements.
        except (PoolTimeout, DBAPIError, DatabaseUnavailable, self.writer.dialect.loaded_dbapi.Error) as error:
            outage = self._outage_of(error)
            # A new session may still write, and a wait for another transaction's row is no outage.
            if outage and not isinstance(outage, SessionReplaced) and _state(error) not in WAITED:
                self.outages.failed(str(outage))
            if outage is None or outage is error:
                raise
            raise outage from error

    def _outage_of(self, error: Any) -> DatabaseUnavailable | None:
        """The outage that the error means, with place and reason; None = the error means something else."""
        if isinstance(error, DatabaseUnavailable):
            return error
        if isinstance(error, PoolTimeout):
            return DatabaseUnavailable(f"database: no connection became free within {CONNECT_SECONDS} s")
        driver, is_broken = _driver_error(error), isinstance(error, DBAPIError) and error.connection_invalidated
        is_read_only = _state(error) == READ_ONLY
        if self.is_sqlite:
            is_away = any(each in str(driver) for each in SQLITE_OUTAGES)
        else:
            is_refused = (_state(error) or "").startswith((*AT_FAULT, *([LOCK_TIMEOUT] if self._is_bounded else [])))
            is_away = is_refused or isinstance(driver, self.writer.dialect.loaded_dbapi.OperationalError)
        if not (is_broken or is_away):
            return None
        kind = SessionReplaced if is_read_only and is_broken else DatabaseUnavailable
        return kind(f"database: {place(self.url)}: {words(self.url, error)}")

    def close_idle(self) -> None:
        """Close the idle connections but one. For a process without work for a while."""
        pool = self.reader.pool  # SQLite's writer has one connection
        assert isinstance(pool, _Pool)
        pool.close_idle()

    def close(self) -> None:
        self._group_writer.close()
        for engine in (self.writer, self.reader):
            _keep_none(engine.pool)  # of those in use
            engine.dispose()
            _keep_none(engine.pool)  # of those opened later
        if self.turnstile is not None:
            self.turnstile.close()

    def waker(self) -> Waker:
        return SqliteWaker(self) if self.is_sqlite else PostgresWaker(self, WAKE_CHANNEL)

    def wake(self, session: Session) -> None:
        """Wake waiting workers when this transaction commits."""
        if not self.is_sqlite and not session.info.get(WAKE_CHANNEL):
            session.connection().exec_driver_sql(f"NOTIFY {WAKE_CHANNEL}")
        session.info[WAKE_CHANNEL] = True

    def wakes(self, session: Session) -> bool:
        """Whether this transaction wakes workers."""
        return bool(session.info.get(WAKE_CHANNEL))


def _keep_none(pool: Pool) -> None:
    """Let the pool close each connection that is returned, as those beyond its size."""
    if isinstance(pool, _Pool):
        queue: Any = pool._pool
        queue._full = lambda: True


def _driver_error(error: Any) -> Any:
    return error.orig if isinstance(error, DBAPIError) else error


def _state(error: Any) -> str | None:
    """PostgreSQL's code of the error."""
    state: str | None = getattr(_driver_error(error), "sqlstate", None)
    return state
