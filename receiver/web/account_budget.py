"""How much is kept of deliveries at the account's URL that match no task: whoever knows it may send any number."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from anyio import CapacityLimiter, to_thread
from sqlalchemy import func, literal_column
from sqlmodel import Session, col, select

from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows.models import Callback
from storage.states import CallbackState

# A console's own tests, and tasks that are made elsewhere, bring some a day; `receiver prune` makes room.
MAX_ROWS, MAX_BYTES = 10_000, 64 * 2**20
# The rows are counted so often at most; what is stored in between is added up here.
COUNT_SECONDS = 10.0


class Strangers:
    """Rows and bytes that match no task, as of some seconds ago. Used in one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows = self._bytes = 0
        self._counted_at = float("-inf")
        self._counting = asyncio.Lock()
        self._thread = CapacityLimiter(1)

    async def have_room(self) -> bool:
        """Whether another delivery may be stored. Where the rows cannot be counted, storing it tells."""
        async with self._counting:
            if time.monotonic() >= self._counted_at + COUNT_SECONDS:
                try:
                    self._rows, self._bytes = await to_thread.run_sync(self._count, limiter=self._thread)
                except DatabaseUnavailable:
                    return True
                self._counted_at = time.monotonic()
        return self._rows < MAX_ROWS and self._bytes < MAX_BYTES

    def add(self, size: int) -> None:
        """Another one of so many bytes was stored; it may yet match a task."""
        self._rows += 1
        self._bytes += size

    def _count(self) -> tuple[int, int]:
        with self._database.read() as session:
            return count(session)


def count(session: Session) -> tuple[int, int]:
    """Rows of deliveries that name no task by their token and have matched none, and the bytes of their bodies."""
    applied: Any = literal_column(f"'{CallbackState.APPLIED}'")  # a literal, as the partial index says it
    mine = (col(Callback.task_id).is_(None), col(Callback.state) != applied)
    rows, size = session.exec(select(func.count(), func.sum(func.length(Callback.body))).where(*mine)).one()
    return rows, int(size or 0)
