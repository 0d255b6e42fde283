"""One database, an SQLite file or PostgreSQL: connections, sessions and transactions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import (
    Connection,
    CursorResult,
    Engine,
    Executable,
    create_engine,
    event,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session

from storage.database.clock import db_now
from storage.database.turnstile import SQLITE_BUSY_SECONDS, Turnstile
from storage.database.wakers import PostgresWaker, SqliteWaker, Waker
from storage.errors import DatabaseUnavailable

log = structlog.get_logger()

# A server that is up answers in less. A delivery has 5 s from its body to its commit.
CONNECT_SECONDS = 4
# A host that vanishes (failover, a firewall that lost its state) is noticed after 10 s, whether we send or wait.
# Linux's own limits are 15 minutes, or none. Options in the URL take precedence.
POSTGRESQL_OPTIONS = {
    "connect_timeout": CONNECT_SECONDS,
    "tcp_user_timeout": 10_000,  # milliseconds
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
# Connections kept open when idle. Others are closed after use: each process has its own pool, and PostgreSQL allows 100
# connections by default.
KEPT_CONNECTIONS = 12
WAKE_CHANNEL = "receiver_work"
# checkpoints.py runs the checkpoints outside of commits. Where it does not run, a commit does one at 64 MB of log.
SQLITE_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=16384")
# SQLite's messages for a fault of the file. Faults of the statement have the same error class.
SQLITE_OUTAGES = ("locked", "disk", "unable to open", "readonly database")
# PostgreSQL's code for a write to a standby, or to a server that is read-only because its disk is full.
READ_ONLY = "25006"
# Our execution option for connections on which each statement is a transaction of its own.
NO_BEGIN = "receiver_no_begin"
URL_FORMS = "use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"


def run(
    session: Session, statement: Executable, values: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> CursorResult[Any]:
    """Execute a statement on tables (not classes) that was built once, with the `values` of its parameters.

    Building a statement anew and running it through the ORM takes three times the CPU. Settling a picture took 3.9 ms
    that way and takes 1.3 ms this way, noting its key 0.9 and 0.5 ms, claiming it 1.9 and 0.9 ms. The session's
    changes so far are flushed first, as before a statement of the ORM.
    """
    session.flush()
    return session.connection().execute(statement, values)


def insert_or_ignore(
    session: Session, model: Any, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Insert one row or many, except those whose unique keys are taken. Returns the primary keys of the new rows.

    Many rows are passed as parameters, so the statement is compiled once; their values hold no SQL expressions.
    """
    table = model.__table__
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    statement: Any = dialect.insert(table).on_conflict_do_nothing().returning(*table.primary_key)
    if isinstance(values, Mapping):
        return list(session.scalars(statement.values(values)))
    return list(session.scalars(statement, values))


class Database:
    """Sessions on one database.

    `write()` is one transaction, committed at the end of the block and rolled back when the block raises. `read()` sees
    one snapshot, taken at its first statement, and writes nothing. Raises `DatabaseUnavailable` when the database
    cannot be reached or no connection is free for 4 s. `connections`: the most at once.
    """

    def __init__(self, url: str, *, connections: int = 32) -> None:
        self.url = normal_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.turnstile: AbstractContextManager[None]
        kept = min(connections, KEPT_CONNECTIONS)
        pool: dict[str, Any] = {"pool_size": kept, "max_overflow": connections - kept, "pool_timeout": CONNECT_SECONDS}
        if self.is_sqlite:
            self.turnstile = Turnstile(Path(f"{self.url.database}.lock"))
            self.writer = _sqlite_engine(self.url, "BEGIN IMMEDIATE", pool_size=1, max_overflow=0)
            self.reader = _sqlite_engine(self.url, "BEGIN", **pool)
            self._autocommit_writer = self.writer.execution_options(**{NO_BEGIN: True})
            self._autocommit_reader = self.reader.execution_options(**{NO_BEGIN: True})
        else:
            self.turnstile = nullcontext()
            self.writer = create_engine(
                self.url,
                pool_pre_ping=True,
                pool_use_lifo=True,
                connect_args=self.postgresql_options,
                hide_parameters=True,
                **pool,
            )
            event.listen(self.writer, "checkin", _forget_read_only)
            # The driver puts both into its BEGIN, so a snapshot costs no round trip.
            self.reader = self.writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._autocommit_writer = self._autocommit_reader = self.writer.execution_options(
                isolation_level="AUTOCOMMIT"
            )

    @property
    def postgresql_options(self) -> dict[str, Any]:
        return {name: value for name, value in POSTGRESQL_OPTIONS.items() if name not in self.url.query}

    @contextmanager
    def write(self) -> Iterator[Session]:
        with _unavailable(), self.turnstile:
            with Session(self.writer, expire_on_commit=False) as session, session.begin():
                yield session

    @contextmanager
    def autocommit_writer(self) -> Iterator[Connection]:
        """A connection on which each statement is a transaction of its own, durable when it returns.

        For the single statement of a group commit: BEGIN and COMMIT are a round trip each on PostgreSQL, and on SQLite
        a wait for the interpreter lock beside a busy event loop.
        """
        with _unavailable(), self.turnstile, self._autocommit_writer.connect() as connection:
            yield connection

    @contextmanager
    def autocommit_reader(self) -> Iterator[Connection]:
        """The same for reads: idle lanes poll without a transaction."""
        with _unavailable(), self._autocommit_reader.connect() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Session]:
        with _unavailable(), Session(self.reader, expire_on_commit=False) as session:
            yield session

    def now(self) -> datetime:
        with self.read() as session:
            now: datetime = session.execute(select(db_now())).scalar_one()
            return now

    def free_share(self) -> float:
        """The free part (0..1) of the disk under an SQLite file; 1 for PostgreSQL, whose disk we cannot see."""
        if not self.is_sqlite:
            return 1.0
        usage = shutil.disk_usage(Path(self.url.database or ".").absolute().parent)
        return usage.free / usage.total

    def close(self) -> None:
        self.writer.dispose()
        self.reader.dispose()
        if isinstance(self.turnstile, Turnstile):
            self.turnstile.close()

    def waker(self) -> Waker:
        return SqliteWaker(self) if self.is_sqlite else PostgresWaker(self, WAKE_CHANNEL)

    def wake(self, session: Session) -> None:
        """Wake waiting workers when this transaction commits."""
        if not self.is_sqlite:
            session.execute(text(f"NOTIFY {WAKE_CHANNEL}"))


def normal_url(url: str) -> URL:
    """`postgresql://` means psycopg 3; SQLite needs a file. Raises ValueError with the valid forms."""
    parsed = _parse(url)
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    raise ValueError(URL_FORMS)


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError):  # an invalid port: the message would show a part of the password
        raise ValueError(URL_FORMS) from None


def _sqlite_engine(url: URL, begin: str, **pool: Any) -> Engine:
    options = {"timeout": SQLITE_BUSY_SECONDS, "check_same_thread": False}
    # Errors would quote parameters, which hold tokens and signed links.
    engine = create_engine(url, connect_args=options, hide_parameters=True, **pool)

    @event.listens_for(engine, "do_connect")
    def make(*_: object) -> None:
        """Prompts and links are for this user alone. SQLite gives its -wal and -shm the mode of the file."""
        with suppress(OSError):  # it is there, or cannot be: SQLite says so
            os.close(os.open(url.database or "", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # `start` sends BEGIN
        for pragma in SQLITE_PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        if not connection.get_execution_options().get(NO_BEGIN):
            connection.exec_driver_sql(begin)

    return engine


def _forget_read_only(connection: Any, _: object) -> None:
    """Leave it to the server whether the connection's next transaction may write.

    SQLAlchemy resets to READ WRITE, which would override the read-only mode of a server with a full disk.
    """
    if connection is not None:  # None: it is broken
        connection.read_only = None


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise DatabaseUnavailable(f"database: no connection became free within {CONNECT_SECONDS} s") from error
    except DBAPIError as error:
        is_postgresql = type(error.orig).__module__.startswith("psycopg")
        is_down = isinstance(error, OperationalError) or getattr(error.orig, "sqlstate", None) == READ_ONLY
        if error.connection_invalidated or (is_postgresql and is_down):
            raise DatabaseUnavailable(f"database: {type(error.orig).__name__}") from error
        if any(words in str(error.orig) for words in SQLITE_OUTAGES):
            raise DatabaseUnavailable(f"database: {error.orig}") from error
        raise
