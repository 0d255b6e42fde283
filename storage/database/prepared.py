"""Statements of the hot path: built and compiled once, then run by the driver itself.

SQLAlchemy takes 26 to 45 µs to execute a compiled statement on an idle machine and five times that in a busy worker,
SQLite itself 4 to 10. SQLAlchemy's knowledge of tables, types and dialects is used once, when a statement is compiled.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Dialect, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.attributes import manager_of_class
from sqlalchemy.sql.dml import UpdateBase
from sqlmodel import Session

from storage.database.kept_session import CONNECTION
from storage.database.postgresql import BREAKS

# Statements kept; each process runs some thirty.
STATEMENTS = 256

Statement = Select[Any] | UpdateBase
Model = TypeVar("Model")


class Done(NamedTuple):
    """`rows`: named tuples with the columns' names. `changed`: the number of rows."""

    rows: list[Any]
    changed: int


def execute(session: Session, statement: Statement, values: Mapping[str, Any] | None = None) -> Done:
    """Run a statement on tables that was built once, with the `values` of its parameters, in the session's transaction.

    Pending changes of the session's objects are not flushed first. Errors are the driver's own; `Database` judges them
    like those of SQLAlchemy.
    """
    connection = session.info.get(CONNECTION) or session.connection()
    prepared = _prepared(statement, connection.dialect)
    return prepared.execute(connection, values or {})


def unattached(model: type[Model], found: Done) -> list[Model]:
    """Row objects that belong to no session, for rows with all columns. `model(**values)` takes 85 µs, this 3."""
    rows: list[Model] = []
    for given in found.rows:
        rows.append(manager_of_class(model).new_instance())
        vars(rows[-1]).update(given._asdict())
    return rows


class _Prepared:
    def __init__(self, statement: Statement, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self._sql = compiled.string
        self._names: Sequence[str] | None = compiled.positiontup  # None: the driver takes names
        binds = [(name, bind) for bind, name in compiled.bind_names.items()]
        self._constants = {name: bind.value for name, bind in binds if not bind.required}
        self._binders = [
            (name, process)
            for name, bind in binds
            if (process := bind.type.dialect_impl(dialect).bind_processor(dialect)) is not None
        ]
        columns = list(statement.exported_columns)  # for an UPDATE: the rows that it returns
        self._readers = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns]
        self._row: Any = _named_tuple([column.name for column in columns])

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> Done:
        named = {**self._constants, **values}
        for name, bind in self._binders:
            named[name] = bind(named[name])
        bound = named if self._names is None else tuple([named[name] for name in self._names])
        for listen in connection.dispatch.before_cursor_execute:  # like SQLAlchemy
            listen(connection, None, self._sql, bound, None, False)
        driver: Any = connection.connection.driver_connection
        try:
            cursor = driver.execute(self._sql, bound)
        except Exception as error:
            breaks = connection.info.get(BREAKS, lambda _: False)
            if not (getattr(driver, "closed", False) or breaks(error)):
                raise
            connection.invalidate(error)  # the pool would roll it back and lend it again
            raise DBAPIError(self._sql, None, error, hide_parameters=True, connection_invalidated=True) from error
        for listen in connection.dispatch.after_cursor_execute:
            listen(connection, None, self._sql, bound, None, False)
        rows = cursor.fetchall() if self._readers else []
        readers, make = self._readers, self._row._make
        pairs = [zip(readers, row, strict=True) for row in rows]
        return Done(
            [make([value if read is None else read(value) for read, value in each]) for each in pairs], cursor.rowcount
        )


_named_tuple = partial(collections.namedtuple, "Row")
_prepared = lru_cache(maxsize=STATEMENTS)(_Prepared)
