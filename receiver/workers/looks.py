"""The looks for due rows of all lanes of one process, in one statement for each wake-up.

The feeder thread of each lane wakes at every commit and twice a second. While each looked for itself, that was most of
the 357 transactions a second of eight idle workers on PostgreSQL.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from storage.database.sessions import Database
from storage.rows import claims

if TYPE_CHECKING:
    from receiver.workers.worker import Lane


class Looks:
    """A lane takes its part of a wake-up's look once. If it asks again before the next wake-up, it looks for itself."""

    def __init__(self, database: Database, lanes: Sequence[Lane]) -> None:
        self._database = database
        self.lanes = lanes
        self._lock = threading.Lock()
        self._wake_up = 0
        self._found: dict[str, bool] = {}

    def is_any_due(self, lane: Lane, wake_up: int | None) -> bool:
        """`wake_up`: which one the lane follows, counted from 1; None: look now."""
        with self._lock:
            if wake_up is not None and wake_up > self._wake_up:
                self._found = {each.name: found for each, found in zip(self.lanes, self.look(), strict=True)}
                self._wake_up = wake_up
            is_due = None if wake_up is None else self._found.pop(lane.name, None)
        if is_due is None:
            with self._database.autocommit_reader() as connection:
                is_due = claims.is_any_due(connection, lane.model, where=lane.where)
        if is_due or lane.slots is None:
            return is_due
        with self._database.read() as session:
            return lane.slots.is_any_next(session)

    def look(self, *, alone: bool = False) -> list[bool]:
        asked = [(lane.model, lane.where) for lane in self.lanes]
        with self._database.autocommit_reader() as connection:
            return claims.which_are_due(connection, asked, alone=alone)
