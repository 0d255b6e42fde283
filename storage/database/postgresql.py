"""The checks of a new PostgreSQL session, and when an old session is replaced.

A demoted primary keeps its sessions: they refuse writes permanently, while every new session at the same address may
write. So a session that reports read-only is replaced, and a new one decides. A pooler also keeps such sessions, for an
hour by default, and lends them to new clients. Those are ended there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidatePoolError

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection

# PostgreSQL's code for a write to a standby, or to a server that is read-only because its disk is full.
READ_ONLY = "25006"
# How long a new session's answer counts for the others. A server may be read-only for hours.
BELIEVED_SECONDS = 1.0
# "cached plan must not change result type": the session's prepared statements are older than the schema.
STALE_PLAN = "0A000"
# The age up to which a read-only session behind a pooler still represents those that the pooler would open now.
OLD_SECONDS = 5.0
# Ends the session that answers, if it is that old. Every role may end its own sessions.
END_IF_OLD = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = pg_backend_pid() AND backend_start < clock_timestamp() - make_interval(secs => %s)"""
# Hosted databases allow one role fewer pooled connections, so one new connection ends all of them.
MOST_ENDED = 64
FACTS = "SELECT pg_backend_pid(), current_setting('transaction_read_only') = 'on'"
# A key in the pool's notes of a connection: whether an error of the driver breaks it, for statements that bypass
# SQLAlchemy.
BREAKS = "breaks"
# Replaces SQLAlchemy's own ping before a connection of the pool is used again. It is one round trip as well.
PING = "SHOW transaction_read_only"
# psycopg reads times in this style alone, and a database may have another default. PgBouncer keeps it per client.
SET_STYLE = "SET DateStyle TO ISO"
# For statements outside a transaction. With `serializable` as the default, duplicate deliveries at once were answered
# 503. Behind a pooler the next client of the server's session would inherit it.
SET_ISOLATION = "SET default_transaction_isolation TO 'read committed'"
# A database may end sessions that are idle for some seconds or minutes, as ours often are. Each end was logged as an
# outage. PostgreSQL has this setting since version 14.
KEEP_IDLE = "SET idle_session_timeout TO 0"
# With `off` as the default a commit returns before it is on the disk: a crash of the server lost deliveries that were
# answered 200. The other values wait at least for our server's disk, and some for standbys, so they stay.
SET_DURABLE = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"


def is_pooled(connection: Connection[Any] | AsyncConnection[Any], process_id: int) -> bool:
    """Whether a pooler stands in between: the process that answers is not the one that accepted the connection."""
    return connection.info.backend_pid != process_id


def needs_style(connection: Connection[Any] | AsyncConnection[Any]) -> bool:
    return not (connection.info.parameter_status("DateStyle") or "ISO").startswith("ISO")


def keep_idle(connection: Connection[Any] | AsyncConnection[Any]) -> list[str]:
    """The statement that keeps this session however long it is idle, if the server has that setting."""
    return [KEEP_IDLE] if connection.info.server_version >= 140_000 else []


class Sessions:
    """This process's knowledge of the server's sessions. Used by all of its threads.

    `is_pooled`: whether the newest session went through a pooler, None = there was none yet. Behind a pooler that lends
    its server connections for one transaction each, nothing is prepared on the server.
    """

    def __init__(self, *, is_pooled: bool | None = None) -> None:
        self._is_said_to_be_pooled = bool(is_pooled)
        self.is_pooled = is_pooled
        self.replaced_at = float("-inf")
        self._read_only_until = float("-inf")
        self._of_thread = threading.local()

    @contextmanager
    def untested(self) -> Iterator[None]:
        """This thread takes its connection without a test: it only reads, and its read may fail."""
        self._of_thread.is_unasked = True
        try:
            yield
        finally:
            self._of_thread.is_unasked = False

    def watch(self, engine: Engine) -> None:
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "connect", self._begin)
        event.listen(engine, "checkout", self._check)
        event.listen(engine, "checkin", _forget_read_only)
        event.listen(engine, "handle_error", self._judge)

    def note(self, connection: Connection[Any] | AsyncConnection[Any], process_id: int, is_read_only: bool) -> None:
        """Note the answer of a new session (`FACTS`). Behind a pooler the session may be an old one, which represents
        no others.
        """
        self.is_pooled = self._is_said_to_be_pooled or is_pooled(connection, process_id)
        if self.is_pooled:
            connection.prepare_threshold = None
        elif is_read_only:
            self._read_only_until = time.monotonic() + BELIEVED_SECONDS

    def defaults(self, connection: Connection[Any] | AsyncConnection[Any]) -> str:
        """Statements that replace a database's own defaults in a new session, "" for none."""
        statements = [SET_STYLE] if needs_style(connection) else []
        return "; ".join(
            statements if self.is_pooled else [*statements, SET_ISOLATION, SET_DURABLE, *keep_idle(connection)]
        )

    def is_replaceable(self) -> bool:
        """Whether a new session may be able to write where an old one is not."""
        if time.monotonic() < self._read_only_until:
            return False
        self.replaced_at = time.monotonic()
        return True

    def _connect(self, dialect: Any, _: object, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        for _attempt in range(MOST_ENDED):
            connection: Connection[Any] = dialect.connect(*arguments, **options)
            connection.autocommit = True
            process_id, is_read_only = connection.execute(FACTS).fetchone() or (0, False)
            self.note(connection, process_id, is_read_only)
            if not (self.is_pooled and is_read_only):
                break
            if not _was_ended(connection):
                self._read_only_until = time.monotonic() + BELIEVED_SECONDS
                break
        return connection

    def _begin(self, connection: Connection[Any], record: Any) -> None:
        connection.autocommit = True
        if defaults := self.defaults(connection):
            connection.execute(defaults)
        connection.autocommit = False
        record.info["is_new"] = True
        record.info[BREAKS] = self._breaks

    def _check(self, connection: Connection[Any], record: Any, _: object) -> None:
        if record.info.pop("is_new", False) or getattr(self._of_thread, "is_unasked", False):
            return
        from psycopg import Error  # its import takes 50 ms, and only PostgreSQL needs it

        was_autocommit, connection.autocommit = connection.autocommit, True
        try:
            (mode,) = connection.execute(PING).fetchone() or ("on",)
        except Error as error:
            raise InvalidatePoolError from error
        connection.autocommit = was_autocommit
        if mode == "on" and self.is_replaceable():
            raise InvalidatePoolError

    def _judge(self, context: ExceptionContext) -> None:
        """Break the connection of a refused write, and all connections of its age. A stale plan does the same."""
        if self._breaks(context.original_exception):
            context.is_disconnect = True

    def _breaks(self, error: BaseException) -> bool:
        state = getattr(error, "sqlstate", None)
        return state == STALE_PLAN or (state == READ_ONLY and self.is_replaceable())


def _was_ended(connection: Connection[Any]) -> bool:
    """End the server's session that a pooler lends to this connection, if it is old. The connection ends with it."""
    from psycopg import Error

    try:
        connection.execute(END_IF_OLD, (OLD_SECONDS,))
    except Error:
        connection.close()
        return True
    return False


def _forget_read_only(connection: Any, _: object) -> None:
    """Let the server decide whether the connection's next transaction may write.

    SQLAlchemy resets to READ WRITE, which would override the read-only mode of a server with a full disk.
    """
    if connection is not None:  # None: it is broken
        connection.read_only = None
