"""The leases of a worker's rows: renewed while the rows are in hand, released where work cannot begin or settle."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import structlog

from receiver.workers.in_hand import RowsInHand
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows import claims

log = structlog.get_logger()


class Leases:
    """Thread-safe. After a crash the leases run out, and other workers claim the rows."""

    def __init__(self, database: Database, in_hand: RowsInHand, lease_seconds: float) -> None:
        self._database = database
        self._in_hand = in_hand
        self._lease_seconds = lease_seconds
        self._unsettled: list[Any] = []

    def renew(self) -> None:
        """Renew the leases of all rows in hand."""
        by_lease: dict[tuple[Any, uuid.UUID], list[Any]] = {}
        for row in self._in_hand.rows:
            by_lease.setdefault((type(row), row.lease), []).append(row.id)
        with self._database.write() as session:
            for (model, lease), ids in by_lease.items():
                claims.renew(session, model, ids, lease, self._lease_seconds)

    def give_back(self, rows: list[Any]) -> None:
        """Release rows that no thread has begun, so that any worker may claim them at once."""
        if not rows:
            return
        try:
            self._release(rows)
        except DatabaseUnavailable as error:
            log.debug("worker.database_not_reached", job="give_back", error=str(error))
            self.note_unsettled(rows)
        finally:
            self._in_hand.remove(rows)

    def note_unsettled(self, rows: Sequence[Any]) -> None:
        """Keep rows whose work could not reach the database. They are released when it answers."""
        self._unsettled.extend(rows)

    def release_unsettled(self) -> None:
        """Release unsettled rows now that the database answers. They need not wait for the end of their leases."""
        if rows := list(self._unsettled):
            self._release(rows)
            del self._unsettled[: len(rows)]

    def release_all(self) -> int:
        """Release every row that is in hand or unsettled. Returns their number."""
        if rows := self._in_hand.rows + self._unsettled:
            self._release(rows)
        return len(rows)

    def _release(self, rows: Sequence[Any]) -> None:
        with self._database.write() as session:
            for row in rows:
                claims.release(session, row)
            self._database.wake(session)
