"""Query plans of the databases, which show whether a table is read as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event, text
from sqlmodel import Session

from storage.database.sessions import Database

TABLES = ("task", "asset", "callback", "event", "dispatch")
# PostgreSQL chooses a plan by the number of rows and by statistics of their values. Both differ between runs, because
# a lent database keeps the pages of earlier tests, and autovacuum runs at any time. For these plans each table has a
# million rows, and there are no statistics of their values.
UNCOUNTED = """
SELECT pg_clear_attribute_stats('public', relname::text, attname::text, false)
FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i') AND attnum > 0 AND NOT attisdropped
"""
COUNTED = """
SELECT pg_restore_relation_stats('schemaname', 'public', 'relname', relname::text, 'relallvisible', 0,
    'relpages', CASE relkind WHEN 'r' THEN pg_relation_size(oid) / current_setting('block_size')::int ELSE 0 END::int,
    'reltuples', CASE relkind WHEN 'r' THEN 1000000 ELSE -1 END::real)
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')
"""


def plans(database: Database, look: Callable[[Session], object]) -> str:
    """The plans of the statements that `look` runs, in the database's own words, one step per line.

    On PostgreSQL each table of the plan must have a row, because its planner knows when a file is empty.
    """
    found = _explain(database, look)
    with database.read() as session:
        for table in TABLES if not database.is_sqlite else ():
            has_rows = session.execute(text(f"SELECT EXISTS (SELECT FROM {table})")).scalar()
            assert has_rows or f" on {table} " not in found, f"the choice of an index of {table} needs a row in it"
    return found


def _explain(database: Database, look: Callable[[Session], object]) -> str:
    """Scans and sorts are switched off on PostgreSQL, so that a remaining one shows that no index can be used."""
    asked: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        asked.append((statement, values))

    event.listen(database.reader, "before_cursor_execute", note)
    with database.read() as session:
        look(session)
    event.remove(database.reader, "before_cursor_execute", note)
    engine = database.reader if database.is_sqlite else database.writer
    with engine.connect() as connection:  # the transaction ends without a commit
        if not database.is_sqlite:
            connection.exec_driver_sql(UNCOUNTED)
            connection.exec_driver_sql(COUNTED)
            for way in ("seqscan", "bitmapscan", "sort"):
                connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
        explain = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
        found = [connection.exec_driver_sql(f"{explain} {each}", values).all() for each, values in asked]
    return "\n".join(str(row[-1]) for rows in found for row in rows) + "\n"


def scans(database: Database, look: Callable[[Session], object]) -> list[str]:
    """The steps of these plans that read a whole table."""
    steps = [step.strip(" ->") for step in _explain(database, look).splitlines()]
    if database.is_sqlite:
        return [step for step in steps if step in {f"SCAN {table}" for table in TABLES}]
    return [step for step in steps if step.startswith(tuple(f"Seq Scan on {table}" for table in TABLES))]
