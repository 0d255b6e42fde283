"""Rate limit of reads per account across all processes: a row per account holds when the next read may start.

read_limit.wait(account) ─▶ row locked ─▶ next_free_at = max(now, next_free_at) + 0.2 s ─▶ committed ─▶ sleep until then
                                 └── too far ahead: the row is not changed, `TooManyReads(after)`
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta

from sqlmodel import Session, select

from storage.database.clock import db_now
from storage.database.sessions import Database, insert_or_ignore
from storage.errors import Retry
from storage.rows.models import ProviderRate

# Kling does not publish its limit (DESIGN §6). No read has been refused at this rate.
READS_PER_SECOND = 5.0
# The longest that a worker thread sleeps. For a longer wait the row becomes due later and the thread is free.
PATIENCE_SECONDS = 5.0


class TooManyReads(Retry):
    """The next free moment is too far ahead, in `after` seconds. No read was made."""


class ReadRateLimit:
    """At most `per_second` reads of an account, over all processes. Thread-safe.

    `patience_seconds`: the longest wait of a caller.
    """

    def __init__(
        self, database: Database, *, per_second: float = READS_PER_SECOND, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._database = database
        self._interval = timedelta(seconds=1 / per_second)
        self._patience_seconds = patience_seconds

    def wait(self, account: str) -> None:
        """Reserve the account's next free moment and sleep until then.

        No lock is held while sleeping. A process that dies wastes the one moment it reserved. Raises `TooManyReads`
        when the moment is too far ahead, and `DatabaseUnavailable`.
        """
        with self._database.write() as session:
            seconds = self.reserve(session, account)
        if seconds > self._patience_seconds:
            raise TooManyReads("the account's rate limit of reads is exhausted", after=seconds)
        if seconds > 0:
            time.sleep(seconds)

    def reserve(self, session: Session, account: str, *, unless_by: datetime | None = None) -> float:
        """Seconds until the next free moment, in the caller's transaction.

        It is reserved unless it is more than the patience ahead, or a read is planned by then (`unless_by`).
        """
        row = self._lock(session, account)
        now = session.execute(select(db_now())).scalar_one()
        # A moment further ahead was reserved while the clock was wrong. Waiting for it would stop all reads until then.
        furthest = now + timedelta(seconds=self._patience_seconds) + self._interval
        start = max(row.next_free_at, now) if row.next_free_at <= furthest else now
        seconds: float = (start - now).total_seconds()
        if seconds <= self._patience_seconds and not (unless_by and unless_by <= start):
            row.next_free_at = start + self._interval
        return seconds

    def _lock(self, session: Session, account: str) -> ProviderRate:
        statement = select(ProviderRate).where(ProviderRate.account == account).with_for_update()
        row = session.exec(statement).one_or_none()
        if row is None:
            insert_or_ignore(session, ProviderRate, {"account": account, "next_free_at": db_now()})
            row = session.exec(statement).one()
        return row
