"""What a database does for a piece of code: its plans, to tell whether a table is read as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlmodel import Session

from storage.database.sessions import Database


def plans(database: Database, look: Callable[[Session], object]) -> str:
    """The plans of the statements that `look` runs, in the database's words, a step each line.

    PostgreSQL scans or sorts a small table whatever its indexes; it is told not to, so that a scan or a sort shows that
    there is no way around.
    """
    asked: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        asked.append((statement, values))

    event.listen(database.reader, "before_cursor_execute", note)
    with database.read() as session:
        look(session)
    event.remove(database.reader, "before_cursor_execute", note)
    with database.reader.connect() as connection:
        if not database.is_sqlite:
            for way in ("seqscan", "bitmapscan", "sort"):
                connection.exec_driver_sql(f"SET enable_{way} = off")
        explain = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
        found = [connection.exec_driver_sql(f"{explain} {each}", values).all() for each, values in asked]
    return "\n".join(str(row[-1]) for rows in found for row in rows) + "\n"


def scans(database: Database, look: Callable[[Session], object]) -> list[str]:
    """The steps of these plans that read a whole table."""
    steps = [step.strip(" ->") for step in plans(database, look).splitlines()]
    tables = ("task", "asset", "callback", "event", "dispatch")
    if database.is_sqlite:
        return [step for step in steps if step in {f"SCAN {table}" for table in tables}]
    return [step for step in steps if step.startswith(tuple(f"Seq Scan on {table}" for table in tables))]
