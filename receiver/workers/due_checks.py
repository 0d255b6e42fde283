"""Checks whether rows are due, for all lanes of one process, in one statement for each wake-up.

The feeder thread of each lane wakes at every commit and twice a second. When each checked its own lane, these checks
were most of the 357 transactions a second of eight idle workers on PostgreSQL. The same statement finds queued tasks,
events without a number and rows in quarantine, on a connection that is not tested first. An idle worker has two
transactions a second, and had 15 with a statement for each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlmodel import exists, select

from storage.database.prepared import execute
from storage.database.sessions import Database
from storage.rows import claims

if TYPE_CHECKING:
    from receiver.workers.lanes import Lane

# Seconds between two checks for rows in quarantine. They are rare, and wake-ups are frequent while others commit.
QUARANTINE_CHECK_SECONDS = 0.4
STATEMENTS = 64  # kept; a process with one set of lanes has two
QUEUED, ALONE = " queued", " alone"


@lru_cache(maxsize=STATEMENTS)
def _any_of(*asked: Any) -> Any:
    """Whether each of these statements finds a row. It is compiled once for all workers of a process."""
    return select(*map(exists, asked))


class DueChecks:
    """Each caller takes its part of the last check once. If it asks again before the next check, it makes that check.

    `more`: other statements to check, by name.
    """

    def __init__(self, database: Database, lanes: Sequence[Lane], more: Mapping[str, Any]) -> None:
        self._database = database
        self.lanes = lanes
        self._lock = threading.RLock()  # held during a check, so that no older result replaces a newer one
        self._found: dict[str, bool] = {}
        self._quarantine_checked_at = float("-inf")
        usual = {lane.name: claims.any_due(lane.model, where=lane.where) for lane in lanes} | dict(more)
        usual |= {lane.name + QUEUED: lane.slots.first_queued() for lane in lanes if lane.slots is not None}
        alone = {lane.name + ALONE: claims.any_due(lane.model, where=lane.where, alone=True) for lane in lanes}
        self._usual, self._alone = list(usual), list(alone)
        self._statements = [_any_of(*asked.values()) for asked in (usual, usual | alone)]

    def check(self) -> set[str]:
        """Check now. Returns the lanes and jobs that have rows. Each still takes its part by `is_any`."""
        with self._lock:
            now = time.monotonic()
            with_quarantine = now - self._quarantine_checked_at > QUARANTINE_CHECK_SECONDS
            with self._database.autocommit_reader() as connection:
                (row,) = execute(connection, self._statements[with_quarantine]).rows
            self._found.update(zip([*self._usual, *self._alone], row, strict=False))
            if with_quarantine:
                self._quarantine_checked_at = now
            return {name.removesuffix(QUEUED) for name in self._usual if self._found[name]}

    def is_any(self, name: str) -> bool:
        """`name`: of a lane or of one of `more`."""
        with self._lock:
            if name not in self._found:
                self.check()
            return self._found.pop(name)

    def quarantined_lanes(self) -> list[Lane]:
        """The lanes with a row in quarantine."""
        with self._lock:
            if not all(name in self._found for name in self._alone):
                self._quarantine_checked_at = float("-inf")
                self.check()
            return [lane for lane, name in zip(self.lanes, self._alone, strict=True) if self._found.pop(name)]
