"""Deletes callbacks and counts the deleted ones by the time of their arrival, in the same transaction.

So the number of callbacks that arrived in a time is the rows that are left and these counts, in every process and after
each restart. One row of `counter` stands for ten seconds with deleted callbacks; those of the last month are kept.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, delete, func, select
from sqlmodel import Session

from storage.database.prepared import execute
from storage.database.sessions import INSERTS, run
from storage.rows.models import Callback, Counter

# The overview shows 30 days.
KEPT = timedelta(days=32)
# Counts begin at such times. Beside 3,000 arrivals a second they read 75,000 rows again; with whole minutes 225,000.
SPAN_SECONDS = 10
_NAME = "callbacks deleted "
_COUNTERS = Counter.__table__.c  # type: ignore[attr-defined]
_CALLBACKS = Callback.__table__.c  # type: ignore[attr-defined]
_GONE = delete(Callback.__table__).returning(_CALLBACKS.received_at, _CALLBACKS.source)  # type: ignore[attr-defined]
_INSERTS = {name: insert(Counter.__table__) for name, insert in INSERTS.items()}  # type: ignore[attr-defined]
_ADDED = {
    name: insert.on_conflict_do_update(index_elements=["name"], set_={"value": _COUNTERS.value + insert.excluded.value})
    for name, insert in _INSERTS.items()
}
_WITHIN = (_COUNTERS.name >= bindparam("begin"), _COUNTERS.name < bindparam("end"))
_COUNTED = select(func.coalesce(func.sum(_COUNTERS.value), 0)).where(*_WITHIN)
_FORGOTTEN = delete(Counter.__table__).where(*_WITHIN)  # type: ignore[attr-defined]


def delete_callbacks(session: Session, *which: Collection[Any]) -> int:
    """Delete the callbacks that satisfy all conditions of one of `which`, in the session's transaction. Returns how
    many rows.

    The counters are written last and in their order, so that two transactions do not deadlock.
    """
    gone = [(row.received_at, row.source) for conditions in which for row in run(session, _GONE.where(*conditions))]
    oldest = datetime.now(UTC) - KEPT
    found = Tally(begin_of_span(at) for at, source in gone if source == "push" and at >= oldest)
    if found:
        counts = [{"name": _name(begin), "value": found[begin]} for begin in sorted(found)]
        run(session, _ADDED[session.get_bind().dialect.name], counts)
        run(session, _FORGOTTEN, {"begin": _NAME, "end": _name(oldest)})
    return len(gone)


def count_deleted(session: Session, begin: datetime, end: datetime) -> int:
    """How many callbacks that arrived from `begin` to before `end`, both begins of spans, were deleted."""
    [(count,)] = execute(session, _COUNTED, {"begin": _name(begin), "end": _name(end)}).rows
    return int(count)


def begin_of_span(moment: datetime) -> datetime:
    return moment.replace(second=moment.second // SPAN_SECONDS * SPAN_SECONDS, microsecond=0)


def _name(moment: datetime) -> str:
    return f"{_NAME}{moment:%Y%m%d%H%M%S}"
