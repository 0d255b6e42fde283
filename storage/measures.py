"""How the work stands, asked of the rows: what waits, what is late, what failed, and how well callbacks come."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, literal_column
from sqlmodel import Session, col, select

from storage import deadlines, outbox, rolling, states, tasks
from storage.database import moment
from storage.models import Asset, Callback, Dispatch, Task
from storage.states import ArchiveState, AssetState, CallbackState

# Due for longer than this is late: idle workers take a row within a second.
OVERDUE_SECONDS = 60
# What ended within this time is counted; the whole table would be read otherwise.
WINDOW_SECONDS = 86_400
# A callback gets this long after we learnt of the end otherwise before it counts as lost.
CALLBACK_PATIENCE_SECONDS = 300
WAITING: tuple[Any, ...] = (Task, Callback, Asset)


@dataclass(frozen=True)
class Measures:
    """Rows as of now; those that ended within the last 24 h, where it says `day`.

    `due`: rows waiting for a worker now, `overdue`: for over a minute. `callbacks_expected`: tasks that ended in the
    day, asked for a callback and had five minutes to get it; `callbacks_lost`: those among them that a read told us
    and no callback has; `callbacks_late`: those whose callback came after a read had told; `late_seconds`: the longest
    of those delays. `events_open`: events on their way to a sink, one for each; `oldest_event_seconds`: how long the
    oldest of them has been; `events_dead`: those that were given up. `audit_…`: the audit in the workers: faults there
    are now, files hashed in this round, how much of it is done (0 to 1), whether it takes longer than it may (0 or 1),
    and the seconds since the last whole round ended, None = none has.
    """

    due: int
    overdue: int
    oldest_due_seconds: float
    archived_day: int
    incomplete_day: int
    failed_day: int
    failed_assets: int
    unmatched: int
    deadline_near: int
    callbacks_expected: int
    callbacks_lost: int
    callbacks_late: int
    late_seconds: float
    events_open: int
    oldest_event_seconds: float
    events_dead: int
    audit_faults: int
    audit_hashed: int
    audit_share: float
    audit_late: int
    audit_age_seconds: float | None

    @property
    def callback_loss_rate(self) -> float:
        """Between 0 and 1; 0 when none was expected."""
        return self.callbacks_lost / self.callbacks_expected if self.callbacks_expected else 0.0

    def as_dict(self) -> dict[str, int | float | None]:
        return {**asdict(self), "callback_loss_rate": round(self.callback_loss_rate, 4)}


def measure(session: Session, *, deadline_seconds: float) -> Measures:
    """Ask the rows. Costs some milliseconds, whatever has ended before the last day."""
    now = tasks.now(session)
    return Measures(
        **_waiting(session, now),
        **_ended(session, now),
        **_callbacks(session, now),
        **_events(session, now),
        **_audit(session),
        failed_assets=_count(session, col(Asset.state) == literal_column(f"'{AssetState.FAILED}'")),
        unmatched=_count(session, col(Callback.state) == literal_column(f"'{CallbackState.UNMATCHED}'")),
        deadline_near=count_deadline_near(session, deadline_seconds),
    )


def count_dead_events(session: Session) -> int:
    """Events that a sink never took, one for each such sink."""
    return _count(session, outbox.IS_DEAD)


def count_deadline_near(session: Session, seconds: float) -> int:
    """Tasks whose files are deleted at the provider within `seconds`, or were, and are not all kept."""
    return _count(session, deadlines.is_near(seconds))


def count_overdue(session: Session) -> int:
    """Rows that have been due for more than a minute."""
    return sum(_count(session, each.due_at <= moment(-OVERDUE_SECONDS)) for each in WAITING)


def _count(session: Session, condition: Any) -> int:
    """Conditions on states are literals: SQLite uses no partial index for a parameter."""
    return session.exec(select(func.count()).where(condition)).one()


def _waiting(session: Session, now: datetime) -> dict[str, Any]:
    due, oldest = 0, now
    for model in WAITING:
        found, first = session.exec(select(func.count(), func.min(model.due_at)).where(model.due_at <= now)).one()
        due, oldest = due + found, min(oldest, first or now)
    overdue = count_overdue(session)
    return {"due": due, "overdue": overdue, "oldest_due_seconds": (now - oldest).total_seconds()}


def _ended(session: Session, now: datetime) -> dict[str, int]:
    day = col(Task.completed_at) > now - timedelta(seconds=WINDOW_SECONDS)
    grouped = select(Task.state, Task.archive, func.count()).where(day).group_by(col(Task.state), col(Task.archive))
    rows = session.exec(grouped).all()
    return {
        "archived_day": sum(count for _, archive, count in rows if archive is ArchiveState.ARCHIVED),
        "incomplete_day": sum(count for _, archive, count in rows if archive is ArchiveState.INCOMPLETE),
        "failed_day": sum(count for state, _, count in rows if state is states.TaskState.FAILED),
    }


def _events(session: Session, now: datetime) -> dict[str, Any]:
    waiting = select(func.count(), func.min(Dispatch.created_at)).where(outbox.IS_OPEN)
    found, first = session.exec(waiting).one()
    age = (now - first).total_seconds() if first else 0.0
    return {"events_open": found, "oldest_event_seconds": age, "events_dead": count_dead_events(session)}


def _audit(session: Session) -> dict[str, Any]:
    stands = rolling.standing(session)
    return {
        "audit_faults": stands.faults,
        "audit_hashed": stands.hashed,
        "audit_share": stands.share,
        "audit_late": int(stands.late),
        "audit_age_seconds": stands.age_seconds,
    }


def _callbacks(session: Session, now: datetime) -> dict[str, Any]:
    since, until = (now - timedelta(seconds=seconds) for seconds in (WINDOW_SECONDS, CALLBACK_PATIENCE_SECONDS))
    ended, told = col(Task.completed_at), col(Task.end_called_back_at)
    asked = (col(Task.callback_url).is_not(None), ended > since, col(Task.state).in_(states.TERMINAL))
    expected = session.exec(select(func.count()).where(*asked, ended < until)).one()
    lost = session.exec(select(func.count()).where(*asked, ended < until, told.is_(None))).one()
    late = session.execute(select(ended, told).where(*asked, told > ended)).all()
    delays = [(told_at - ended_at).total_seconds() for ended_at, told_at in late]
    return {
        "callbacks_expected": expected,
        "callbacks_lost": lost,
        "callbacks_late": len(late),
        "late_seconds": max(delays, default=0.0),
    }
