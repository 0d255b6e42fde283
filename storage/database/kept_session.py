"""One session on one connection, for transactions that follow each other closely.

SQLAlchemy's session, transaction and pool took 0.47 ms of CPU for each group of writes, which is more than the writes
of a picture. BEGIN and COMMIT sent by the driver, on a connection that stays out of the pool meanwhile, take 0.02 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

# In a session's notes: its connection, and the driver's.
CONNECTION = "connection"

# Sessions of a parent process. Their end would roll back on the parent's connection.
_of_parents: list[Session] = []


class KeptSession:
    """For one thread at a time. `engine`: of connections that send no BEGIN of their own. `begin`: the statement."""

    def __init__(self, engine: Engine, begin: str) -> None:
        self._engine = engine
        self._begin = begin
        self._session: Session | None = None

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Committed at the end of the block. After an error, also of the commit, the next one has a new session."""
        session = self._begun()
        try:
            yield session
            session.flush()
            session.info[CONNECTION][1].execute("COMMIT")
        except BaseException:
            self.close()
            raise
        session.expunge_all()

    def close(self) -> None:
        """Roll back what is not committed, and return the connection to the pool."""
        session, self._session = self._session, None
        if session is not None:
            connection = session.info[CONNECTION][0]
            try:
                session.close()
            except DBAPIError:  # the rollback failed because the server is gone
                connection.invalidate()
            connection.close()

    def abandon(self) -> None:
        """In a forked child: the connection is the parent's."""
        if self._session is not None:
            _of_parents.append(self._session)
            self._session = None

    def _begun(self) -> Session:
        """The session with a transaction, on a new connection where the server has closed the last one."""
        is_kept, session = self._session is not None, self._session or self._opened()
        try:
            session.info[CONNECTION][1].execute(self._begin)
        except BaseException as error:
            self.close()
            if is_kept and isinstance(error, Exception) and self._engine.dialect.name != "sqlite":
                return self._begun()
            raise  # SQLite waited for its lock already
        return session

    def _opened(self) -> Session:
        connection = self._engine.connect()
        self._session = session = Session(connection, expire_on_commit=False)
        session.info[CONNECTION] = connection, connection.connection.driver_connection
        session.connection()  # now, so that no operation makes SQLAlchemy begin
        return session
