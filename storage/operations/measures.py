"""How the work stands, asked of the rows: what waits, what is late, what failed, and how well callbacks come."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, literal_column
from sqlmodel import Session, col, select

from storage import states
from storage.accounts.slots import Slots
from storage.archive import continuous_audit
from storage.operations import deadlines, outbox
from storage.rows import tasks
from storage.rows.database import db_now_once
from storage.rows.models import Asset, Callback, Dispatch, Task
from storage.states import ArchiveState, AssetState, CallbackState

# Due for longer than this is late: idle workers take a row within a second.
OVERDUE_SECONDS = 60
# What ended within this time is counted; the whole table would be read otherwise.
WINDOW_SECONDS = 86_400
# A callback gets this long after we learnt of the end otherwise before it counts as lost.
CALLBACK_PATIENCE_SECONDS = 300
WAITING: tuple[Any, ...] = (Task, Callback, Asset)


@dataclass(frozen=True)
class AccountMeasures:
    """A provider's account. `slots_held`: pictures in work, by our own count; `slot_limit`: how many may be now, None =
    no limit of our own; `tasks_queued`: tasks that wait for their slots."""

    slots_held: int = 0
    slot_limit: int | None = None
    tasks_queued: int = 0


@dataclass(frozen=True)
class SinkMeasures:
    """A sink that some event waits for or was never taken by. The words are those of `Measures`, for it alone."""

    events_open: int = 0
    oldest_event_seconds: float = 0.0
    events_dead: int = 0


@dataclass(frozen=True)
class Measures:
    """Rows as of now; those that ended within the last 24 h, where it says `day`.

    `due`: rows waiting for a worker now, `overdue`: for over a minute. `callbacks_expected`: tasks that ended in the
    day, asked for a callback and had five minutes to get it; `callbacks_lost`: those among them that a read told us
    and no callback has; `callbacks_late`: those whose callback came after a read had told; `late_seconds`: the longest
    of those delays. `events_open`: events on their way to a sink, one for each; `oldest_event_seconds`: how long the
    oldest of them has been; `events_dead`: those that were given up. `audit_…`: the audit in the workers: faults there
    are now, files hashed in this round, how much of it is done (0 to 1), whether it takes longer than it may (0 or 1),
    and the seconds since the last whole round ended, None = none has. `accounts`, `sinks`: by their names.
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
    accounts: dict[str, AccountMeasures]
    sinks: dict[str, SinkMeasures]

    @property
    def callback_loss_rate(self) -> float:
        """Between 0 and 1; 0 when none was expected."""
        return self.callbacks_lost / self.callbacks_expected if self.callbacks_expected else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Numbers by name; under `accounts` and `sinks` the same by the name of each."""
        return {**asdict(self), "callback_loss_rate": round(self.callback_loss_rate, 4)}


def measure(session: Session, *, deadline_seconds: float, slots: Slots | None = None) -> Measures:
    """Ask the rows. Costs some milliseconds, whatever has ended before the last day; under 0.1 s where 100,000 tasks
    and 50,000 events wait.

    `slots`: of the account whose limit is known here; other accounts are told without theirs, while they hold some.
    """
    now = tasks.now(session)
    return Measures(
        **_waiting(session, now),
        **_ended(session, now),
        **_callbacks(session, now),
        **_events(session, now),
        **_audit(session),
        accounts=_accounts(session, slots),
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
    return sum(_count(session, each.due_at <= db_now_once(-OVERDUE_SECONDS)) for each in WAITING)


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


def _ended(session: Session, now: datetime) -> dict[str, Any]:
    day = col(Task.completed_at) > now - timedelta(seconds=WINDOW_SECONDS)
    grouped = select(Task.state, Task.archive, func.count()).where(day).group_by(col(Task.state), col(Task.archive))
    rows = session.exec(grouped).all()
    return {
        "archived_day": sum(count for _, archive, count in rows if archive is ArchiveState.ARCHIVED),
        "incomplete_day": sum(count for _, archive, count in rows if archive is ArchiveState.INCOMPLETE),
        "failed_day": sum(count for state, _, count in rows if state is states.TaskState.FAILED),
    }


def _events(session: Session, now: datetime) -> dict[str, Any]:
    """Of all sinks together, and of each: the sums are made here, the rows are read once."""
    waiting = select(Dispatch.sink, func.count(), func.min(Dispatch.created_at)).where(outbox.IS_OPEN)
    dead = select(Dispatch.sink, func.count()).where(outbox.IS_DEAD).group_by(Dispatch.sink)
    sinks = {name: SinkMeasures(events_dead=count) for name, count in session.exec(dead)}
    for name, count, first in session.exec(waiting.group_by(Dispatch.sink)):
        age = (now - first).total_seconds() if first else 0.0
        sinks[name] = replace(sinks.get(name, SinkMeasures()), events_open=count, oldest_event_seconds=age)
    return {
        "events_open": sum(each.events_open for each in sinks.values()),
        "oldest_event_seconds": max((each.oldest_event_seconds for each in sinks.values()), default=0.0),
        "events_dead": sum(each.events_dead for each in sinks.values()),
        "sinks": dict(sorted(sinks.items())),
    }


def _accounts(session: Session, slots: Slots | None) -> dict[str, AccountMeasures]:
    holding = select(Task.provider, func.sum(Task.slots)).where(col(Task.slots) > literal_column("0"))
    waiting = select(Task.provider, func.count()).where(col(Task.queued_at).is_not(None))
    held = dict(session.exec(holding.group_by(Task.provider)).all())
    queued = dict(session.exec(waiting.group_by(Task.provider)).all())
    limits = {slots.provider: slots.limit(session)} if slots else {}
    return {
        name: AccountMeasures(int(held.get(name, 0)), limits.get(name), queued.get(name, 0))
        for name in sorted({*held, *queued, *limits})
    }


def _audit(session: Session) -> dict[str, Any]:
    stands = continuous_audit.standing(session)
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
