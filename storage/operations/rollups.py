"""The figures of a day or a month: counted by the hour and held in memory, so that a page never reads a month of rows.

A past hour changes little. It is read again at a request after `STALE_SECONDS`. The current and the last hour are read
at most twice a minute. A background thread reads a month, from its newest hour on.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import func
from sqlmodel import Session, col, select

from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.operations import ended
from storage.rows.models import Asset, Callback, Task
from storage.states import AssetState

log = structlog.get_logger()

HOUR = timedelta(hours=1)
MONTH_HOURS = 30 * 24
FRESH_SECONDS = 30.0
STALE_SECONDS = 3_600.0
# Durations of an hour that are read; more give the same median.
SAMPLED = 500
# Durations of an hour that stay in memory, evenly spaced by rank. A month has at most 43,200, whose ranks take 10 ms.
KEPT = 60
# How long a page reads hours itself, the newest first; the background thread reads the rest. Beside a million tasks an
# hour takes 10 to 30 ms.
AT_ONCE_SECONDS = 0.1
CLOSE_SECONDS = 2.0
# The pause between two hours. A month takes some 20 s, and pages requested meanwhile are hardly slower.
REST_SECONDS = 0.02


@dataclass(frozen=True)
class Hour:
    """`seconds`: from a task's last callback to its last object, a sample. `expected`: callbacks asked for."""

    callbacks: int = 0
    pictures: int = 0
    bytes: int = 0
    failures: int = 0
    expected: int = 0
    lost: int = 0
    units: float = 0.0
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


@dataclass
class Rollups:
    """The hours that were read so far."""

    database: Database
    _hours: dict[datetime, tuple[float, Hour]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None
    _closing: threading.Event = field(default_factory=threading.Event)

    def span(self, hours: int) -> Span:
        """The last hours up to now: 24 in hours, more in days."""
        current = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        wanted = [current - HOUR * back for back in range(hours)]
        left = [hour for hour in wanted if self._is_old(hour, current)]
        ends = time.monotonic() + AT_ONCE_SECONDS
        while left and time.monotonic() < ends:
            self._read([left.pop(0)])
        if left:
            self._fill_beside(left, current)
        found = [self._hours.get(hour, (0.0, Hour()))[1] for hour in reversed(wanted)]
        step = 1 if hours <= 24 else 24
        parts = [_sum(found[start : start + step]) for start in range(0, len(found), step)]
        whole = all(hour in self._hours for hour in wanted)
        total = _sum(found)
        return Span(total, _series(parts), wanted[-1], whole, _rank(total.seconds, 0.5), _rank(total.seconds, 0.95))

    def _is_old(self, hour: datetime, current: datetime) -> bool:
        age = time.monotonic() - self._hours[hour][0] if hour in self._hours else math.inf
        return age > (FRESH_SECONDS if hour >= current - HOUR else STALE_SECONDS)

    def _read(self, hours: Sequence[datetime]) -> None:
        with self._lock:
            for hour in hours:
                with self.database.read() as session:
                    self._hours[hour] = (time.monotonic(), read_hour(session, hour))

    def _fill_beside(self, hours: Sequence[datetime], current: datetime) -> None:
        with self._lock:
            if self._closing.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._fill, args=(hours, current), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Read no further hour. Waits for the one in progress, which takes milliseconds."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _fill(self, hours: Sequence[datetime], current: datetime) -> None:
        try:
            for hour in hours:
                if self._is_old(hour, current):
                    self._read([hour])
                    if self._closing.wait(REST_SECONDS):
                        return
            oldest = current - HOUR * (MONTH_HOURS + 24)
            for hour in [each for each in list(self._hours) if each < oldest]:
                self._hours.pop(hour, None)
        except DatabaseUnavailable as error:
            log.info("rollups.paused", error=str(error))


def read_hour(session: Session, hour: datetime) -> Hour:
    """Count what ended and arrived in one hour, by the indexes of those times."""
    within = (col(Task.completed_at) >= hour, col(Task.completed_at) < hour + HOUR)
    came = (col(Callback.received_at) >= hour, col(Callback.received_at) < hour + HOUR, Callback.source == "push")
    callbacks = session.execute(select(func.count()).select_from(Callback).where(*came)).scalar_one()
    ends = ended.total(ended.count(session, hour, hour + HOUR, datetime.now(UTC)).values())
    kept = select(func.count(), func.coalesce(func.sum(Asset.size), 0)).select_from(Asset)
    kept = kept.join(Task, col(Task.id) == col(Asset.task_id)).where(*within, Asset.state == AssetState.ARCHIVED)
    pictures, size = session.execute(kept).one()
    return Hour(
        callbacks,
        pictures,
        int(size),
        ends.failures,
        ends.callbacks_expected,
        ends.callbacks_lost,
        _units(session, within),
        _seconds(session, within),
    )


def _units(session: Session, within: Sequence[object]) -> float:
    """The provider reports units as text, with few different values."""
    found = select(Task.units, func.count()).where(*within, col(Task.units).is_not(None)).group_by(Task.units)  # type: ignore[arg-type]
    total = 0.0
    for units, count in session.execute(found.limit(SAMPLED)):
        try:
            number = float(units)
        except ValueError:
            continue
        total += number * count if math.isfinite(number) and number >= 0 else 0.0
    return total


def _seconds(session: Session, within: Sequence[object]) -> tuple[float, ...]:
    both = (col(Task.archived_at).is_not(None), col(Task.end_called_back_at).is_not(None))
    found = select(Task.archived_at, Task.end_called_back_at).where(*within, *both).limit(SAMPLED)  # type: ignore[arg-type]
    gaps = ((archived - told).total_seconds() for archived, told in session.execute(found))
    ordered = sorted(gap for gap in gaps if gap >= 0)
    step = max(1.0, len(ordered) / KEPT)
    return tuple(ordered[int((place + 0.5) * step)] for place in range(round(len(ordered) / step)))


def _sum(hours: Sequence[Hour]) -> Hour:
    seconds = tuple(sorted(each for hour in hours for each in hour.seconds))
    counted = ("callbacks", "pictures", "bytes", "failures", "expected", "lost", "units")
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
