"""Measures of the rows: what waits, what is overdue, what failed, and how many callbacks arrive."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case, distinct, func, literal_column, or_, text, true
from sqlmodel import Session, col, select

from storage import spool
from storage.accounts import pauses
from storage.accounts.slots import Slots
from storage.archive import continuous_audit
from storage.bucket import store_errors
from storage.database.clock import db_now_once
from storage.operations import deadlines, lists, outbox
from storage.operations.counted import counted
from storage.operations.ended import Ended, EndedLastDay
from storage.rows import events, tasks
from storage.rows.models import Asset, Callback, Dispatch, Task
from storage.states import UNMATCHED, ArchiveState, CallbackState, Step

# An idle worker claims a due row within a second.
OVERDUE_SECONDS = 60
# Due rows of a lane that are counted for a page: 100,000 take 20 ms of CPU.
MAX_DUE = 100_000
# Tasks of a step that are due soonest. Those whose call to the provider failed are among them, because their next try
# comes within minutes.
PROVIDER_WAITS_READ = 2_000
# Files whose next try is the latest. Those that the store refused are among them, because untried files are due before.
# Reading this many rows takes some milliseconds, however many wait.
STORE_WAITS_READ = 2_000
CAUSES = 5
# How the error of a file begins that waits because of the store or of the spool folder.
STORE_ERRORS = (*store_errors.MESSAGES, *spool.MESSAGES)
# Each table, and the column that leads its due index with each value that a due row has: the oldest come first in each.
WAITING: tuple[tuple[Any, Any], ...] = (
    *((Task, col(Task.step) == step) for step in Step),
    *((Callback, col(Callback.state) == state) for state in (CallbackState.RECEIVED, CallbackState.UNMATCHED)),
    (Asset, true()),
)


@dataclass(frozen=True)
class AccountMeasures:
    """A provider's account. `slots_held`: pictures in progress, by our own count. `slot_limit`: the current limit, None
    = no limit. `tasks_queued`: tasks that wait for slots. `account_paused`: 1 while the provider refuses the account.
    `models_paused`: models it may not use. `pauses`: a line for each, with the provider's message.
    """

    slots_held: int = 0
    slot_limit: int | None = None
    tasks_queued: int = 0
    account_paused: int = 0
    models_paused: int = 0
    pauses: tuple[str, ...] = ()


@dataclass(frozen=True)
class SinkMeasures:
    """A sink with open or dead events. The fields are those of `Measures`, for this sink."""

    events_open: int = 0
    oldest_event_seconds: float = 0.0
    events_dead: int = 0


@dataclass(frozen=True)
class Measures:
    """The current rows in numbers. Fields named `…_day`: tasks that ended within the last 24 h.

    `due`: rows that wait for a worker. `overdue`: those due for over a minute. `failed_assets`: files that were given
    up and not dismissed. `store_waits`, `provider_waits`: see the functions of these names. `unusable_files`: files
    whose hosts answer with something unusable and that are still tried, `unusable_seconds`: age of the oldest,
    `incomplete_open`: tasks that are incomplete because of them. `callbacks_expected`: tasks that ended in the last 24
    h, at least five minutes ago, and asked for a callback. `callbacks_lost`: those of them whose end no callback
    reported. `callbacks_late`: tasks whose callback came after a read had reported the end. `late_seconds`: the longest
    of those delays. `events_open`: undelivered events, counted per sink, and once if they have no number yet.
    `oldest_event_seconds`: age of the oldest of them. `events_dead`: events that were given up. All three are without
    the callbacks of the gateway's clients, which only `sinks` has. `audit_…`: the continuous audit: current faults,
    files hashed in this round, completed share of it (0 to 1), whether it is late (0 or 1), seconds since the last
    complete round (None = no round has ended). `accounts`, `sinks`: by name.
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
    store_waits: dict[str, int]
    provider_waits: dict[str, int]
    unusable_files: int
    unusable_seconds: float
    incomplete_open: int
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
        """Lost callbacks divided by expected ones, 0 to 1; 0 when none was expected."""
        return self.callbacks_lost / self.callbacks_expected if self.callbacks_expected else 0.0

    @property
    def due_shown(self) -> str:
        return f"{self.due:,}{'+' if self.due >= MAX_DUE else ''}"

    def as_dict(self) -> dict[str, Any]:
        """The measures as JSON values, with `callback_loss_rate` and the sums of both kinds of waits."""
        waits = {"waiting_files": sum(self.store_waits.values()), "waiting_tasks": sum(self.provider_waits.values())}
        return {**asdict(self), **waits, "callback_loss_rate": round(self.callback_loss_rate, 4)}


def measure(
    session: Session,
    *,
    deadline_seconds: float,
    slots: Slots | None = None,
    ended: EndedLastDay | None = None,
    day: bool = True,
) -> Measures:
    """Measure the rows. Takes some milliseconds, and under 0.1 s while 100,000 tasks and 50,000 events wait.

    `ended`: the caller's counts of the day so far; None = the day is counted completely. `day` False: for a page.
    Nothing of the day is counted, its fields are 0, and of each lane at most the `MAX_DUE` oldest due rows are counted.
    `slots`: of the account whose limit is configured here. Other accounts are listed without a limit while they hold
    slots or have queued tasks.
    """
    now, audit = tasks.now(session), continuous_audit.standing(session)
    return Measures(
        **_waiting(session, now, None if day else MAX_DUE),
        **_ended((ended or EndedLastDay()).read(session, now) if day else Ended()),
        **_events(session, now),
        audit_faults=audit.faults,
        audit_hashed=audit.hashed,
        audit_share=audit.share,
        audit_late=int(audit.late),
        audit_age_seconds=audit.age_seconds,
        **_unusable(session, now),
        accounts=_accounts(session, slots),
        failed_assets=_count(session, lists.GIVEN_UP),
        unmatched=session.exec(select(func.count()).select_from(Callback).where(text(UNMATCHED))).one(),
        deadline_near=count_deadline_near(session, deadline_seconds),
        store_waits=store_waits(session),
        provider_waits=provider_waits(session),
    )


def at_most(count: int) -> int | str:
    """A count of due rows on a page. From `MAX_DUE` on there may be more."""
    return count if count < MAX_DUE else f"{count:,}+"


def count_dead_events(session: Session) -> tuple[int, int]:
    """Events that were given up, counted per sink, and callbacks that clients of the gateway never accepted."""
    of_clients = func.count(case((col(Dispatch.sink) == outbox.CLIENTS, 1)))
    dead, clients = session.exec(select(func.count(), of_clients).where(outbox.IS_DEAD)).one()
    return dead - clients, clients


def unnumbered_fault(session: Session) -> str:
    """What is wrong with numbers, empty if nothing. Workers number an event within a second."""
    count, seconds = events.unnumbered(session)
    return (
        f"{counted(count, 'event has', 'events have')} no number, the oldest for {seconds:.0f} s"
        if seconds > OVERDUE_SECONDS
        else ""
    )


def count_deadline_near(session: Session, seconds: float) -> int:
    """Tasks with files that are not all archived and that the provider deletes within `seconds`, or has deleted."""
    return sum(_count(session, each) for each in deadlines.near(seconds))


@dataclass(frozen=True)
class UnusableFiles:
    """Files whose hosts answer with something unusable. They are still tried, so nothing is lost yet.

    `files`: how many; `said`: how many tasks are reported as incomplete because of them. `since`: when the first of
    them began; `next_try_at`: when the next of them is tried; None = there are none.
    """

    files: int = 0
    said: int = 0
    since: datetime | None = None
    next_try_at: datetime | None = None

    def __str__(self) -> str:
        words = f"{counted(self.files, 'file')} came unusable"
        if self.since and self.next_try_at:
            words += f" since {self.since:%Y-%m-%d %H:%M} UTC, next try at {self.next_try_at:%Y-%m-%d %H:%M} UTC"
        return words


def unusable_files(session: Session) -> UnusableFiles:
    said = func.count(distinct(case((col(Task.archive) == ArchiveState.INCOMPLETE, col(Task.id)))))
    columns: Any = (func.count(), said, func.min(Asset.unusable_since), func.min(Asset.due_at))
    found = select(*columns).join(Task, col(Task.id) == col(Asset.task_id))
    return UnusableFiles(*session.execute(found.where(col(Asset.unusable_since).is_not(None))).one())


def store_waits(session: Session) -> dict[str, int]:
    """How many files wait because the store was down or refused them, or because the spool folder has no room or cannot
    be used, by the message of their last try.

    Covers the STORE_WAITS_READ files whose next try is the latest, and the CAUSES most frequent answers.
    """
    latest = select(Asset.error).where(col(Asset.due_at).is_not(None)).order_by(col(Asset.due_at).desc())
    error = latest.limit(STORE_WAITS_READ).subquery().c.error
    told = or_(*(error.startswith(words) for words in STORE_ERRORS))
    found: Counter[str] = Counter()
    for message, count in session.exec(select(error, func.count()).where(told).group_by(error)):
        found[store_errors.OBJECT_SIZE.sub("objects of their size", message)] += count
    return dict(found.most_common(CAUSES))


def provider_waits(session: Session) -> dict[str, int]:
    """How many tasks wait because their last call to the provider failed, by its answer, without those in work.

    Covers the PROVIDER_WAITS_READ tasks of each step that are due soonest, and the CAUSES most frequent answers.
    """
    found: Counter[str] = Counter()
    for step in (Step.CREATE, Step.READ):
        due = select(Task.note, Task.attempts, Task.lease).where(Task.step == step, col(Task.due_at).is_not(None))
        soonest = due.order_by(col(Task.due_at)).limit(PROVIDER_WAITS_READ).subquery().c
        failed = (soonest.attempts > 0, soonest.lease.is_(None), soonest.note.is_not(None))
        for note, count in session.exec(select(soonest.note, func.count()).where(*failed).group_by(soonest.note)):
            if not note.startswith(tasks.DEFAULTED):
                found[tasks.last_note(note)] += count
    return dict(found.most_common(CAUSES))


def waiting_lines(store_waits: dict[str, int], provider_waits: dict[str, int]) -> list[str]:
    return [
        *(f"{counted(count, 'file waits', 'files wait')}: {cause}" for cause, count in store_waits.items()),
        *(f"{counted(count, 'task waits', 'tasks wait')}: {cause}" for cause, count in provider_waits.items()),
    ]


def count_overdue(session: Session) -> int:
    """Rows that have been due for more than a minute."""
    return sum(_count(session, (model.due_at <= db_now_once(-OVERDUE_SECONDS)) & lane) for model, lane in WAITING)


def _count(session: Session, condition: Any) -> int:
    """Conditions on states must be literals, because SQLite uses no partial index for a parameter."""
    return session.exec(select(func.count()).where(condition)).one()


def _waiting(session: Session, now: datetime, most: int | None) -> dict[str, Any]:
    due, overdue, oldest = 0, 0, now
    long_ago = now - timedelta(seconds=OVERDUE_SECONDS)
    for model, lane in WAITING:
        due_rows = select(model.due_at).where(model.due_at <= now, lane)
        at = (due_rows if most is None else due_rows.order_by(model.due_at).limit(most)).subquery().c.due_at
        late = func.count(case((at <= long_ago, 1)))
        found, found_late, first = session.exec(select(func.count(), late, func.min(at))).one()
        due, overdue, oldest = due + found, overdue + found_late, min(oldest, first or now)
    return {"due": due, "overdue": overdue, "oldest_due_seconds": (now - oldest).total_seconds()}


def _ended(found: Ended) -> dict[str, Any]:
    return {
        "archived_day": found.archived,
        "incomplete_day": found.incomplete,
        "failed_day": found.failed,
        "callbacks_expected": found.callbacks_expected,
        "callbacks_lost": found.callbacks_lost,
        "callbacks_late": found.callbacks_late,
        "late_seconds": found.late_seconds,
    }


def _unusable(session: Session, now: datetime) -> dict[str, Any]:
    found = unusable_files(session)
    age = (now - found.since).total_seconds() if found.since else 0.0
    return {"unusable_files": found.files, "incomplete_open": found.said, "unusable_seconds": age}


def _events(session: Session, now: datetime) -> dict[str, Any]:
    """Open and dead events per sink and in total. Those without a number are of no sink. The rows are read once."""
    # The limit, which nothing reaches, holds SQLite to the index of open ones: to group, it would read all of a sink's.
    rows = select(Dispatch.sink, Dispatch.created_at).where(outbox.IS_OPEN).limit(2**62).subquery().c
    waiting = select(rows.sink, func.count(), func.min(rows.created_at)).group_by(rows.sink)
    dead = select(Dispatch.sink, func.count()).where(outbox.IS_DEAD).group_by(Dispatch.sink)
    sinks = {name: SinkMeasures(events_dead=count) for name, count in session.exec(dead)}
    for name, count, first in session.exec(waiting):
        age = (now - first).total_seconds() if first else 0.0
        sinks[name] = replace(sinks.get(name, SinkMeasures()), events_open=count, oldest_event_seconds=age)
    unnumbered, unnumbered_age = events.unnumbered(session)
    own = [each for name, each in sinks.items() if name != outbox.CLIENTS]
    return {
        "events_open": sum(each.events_open for each in own) + unnumbered,
        "oldest_event_seconds": max([unnumbered_age, *(each.oldest_event_seconds for each in own)]),
        "events_dead": sum(each.events_dead for each in own),
        "sinks": dict(sorted(sinks.items())),
    }


def _accounts(session: Session, slots: Slots | None) -> dict[str, AccountMeasures]:
    holding = select(Task.provider, func.sum(Task.slots)).where(col(Task.slots) > literal_column("0"))
    waiting = select(Task.provider, func.count()).where(col(Task.queued_at).is_not(None))
    held = dict(session.exec(holding.group_by(Task.provider)).all())
    queued = dict(session.exec(waiting.group_by(Task.provider)).all())
    limits = {slots.provider: slots.limit(session)} if slots else {}
    paused = pauses.every(session)
    return {
        name: AccountMeasures(
            slots_held=int(held.get(name, 0)),
            slot_limit=limits.get(name),
            tasks_queued=queued.get(name, 0),
            account_paused=sum(1 for each in paused if each.provider == name and not each.model),
            models_paused=sum(1 for each in paused if each.provider == name and each.model),
            pauses=tuple(pauses.line(each) for each in paused if each.provider == name),
        )
        for name in sorted({*held, *queued, *limits, *(each.provider for each in paused)})
    }
