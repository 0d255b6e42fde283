"""How often an account is read, by all processes together: a row per account says when the next read may start.

read_limit.wait(account) ─▶ row locked ─▶ next_free_at = max(now, next_free_at) + 0.2 s ─▶ committed ─▶ sleep until then
                                 └── farther ahead than we wait: nothing is taken, `TooManyReads(after)`
"""

from __future__ import annotations

import time
from datetime import timedelta

from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, select

from storage.errors import Retry
from storage.rows.database import Database, db_now
from storage.rows.models import ProviderRate

# DESIGN §6: Kling's own limit is not published; nobody was ever refused at this pace.
READS_PER_SECOND = 5.0
# A thread that waits does nothing else; beyond this the row comes back later and the thread is free.
PATIENCE_SECONDS = 5.0


class TooManyReads(Retry):
    """The account's next free moment is too far ahead; `after` says how far. Nothing was asked."""


class ReadRateLimit:
    """At most `per_second` reads of an account, whichever process they come from. Safe to share between threads.

    `patience_seconds`: how long a caller is kept waiting at most.
    """

    def __init__(
        self, database: Database, *, per_second: float = READS_PER_SECOND, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._database = database
        self._interval = timedelta(seconds=1 / per_second)
        self._patience_seconds = patience_seconds

    def wait(self, account: str) -> None:
        """Take the account's next free moment and sleep until it has come.

        Nothing is held while sleeping; a moment taken by a process that dies is lost, no more. Raises `TooManyReads`
        when that moment lies too far ahead, and `DatabaseUnavailable`.
        """
        with self._database.write() as session:
            seconds = self._take(session, account)
        if seconds > self._patience_seconds:
            raise TooManyReads("more reads are due than the account may be asked for", after=seconds)
        if seconds > 0:
            time.sleep(seconds)

    def _take(self, session: Session, account: str) -> float:
        """Seconds until the next free moment, which is taken unless it lies too far ahead."""
        row = self._lock(session, account)
        now = session.execute(select(db_now())).scalar_one()
        start = max(row.next_free_at, now)
        seconds: float = (start - now).total_seconds()
        if seconds <= self._patience_seconds:
            row.next_free_at = start + self._interval
        return seconds

    def _lock(self, session: Session, account: str) -> ProviderRate:
        statement = select(ProviderRate).where(ProviderRate.account == account).with_for_update()
        row = session.exec(statement).one_or_none()
        if row is None:
            dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
            first = dialect.insert(ProviderRate).values(account=account, next_free_at=db_now()).on_conflict_do_nothing()
            session.execute(first)
            row = session.exec(statement).one()
        return row
