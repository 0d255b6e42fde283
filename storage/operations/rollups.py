"""The figures of a day or a month: counted by the hour and held in memory, so that a page never reads a month of rows.

A past hour changes little. A request reads it again after `STALE_SECONDS`. The current and the last hour are read at
most twice a minute. A background thread reads a month, from its newest hour on.

Callbacks are counted once, as they arrived: those that were deleted since are counted too. With 144,000 in an hour
their count takes 0.11 s of CPU on SQLite, and beside 3,000 a second an hour has ten million.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Select, bindparam, case, func, select
from sqlmodel import Session

from storage.database.prepared import execute
from storage.database.sessions import Database
from storage.operations import ended
from storage.operations.kept_results import KeptResults
from storage.rows import tasks
from storage.rows.deleted_callbacks import begin_of_span, count_deleted
from storage.rows.models import Asset, Callback, Task
from storage.states import AssetState, TaskState

HOUR = timedelta(hours=1)
MONTH_HOURS = 30 * 24
FRESH_SECONDS = 30.0
STALE_SECONDS = 3_600.0
# A month, and a day more for hours that it has left behind. With a million tasks an hour takes 10 to 30 ms to read.
KEPT_HOURS = MONTH_HOURS + 24
# A callback may be committed some seconds after its time of arrival. One whose commit takes longer, beside a disk that
# stalls, is missing until its hour is counted again: once, an hour after its end. An hour with more than RECOUNTED
# callbacks, 0.4 s of CPU, is not; there it is missing until the next start.
LATE = timedelta(seconds=15)
SETTLED = timedelta(hours=2)
RECOUNTED = 500_000
# Durations that are read of an hour; more give the same median.
SAMPLED = 500
# Durations that are kept of an hour, evenly spaced by rank. A month has at most 43,200, whose ranks take 10 ms.
KEPT = 60


@dataclass(frozen=True)
class Hour:
    """`seconds`: from a task's last callback to its last object, a sample. `expected`: callbacks asked for.

    `priced`: of the `succeeded` tasks, those whose units are known: signed deliveries and reads report them.
    """

    callbacks: int = 0
    pictures: int = 0
    bytes: int = 0
    failures: int = 0
    expected: int = 0
    lost: int = 0
    units: float = 0.0
    succeeded: int = 0
    priced: int = 0
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Span:
    """Some hours together. `series`: one value an hour or a day for each chart. `median`, `p95`: of a bounded sample,
    None without any. `whole`: every hour has been read.
    """

    total: Hour
    series: dict[str, list[float]]
    begins: datetime
    whole: bool
    median: float | None
    p95: float | None


class Arrivals:
    """Counts the callbacks that arrived in an hour, each once: a later count adds those that arrived since. For one
    thread.
    """

    def __init__(self) -> None:
        # Until when they were counted, how many, and when.
        self._counted: OrderedDict[datetime, tuple[datetime, int, datetime]] = OrderedDict()
        self._now = datetime.min.replace(tzinfo=UTC)

    def count(self, session: Session, hour: datetime) -> int:
        """All callbacks of the hour. Those of the last 15 to 25 s are counted again next time."""
        before, self._now = self._now, tasks.now(session)
        if self._now < before:
            self._counted.clear()  # the clock was set back: callbacks may arrive in counted times
        since, count, counted_at = self._counted.pop(hour, (hour, 0, self._now))
        if counted_at < hour + SETTLED <= self._now and count <= RECOUNTED:
            since, count = hour, 0
        until = max(since, min(hour + HOUR, begin_of_span(self._now - LATE)))
        count += _came(session, since, until)
        self._counted[hour] = until, count, self._now
        if len(self._counted) > KEPT_HOURS:
            self._counted.popitem(last=False)
        return count + _came(session, until, hour + HOUR)


class Rollups:
    """The hours that were read so far."""

    def __init__(self, database: Database) -> None:
        read = partial(read_hour, arrivals=Arrivals())
        self._hours = KeptResults[datetime, Hour](database, read, KEPT_HOURS, _fresh_seconds)
        self.close = self._hours.close

    def span(self, hours: int) -> Span:
        """The last hours up to now: 24 in hours, more in days."""
        current = _current_hour()
        wanted = [current - HOUR * back for back in range(hours)]
        known = self._hours.of(wanted)
        found = [known.get(hour, Hour()) for hour in reversed(wanted)]
        step = 1 if hours <= 24 else 24
        parts = [_sum(found[start : start + step]) for start in range(0, len(found), step)]
        total = _sum(found)
        median, p95 = _rank(total.seconds, 0.5), _rank(total.seconds, 0.95)
        return Span(total, _series(parts), wanted[-1], len(known) == hours, median, p95)


def _current_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def _fresh_seconds(hour: datetime) -> float:
    return FRESH_SECONDS if hour >= _current_hour() - HOUR else STALE_SECONDS


_TASKS = Task.__table__.c  # type: ignore[attr-defined]
_ASSETS = Asset.__table__.c  # type: ignore[attr-defined]
_CALLBACKS = Callback.__table__.c  # type: ignore[attr-defined]
_WITHIN = (_TASKS.completed_at >= bindparam("begin"), _TASKS.completed_at < bindparam("end"))
_CAME: Select[Any] = select(func.count()).where(
    _CALLBACKS.received_at >= bindparam("begin"), _CALLBACKS.received_at < bindparam("end"), _CALLBACKS.source == "push"
)
_KEPT: Any = (
    select(func.count(), func.coalesce(func.sum(_ASSETS.size), 0))
    .select_from(Asset.__table__.join(Task.__table__, _TASKS.id == _ASSETS.task_id))  # type: ignore[attr-defined]
    .where(*_WITHIN, _ASSETS.state == AssetState.ARCHIVED)
)
_WELL = func.count(case((_TASKS.state != TaskState.FAILED, 1)))
_UNITS = select(_TASKS.units, func.count().label("tasks"), _WELL).where(*_WITHIN, _TASKS.units.is_not(None))
_UNITS = _UNITS.group_by(_TASKS.units).limit(SAMPLED)
_TIMES = select(_TASKS.archived_at, _TASKS.end_called_back_at).where(*_WITHIN)
_TIMES = _TIMES.where(_TASKS.archived_at.is_not(None), _TASKS.end_called_back_at.is_not(None)).limit(SAMPLED)


def _came(session: Session, begin: datetime, end: datetime) -> int:
    """How many callbacks arrived, those included that were deleted since."""
    if begin >= end:
        return 0
    [(count,)] = execute(session, _CAME, {"begin": begin, "end": end}).rows
    return int(count) + count_deleted(session, begin, end)


def read_hour(session: Session, hour: datetime, arrivals: Arrivals | None = None) -> Hour:
    """Count what ended and arrived in one hour, by the indexes of those times.

    The statements are built once: an hour without tasks takes 0.25 ms of CPU, and took 4. A month has 720.
    """
    within = {"begin": hour, "end": hour + HOUR}
    # First, because its time must not be later than the snapshot, which the first statement takes.
    callbacks = (arrivals or Arrivals()).count(session, hour)
    ends = ended.total(ended.count(session, hour, hour + HOUR, datetime.now(UTC)).values())
    units, priced = _units(session, within)
    [(pictures, size)] = execute(session, _KEPT, within).rows
    return Hour(
        callbacks,
        pictures,
        int(size),
        ends.failures,
        ends.callbacks_expected,
        ends.callbacks_lost,
        units,
        ends.rows - ends.failed,
        priced,
        _seconds(session, within),
    )


def _units(session: Session, within: Mapping[str, datetime]) -> tuple[float, int]:
    """Their sum, and how many tasks that succeeded have them. The provider reports text, with few different values."""
    total, priced = 0.0, 0
    for units, count, well in execute(session, _UNITS, within).rows:
        try:
            number = float(units)
        except ValueError:
            continue
        if math.isfinite(number) and number >= 0:
            total, priced = total + number * count, priced + well
    return total, priced


def _seconds(session: Session, within: Mapping[str, datetime]) -> tuple[float, ...]:
    gaps = ((archived - told).total_seconds() for archived, told in execute(session, _TIMES, within).rows)
    ordered = sorted(gap for gap in gaps if gap >= 0)
    step = max(1.0, len(ordered) / KEPT)
    return tuple(ordered[int((place + 0.5) * step)] for place in range(round(len(ordered) / step)))


def _sum(hours: Sequence[Hour]) -> Hour:
    seconds = tuple(sorted(each for hour in hours for each in hour.seconds))
    counted = ("callbacks", "pictures", "bytes", "failures", "expected", "lost", "units", "succeeded", "priced")
    return Hour(**{name: sum(getattr(hour, name) for hour in hours) for name in counted}, seconds=seconds)


def _series(parts: Sequence[Hour]) -> dict[str, list[float]]:
    named = ("callbacks", "pictures", "bytes", "failures", "units")
    counted = {name: [float(getattr(part, name)) for part in parts] for name in named}
    counted["lost"] = [part.lost / part.expected if part.expected else 0.0 for part in parts]
    ranks = {"median": 0.5, "p95": 0.95}
    return counted | {name: [_rank(part.seconds, share) or 0.0 for part in parts] for name, share in ranks.items()}


def _rank(values: Sequence[float], share: float) -> float | None:
    """Of sorted values."""
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else None
