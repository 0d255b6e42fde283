"""Makes rows due that wait longer than any step of the program lets them wait.

Such a row was written while the clock was ahead, before it was set back: a file in backoff would wait until the clock
reaches that time again. SQLite's clock is the host's. On PostgreSQL it is the server's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import and_, or_
from sqlmodel import col, select

from receiver.base import retry_schedule
from storage.archive import unusable
from storage.database.clock import db_now_once
from storage.database.sessions import Database
from storage.http_date import MAX_RETRY_AFTER_SECONDS
from storage.rows import claims
from storage.rows.models import Asset, Callback, Dispatch, Task

log = structlog.get_logger()

# A `Retry-After` and the backoff of a failed step end after an hour. All other waits without a schedule are shorter.
USUAL_SECONDS = MAX_RETRY_AFTER_SECONDS
# For the time between the computation of a due time and this check.
MARGIN_SECONDS = 60.0
# Rows per transaction.
BATCH = 1_000


@dataclass(frozen=True)
class Longest:
    """How far ahead rows of a table may be due. `by_tries`: the exceptions, by the number in the column `tries`."""

    model: Any
    seconds: float
    tries: Any = None
    by_tries: Mapping[int, float] = field(default_factory=dict)

    def is_exceeded(self) -> Any:
        """The condition that a row is due later than that. Most rows fail the first comparison, which has an index."""
        due_at, longer = col(self.model.due_at), {n: each for n, each in self.by_tries.items() if each > self.seconds}
        is_far = due_at > db_now_once(self.seconds + MARGIN_SECONDS)
        if not longer:
            return is_far
        last = max(longer)
        matches = {n: self.tries >= n if n == last else self.tries == n for n in longer}
        exceptions = [and_(matches[n], due_at > db_now_once(longer[n] + MARGIN_SECONDS)) for n in longer]
        return and_(is_far, or_(and_(*(~match for match in matches.values())), *exceptions))


def longest(*, lease_seconds: float, poll_seconds: float, event_retry_seconds: Sequence[float]) -> Sequence[Longest]:
    """The longest waits by table. `poll_seconds`: between two reads of a task, without jitter."""
    usual = max(USUAL_SECONDS, lease_seconds)
    polls = poll_seconds * 1.2  # `Schedule.poll_delay`
    files = {n: seconds * (1 + unusable.JITTER) for n, seconds in enumerate(unusable.DELAYS_SECONDS, 1)}
    events = {n: seconds * (1 + retry_schedule.JITTER) for n, seconds in enumerate(event_retry_seconds, 1)}
    return (
        Longest(Task, max(usual, polls)),
        Longest(Callback, usual),
        Longest(Asset, usual, col(Asset.unusable_tries), files),
        Longest(Dispatch, usual, col(Dispatch.tries), events),
    )


def mend(database: Database, waits: Sequence[Longest], lease_seconds: float) -> int:
    """Make the rows due that wait longer than these. Returns how many there were.

    A claimed row gets a lease from now on: its worker renews it, or is dead.
    """
    found = sum(_mend(database, each, lease_seconds) for each in waits)
    if found:
        log.warning("clock.due_times_corrected", rows=found)
    return found


def _mend(database: Database, wait: Longest, lease_seconds: float) -> int:
    """Without such a row it is one read."""
    found, count, changed = select(wait.model.id).where(wait.is_exceeded()), 0, BATCH
    while changed == BATCH:
        with database.autocommit_reader() as connection:
            if connection.execute(found.limit(1)).first() is None:
                break
        with database.write() as session:
            ids = found.limit(BATCH).with_for_update(skip_locked=True)
            changed = claims.hasten_far(session, wait.model, ids, lease_seconds)
            database.wake(session)
        count += changed
    return count
