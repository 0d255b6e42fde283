"""The looks for due rows of all lanes of one process, in one statement for each wake-up.

The feeder thread of each lane wakes at every commit and twice a second. While each looked for itself, that was most of
the 357 transactions a second of eight idle workers on PostgreSQL. Queued tasks, events without a number and rows in
quarantine are looked for in the same statement, on a connection that is not asked before whether it lives: two
transactions a second of an idle worker, and 15 while they were looked for on their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlmodel import exists, select

from storage.database.prepared import execute_on
from storage.database.sessions import Database
from storage.rows import claims

if TYPE_CHECKING:
    from receiver.workers.lanes import Lane

# Wake-ups come more often while others commit; rows in quarantine are rare.
SUSPECTS_SECONDS = 0.4
# A look for them that is older is made anew.
SUSPECTS_KEPT_SECONDS = 0.75
QUEUED, ALONE = " queued", " alone"


class Looks:
    """Who asks takes its part of a wake-up's look once. Asked again before the next wake-up, it looks for itself.

    `more`: what else is looked for, by name.
    """

    def __init__(self, database: Database, lanes: Sequence[Lane], more: Mapping[str, Any]) -> None:
        self._database = database
        self.lanes = lanes
        self._lock = threading.Lock()
        self._wake_up = 0
        self._found: dict[str, bool] = {}
        self._suspects_at = float("-inf")
        self._suspects = list[bool]()
        self._usual = {lane.name: claims.any_due(lane.model, where=lane.where) for lane in lanes} | dict(more)
        self._usual |= {lane.name + QUEUED: lane.slots.first_queued() for lane in lanes if lane.slots is not None}
        self._alone = {lane.name + ALONE: claims.any_due(lane.model, where=lane.where, alone=True) for lane in lanes}
        self._statements = [_all_of(asked) for asked in (self._usual, self._usual | self._alone)]

    def is_any(self, name: str, wake_up: int | None) -> bool:
        """`name`: of a lane, or of what else is looked for. `wake_up`: which one, counted from 1; None: look now."""
        with self._lock:
            self._look_once(wake_up)
            is_due = None if wake_up is None else self._found.pop(name, None)
        if is_due is None:
            with self._database.autocommit_reader() as connection:
                return connection.execute(self._usual[name]).first() is not None
        return is_due

    def _look_once(self, wake_up: int | None) -> None:
        if wake_up is not None and wake_up > self._wake_up:
            self._look()
            self._wake_up = wake_up

    def _look(self) -> None:
        now = time.monotonic()
        with_suspects = now - self._suspects_at > SUSPECTS_SECONDS
        with self._database.look() as connection:
            found = [bool(each) for each in execute_on(connection, self._statements[with_suspects]).rows[0]]
        self._found = dict(zip(self._usual, found, strict=False))
        if with_suspects:
            self._suspects, self._suspects_at = found[len(self._usual) :], now

    def suspects(self, wake_up: int | None = None) -> list[Lane]:
        """The lanes with a row in quarantine, by a look that was made just now, or is that of this wake-up."""
        with self._lock:
            self._look_once(wake_up)
            found, self._suspects = self._suspects, []
            if time.monotonic() - self._suspects_at > SUSPECTS_KEPT_SECONDS:
                found = []
        if not found:
            with self._database.autocommit_reader() as connection:
                found = list(connection.execute(select(*map(exists, self._alone.values()))).one())
        return [lane for lane, is_due in zip(self.lanes, found, strict=True) if is_due]


def _all_of(asked: Mapping[str, Any]) -> Any:
    return select(*(exists(each).label(f"found_{place}") for place, each in enumerate(asked.values())))
