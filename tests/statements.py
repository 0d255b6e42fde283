"""What engines need is made once for all of a process, because each test and each command opens its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.util import LRUCache
from sqlmodel import Session

from storage.database.prepared import CONNECTION, Done, KeptSession, _Prepared


def compile_once() -> None:
    """From now on until the process ends, also in processes that are forked from it.

    A compiled statement is kept by its dialect, so dialects of one class and one driver count as equal.
    """
    kept: LRUCache[Any, Any] = LRUCache(5_000)

    def use_kept(connection: Connection) -> None:
        connection.execution_options(compiled_cache=kept)

    DefaultDialect.__eq__ = lambda one, other: type(one) is type(other)  # type: ignore[method-assign]
    DefaultDialect.__hash__ = lambda one: hash(type(one))  # type: ignore[method-assign]
    event.listen(Engine, "engine_connect", use_kept)


def describe_server_once() -> None:
    """Let the first engine alone ask PostgreSQL for its version, schema and types, as all databases of a run are on one
    server. That is 3 of the 9 ms of CPU with which a test opens a database.
    """
    ask, facts = PGDialect_psycopg.initialize, dict[str, Any]()

    def describe(dialect: PGDialect_psycopg, connection: Connection) -> None:
        if not facts:
            before = dict(vars(dialect))
            ask(dialect, connection)  # type: ignore[no-untyped-call] # SQLAlchemy's own
            found = {name: value for name, value in vars(dialect).items() if before.get(name) is not value}
            found.pop("_type_memos", None)
            facts.update(found)
        vars(dialect).update(facts)

    PGDialect_psycopg.initialize = describe  # type: ignore[method-assign]


class _Heard:
    """The driver's connection, whose statements SQLAlchemy's listeners hear of."""

    def __init__(self, connection: Connection, driver: Any) -> None:
        self._connection = connection
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def execute(self, sql: str, bound: Any = None) -> Any:
        if bound is None:  # BEGIN or COMMIT
            for listen in self._connection.dispatch.commit if sql == "COMMIT" else ():
                listen(self._connection)
            return self._driver.execute(sql)
        for listen in self._connection.dispatch.before_cursor_execute:
            listen(self._connection, None, sql, bound, None, False)
        cursor = self._driver.execute(sql, bound)
        for listen in self._connection.dispatch.after_cursor_execute:
            listen(self._connection, None, sql, bound, None, False)
        return cursor


@cache
def hear_prepared_statements() -> None:
    """Prepared statements and the commits of a kept session go to the driver. From now on SQLAlchemy's listeners hear
    of them too.
    """
    run, opened = _Prepared.execute, KeptSession._opened

    def execute(statement: _Prepared, connection: Connection, driver: Any, values: Mapping[str, Any]) -> Done:
        heard = driver if isinstance(driver, _Heard) else _Heard(connection, driver)
        return run(statement, connection, heard, values)

    def open_heard(kept: KeptSession) -> Session:
        session = opened(kept)
        session.info[CONNECTION] = session.info[CONNECTION][0], _Heard(*session.info[CONNECTION])
        return session

    _Prepared.execute = execute  # type: ignore[method-assign]
    KeptSession._opened = open_heard  # type: ignore[method-assign]
