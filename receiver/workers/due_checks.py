"""Checks whether rows are due, for all lanes of one process, in one statement for each wake-up.

The feeder thread of each lane wakes at every commit and twice a second. When each checked its own lane, these checks
were most of the 357 transactions a second of eight idle workers on PostgreSQL. The same statement finds queued tasks,
events without a number and rows in quarantine, on a connection that is not tested first. An idle worker has two
transactions a second, and had 15 with a statement for each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection
from sqlmodel import exists, select

from storage.database.prepared import execute
from storage.database.sessions import Database
from storage.rows import claims

if TYPE_CHECKING:
    from receiver.workers.lanes import Lane

# Seconds between two checks for rows in quarantine. They are rare, and wake-ups are frequent while others commit.
QUARANTINE_CHECK_SECONDS = 0.4
# An older result is not used.
QUARANTINE_CHECK_VALID_SECONDS = 0.75
STATEMENTS = 64  # kept; a process with one set of lanes has two
QUEUED, ALONE = " queued", " alone"


@lru_cache(maxsize=STATEMENTS)
def _any_of(*asked: Any) -> Any:
    """Whether each of these statements finds a row. It is compiled once for all workers of a process."""
    return select(*map(exists, asked))


class DueChecks:
    """Each caller gets its part of a wake-up's result once. A second call for the same wake-up runs its own query.

    `more`: other statements to check, by name.
    """

    def __init__(self, database: Database, lanes: Sequence[Lane], more: Mapping[str, Any]) -> None:
        self._database = database
        self.lanes = lanes
        self._lock = threading.Lock()
        self._wake_up = 0
        self._found: dict[str, bool] = {}
        self._quarantine_checked_at = float("-inf")
        self._quarantined = list[bool]()
        self._usual = {lane.name: claims.any_due(lane.model, where=lane.where) for lane in lanes} | dict(more)
        self._usual |= {lane.name + QUEUED: lane.slots.first_queued() for lane in lanes if lane.slots is not None}
        self._alone = {lane.name + ALONE: claims.any_due(lane.model, where=lane.where, alone=True) for lane in lanes}
        self._statements = [_any_of(*asked.values()) for asked in (self._usual, self._usual | self._alone)]

    def is_any(self, name: str, wake_up: int) -> bool:
        """`name`: of a lane or of one of `more`. `wake_up`: its number, from 1."""
        with self._lock:
            self._check_once(wake_up)
            is_due = self._found.pop(name, None)
        if is_due is None:
            with self._database.autocommit_reader() as connection:
                return connection.execute(self._usual[name]).first() is not None
        return is_due

    def check(self, wake_up: int) -> None:
        """Make this wake-up's check now, on a connection that is tested first, for a caller that does not retry."""
        with self._lock:
            self._check(self._database.autocommit_reader, wake_up)

    def due(self, wake_up: int) -> set[str]:
        """The lanes and jobs that have rows by this wake-up's check. Each still gets its part by `is_any`."""
        with self._lock:
            self._check_once(wake_up)
            return {name.removesuffix(QUEUED) for name, is_due in self._found.items() if is_due}

    def _check_once(self, wake_up: int | None) -> None:
        if wake_up is not None and wake_up > self._wake_up:
            self._check(self._database.untested_reader, wake_up)

    def _check(self, reader: Callable[[], AbstractContextManager[Connection]], wake_up: int) -> None:
        now = time.monotonic()
        with_quarantine = now - self._quarantine_checked_at > QUARANTINE_CHECK_SECONDS
        with reader() as connection:
            (row,) = execute(connection, self._statements[with_quarantine]).rows
        found = list(map(bool, row))
        self._found, self._wake_up = dict(zip(self._usual, found, strict=False)), wake_up
        if with_quarantine:
            self._quarantined, self._quarantine_checked_at = found[len(self._usual) :], now

    def quarantined_lanes(self, wake_up: int | None = None) -> list[Lane]:
        """The lanes with a row in quarantine, by the check of this wake-up or of QUARANTINE_CHECK_VALID_SECONDS ago."""
        with self._lock:
            self._check_once(wake_up)
            found, self._quarantined = self._quarantined, []
            if time.monotonic() - self._quarantine_checked_at > QUARANTINE_CHECK_VALID_SECONDS:
                found = []
        if not found:
            with self._database.autocommit_reader() as connection:
                found = list(connection.execute(select(*map(exists, self._alone.values()))).one())
        return [lane for lane, is_due in zip(self.lanes, found, strict=True) if is_due]
