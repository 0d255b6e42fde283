"""The hot path's way to the driver: statements that are compiled once, and a session that stays on one connection.

SQLAlchemy takes 26 to 45 µs to execute a compiled statement on an idle machine and five times that in a busy worker,
SQLite itself 4 to 10. SQLAlchemy's knowledge of tables, types and dialects is used once, when a statement is compiled.
Its session, transaction and pool took 0.47 ms of CPU for each group of writes, which is more than the writes of a
picture. BEGIN and COMMIT sent by the driver, on a connection that stays out of the pool meanwhile, take 0.02 ms.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Dialect, Engine, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.attributes import manager_of_class
from sqlalchemy.sql.dml import UpdateBase
from sqlmodel import Session

from storage.database.postgresql import BREAKS

# Statements kept; each process runs some thirty.
STATEMENTS = 256

# In a session's notes: its connection, and the driver's.
CONNECTION = "connection"

# Sessions of a parent process. Their end would roll back on the parent's connection.
_of_parents: list[Session] = []

Statement = Select[Any] | UpdateBase
Model = TypeVar("Model")


class Done(NamedTuple):
    """`rows`: named tuples with the columns' names. `changed`: the number of rows."""

    rows: list[Any]
    changed: int


def execute(place: Session | Connection, statement: Statement, values: Mapping[str, Any] | None = None) -> Done:
    """Run a statement on tables that was built once, with the `values` of its parameters, in the session's transaction.

    Pending changes of the session's objects are not flushed first. Errors are the driver's own; `Database` judges them
    like those of SQLAlchemy, whose listeners do not hear of these statements. On a connection without a session, too:
    SQLAlchemy's own `execute` makes the key of its cache again each time, which took 0.6 of the 0.73 ms of a check of
    eight lanes.
    """
    kept: tuple[Connection, Any] | None = place.info.get(CONNECTION)
    if kept is None:
        connection = place.connection() if isinstance(place, Session) else place
        kept = connection, connection.connection.driver_connection
    return _prepared(statement, kept[0].dialect).execute(*kept, values or {})


def unattached(model: type[Model], found: Done) -> list[Model]:
    """Row objects that belong to no session, for rows with all columns. `model(**values)` takes 85 µs, this 3."""
    rows = [manager_of_class(model).new_instance() for _ in found.rows]
    for row, given in zip(rows, found.rows, strict=True):
        vars(row).update(given._asdict())
    return rows


class _Prepared:
    def __init__(self, statement: Statement, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self.sql = compiled.string
        self._names: Sequence[str] | None = compiled.positiontup  # None: the driver takes names
        binds = {name: bind for bind, name in compiled.bind_names.items()}
        processors = {name: bind.type.dialect_impl(dialect).bind_processor(dialect) for name, bind in binds.items()}
        binders = {name: bind for name, bind in processors.items() if bind is not None}
        constants = {name: bind.value for name, bind in binds.items() if not bind.required}
        self._constants = {
            name: binders[name](value) if name in binders else value for name, value in constants.items()
        }
        self._binders = [(name, bind) for name, bind in binders.items() if name not in constants]
        self._write_constants()
        columns = list(statement.exported_columns)  # an UPDATE may return rows
        self._returns_rows = bool(columns)
        readers = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns]
        self._readers = [(place, read) for place, read in enumerate(readers) if read is not None]
        self._row: Any = _named_tuple([getattr(column, "name", "") for column in columns])

    def _write_constants(self) -> None:
        """Write the constants into SQLite's statement.

        SQLite plans a statement again at each run for a parameter whose value decides whether a partial index serves:
        0.3 ms of the 0.4 of a check of eight lanes.
        """
        pieces = self.sql.split("?")
        # PostgreSQL's parameters have names. A question mark in a text of SQLite is no parameter.
        if self._names is None or len(pieces) != len(self._names) + 1:
            return
        left, sql = list[str](), pieces[0]
        for name, piece in zip(self._names, pieces[1:], strict=True):
            literal = _literal(self._constants[name]) if name in self._constants else None
            left += [name] if literal is None else []
            sql += (literal or "?") + piece
        self.sql, self._names = sql, left

    def execute(self, connection: Connection, driver: Any, values: Mapping[str, Any]) -> Done:
        named = {**self._constants, **values}
        for name, bind in self._binders:
            named[name] = bind(named[name])
        bound = named if self._names is None else tuple([named[name] for name in self._names])
        try:
            cursor = driver.execute(self.sql, bound)
        except Exception as error:
            breaks = connection.info.get(BREAKS, lambda _: False)
            if not (getattr(driver, "closed", False) or breaks(error)):
                raise
            connection.invalidate(error)  # the pool would roll it back and lend it again
            raise DBAPIError(self.sql, None, error, hide_parameters=True, connection_invalidated=True) from error
        rows = list(map(list, cursor.fetchall())) if self._returns_rows else []
        for place, read in self._readers:
            for row in rows:
                row[place] = read(row[place])
        return Done(list(map(self._row._make, rows)), cursor.rowcount)


def _literal(value: Any) -> str | None:
    """The value in a statement of SQLite, None for one that stays a parameter."""
    if isinstance(value, str):
        return "'{}'".format(str.__str__(value).replace("'", "''")) if "\0" not in value else None
    return repr(value) if type(value) in (int, float) else None


_named_tuple = partial(collections.namedtuple, "Row", rename=True)
_prepared = lru_cache(maxsize=STATEMENTS)(_Prepared)


class KeptSession:
    """One session on one connection, for transactions that follow each other closely. For one thread at a time.

    `engine`: of connections that send no BEGIN of their own. `begin`: the statement.
    """

    def __init__(self, engine: Engine, begin: str) -> None:
        self._engine = engine
        self._begin = begin
        self._session: Session | None = None

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Committed at the end of the block, in which changes of row objects are flushed and the objects expunged.

        After an error, also of the commit, the next one has a new session.
        """
        session = self._begun()
        try:
            yield session
            session.info[CONNECTION][1].execute("COMMIT")
        except BaseException:
            self.close()
            raise

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
