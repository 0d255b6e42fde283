"""Counts of tasks that ended within the last 24 hours, in parts of ten minutes that stay in memory, so that no scrape
reads a day of rows.

Each reading counts the last minutes and the next few thousand rows in turn. A day of up to `ROWS` tasks is counted
completely each time. In a larger one, a task that changes long after its end (a retried archive, a late callback) shows
when its turn comes. A scrape with a million tasks takes 20 ms instead of 360.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Float, Select, Text, and_, bindparam, case, func, or_, select, type_coerce
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType
from sqlmodel import Session

from storage import states
from storage.database.prepared import execute
from storage.rows.models import Task
from storage.states import ArchiveState, TaskState

DAY = timedelta(days=1)
# A callback counts as lost this long after a read has reported the end.
CALLBACK_PATIENCE_SECONDS = 300
PART = timedelta(minutes=10)
# Rows that one read counts: about 20 ms.
ROWS = 5_000
# The number of rows that one statement aims at. A day has as many in an installation with 30,000 tasks a month, so a
# statement takes no longer in one with a million.
STATEMENT_ROWS = 1_000


@dataclass(frozen=True)
class Ended:
    """Tasks that ended, by their outcome. The fields are those of `Measures`, without `_day`.

    `failures`: failed or incomplete; a dismissed task is both.
    """

    rows: int = 0
    archived: int = 0
    incomplete: int = 0
    failed: int = 0
    callbacks_expected: int = 0
    callbacks_lost: int = 0
    callbacks_late: int = 0
    late_seconds: float = 0.0
    failures: int = 0


@dataclass
class EndedLastDay:
    """The parts of the day that were counted so far. Safe for threads."""

    _parts: dict[datetime, Ended] = field(default_factory=dict)
    _next: datetime | None = None  # where the next reading continues; None: nothing was read yet
    _stretch: timedelta = timedelta(hours=1)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, session: Session, now: datetime) -> Ended:
        """The last 24 h, to ten minutes. The first reading counts all of it, by statements of an hour or so."""
        with self._lock:
            begins, recent = now - DAY, _part_of(now) - PART
            is_first = self._next is None
            at = max(self._next or begins, begins)
            seen = 0
            while at < recent and (is_first or seen < ROWS):
                end = min(_part_of(at + self._stretch), recent)
                seen += (rows := self._count(session, at, end, now))
                self._stretch = _fitting(self._stretch, rows)
                at = end
            self._count(session, recent, None, now)
            self._next = begins if at >= recent else at
            oldest = _part_of(begins)
            self._parts = {part: counted for part, counted in self._parts.items() if part >= oldest}
            return total(list(self._parts.values()))

    def _count(self, session: Session, begin: datetime, end: datetime | None, now: datetime) -> int:
        found = count(session, begin, end, now)
        replaced = [part for part in self._parts if part >= _part_of(begin) and (end is None or part < end)]
        for part in replaced:
            del self._parts[part]
        self._parts.update(found)
        return sum(each.rows for each in found.values())


def count(session: Session, begin: datetime, end: datetime | None, now: datetime) -> dict[datetime, Ended]:
    """Count what ended from `begin` to before `end` (None: until now), by its ten minutes, in one statement."""
    values = {"begin": begin, "missed_from": now - timedelta(seconds=CALLBACK_PATIENCE_SECONDS)}
    statement, values = (_COUNT_OPEN, values) if end is None else (_COUNT, {**values, "end": end})
    return {_read_part(text): Ended(*counts) for text, *counts in execute(session, statement, values).rows}


def total(parts: Collection[Ended]) -> Ended:
    counted = [each.name for each in fields(Ended) if each.name != "late_seconds"]
    longest = max((each.late_seconds for each in parts), default=0.0)
    return Ended(**{name: sum(getattr(each, name) for each in parts) for name in counted}, late_seconds=longest)


def _fitting(stretch: timedelta, rows: int) -> timedelta:
    """A longer stretch while it holds few rows, a shorter one while it holds many."""
    if rows < STATEMENT_ROWS / 4:
        return min(stretch * 2, DAY)
    return max(stretch / 2, PART) if rows > STATEMENT_ROWS else stretch


def _part_of(moment: datetime) -> datetime:
    return moment.replace(minute=moment.minute // 10 * 10, second=0, microsecond=0)


def _read_part(text: str) -> datetime:
    """`2026-11-28 18:4`, which is how both databases name the ten minutes from 18:40."""
    return datetime.strptime(text + "0", "%Y-%m-%d %H:%M").replace(tzinfo=UTC)


class _part_text(FunctionElement[str]):
    type = Text()
    inherit_cache = True


@compiles(_part_text, "sqlite")
def _part_sqlite(element: _part_text, compiler: Any, **options: Any) -> str:
    return f"substr({compiler.process(element.clauses, **options)}, 1, 15)"


@compiles(_part_text, "postgresql")
def _part_postgresql(element: _part_text, compiler: Any, **options: Any) -> str:
    moment = compiler.process(element.clauses, **options)
    return f"left(to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), 15)"


class _seconds_between(FunctionElement[float]):
    type = Float()
    inherit_cache = True


@compiles(_seconds_between, "sqlite")
def _seconds_sqlite(element: _seconds_between, compiler: Any, **options: Any) -> str:
    before, after = (compiler.process(each, **options) for each in element.clauses)
    return f"(julianday({after}) - julianday({before})) * 86400.0"


@compiles(_seconds_between, "postgresql")
def _seconds_postgresql(element: _seconds_between, compiler: Any, **options: Any) -> str:
    before, after = (compiler.process(each, **options) for each in element.clauses)
    return f"extract(epoch FROM {after} - {before})::float8"


_TASKS = Task.__table__.c  # type: ignore[attr-defined]


def _number(condition: Any) -> Any:
    return func.count(case((condition, 1)))


def _counting() -> Select[Any]:
    """The statement of `count` for all that ended since `begin`."""
    ended, called_back = _TASKS.completed_at, _TASKS.end_called_back_at
    over = or_(*(_TASKS.state == state for state in states.TERMINAL))
    asked = and_(_TASKS.callback_url.is_not(None), over)
    expected = and_(asked, ended < bindparam("missed_from"))
    late = and_(asked, called_back > ended)
    part = _part_text(ended)
    columns: Any = (
        part,
        func.count(),
        _number(_TASKS.archive == ArchiveState.ARCHIVED),
        _number(_TASKS.archive == ArchiveState.INCOMPLETE),
        _number(_TASKS.state == TaskState.FAILED),
        _number(expected),
        _number(and_(expected, called_back.is_(None))),
        _number(late),
        # Both drivers return a float. SQLAlchemy asks for the column's type on PostgreSQL, which a prepared one lacks.
        type_coerce(func.coalesce(func.max(case((late, _seconds_between(ended, called_back)))), 0.0), NullType()),
        _number(or_(_TASKS.archive == ArchiveState.INCOMPLETE, _TASKS.state == TaskState.FAILED)),
    )
    return select(*columns).where(ended >= bindparam("begin")).group_by(part)


_COUNT_OPEN = _counting()
_COUNT = _COUNT_OPEN.where(_TASKS.completed_at < bindparam("end"))
