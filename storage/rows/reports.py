"""Applying a report to a task: its state, assets and events, and when it is read next. Callers own transactions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy
from sqlalchemy import ColumnElement, bindparam, func, insert, update
from sqlmodel import Session, col, select

from storage import states
from storage.database.prepared import execute
from storage.database.sessions import run
from storage.rows import aliases, claims, tasks
from storage.rows.events import EventName, record
from storage.rows.models import Asset, TaskColumns
from storage.states import (
    AssetName,
    AssetState,
    Decision,
    Next,
    Report,
    Step,
    TaskFacts,
    TaskState,
)

STATE_EVENTS = {
    TaskState.SUBMITTED: EventName.TASK_SUBMITTED,
    TaskState.PROCESSING: EventName.TASK_PROCESSING,
    TaskState.SUCCEEDED: EventName.TASK_SUCCEEDED,
    TaskState.FAILED: EventName.TASK_FAILED,
}
# The most contradicted files that a note or an event lists.
MAX_NAMED = 9


@dataclass(frozen=True)
class Schedule:
    """When unfinished tasks are read, and how long the provider keeps files. All in seconds."""

    poll_after_seconds: float = 60
    poll_max_seconds: float = 3_600
    # Waits before the first reads of a task if nothing calls back.
    first_poll_seconds: tuple[float, ...] = ()
    result_lifetime_seconds: float = 2_592_000
    # A signed URL's own expiry takes precedence.
    url_expiry: Callable[[str], datetime | None] = lambda url: None

    def poll_delay(self, polls: int) -> float:
        """Doubling with jitter (±20 %), so that tasks sent together are not always read together."""
        first, later = self.first_poll_seconds[polls : polls + 1], polls - len(self.first_poll_seconds)
        delay = min(self.poll_max_seconds, first[0] if first else self.poll_after_seconds * 2.0 ** min(later, 30))
        return delay * random.uniform(0.8, 1.2)  # noqa: S311 - no secret


# Longer than usual, so that the order of what one report does stands in one place.
def apply(
    session: Session,
    task: TaskColumns,
    report: Report,
    schedule: Schedule,
    facts: TaskFacts | None = None,
    *,
    now: datetime,
    pushed: bool,
    confirmed: bool = True,
) -> None:
    """Apply one report to a locked task: its state, its assets, the events, and its next step. Idempotent.

    `facts`: those of the task now, if they were read already. `now`: the database's time. `pushed`: the report came as
    a callback, not as an answer to a read. `confirmed`: the provider itself reported it, in an answer or a signed
    delivery. It then replaces what only an unsigned delivery said, archived files too. An unconfirmed report replaces
    no confirmed link.
    """
    if task.deleted_at is not None:
        reschedule(session, task, schedule)
        return
    facts = facts or tasks.facts_now(session, task)
    if task.series is None:
        task.series = report.series
    if pushed:
        note_called_back(task, report, now)
        task.polls = 0
    else:
        task.step = None  # the read has been made
        task.completeness_reads += facts.state is TaskState.SUCCEEDED and states.is_short(facts)
    task.reported_at = now
    decision = states.decide(facts, report, confirmed=confirmed)
    _change_state(session, task, report, decision, now)
    if decision.add or decision.replace:
        _write_links(session, task, report, decision, schedule, now, confirmed=confirmed)
    if confirmed:
        task.units = task.units if report.units is None else report.units
        _confirm_assets(session, task, facts, report)
    # An unsigned delivery could name another's task, which would then be read in place of this one.
    if confirmed and report.provider_task_id is not None:
        task.provider_task_id = task.provider_task_id or report.provider_task_id
        aliases.note_alias(session, task, report.provider_task_id)
    # A doubted delivery caused the read of an ended task. The same one, sent again unsigned, must not withdraw it.
    is_asked = task.step is Step.READ and facts.state in states.TERMINAL
    if confirmed or not is_asked or (decision.add and not task.contradicted):
        reschedule(session, task, schedule, read_now=decision.contradicted)


def contradict(session: Session, task: TaskColumns, decision_state: TaskState, reported: Any, **facts: Any) -> bool:
    """Flag the locked task as contradicted and record the event, once. Returns whether it is new."""
    if task.contradicted:
        return False
    task.contradicted = True
    record(session, EventName.TASK_CONTRADICTED, task.id, {"kept": decision_state, "reported": reported, **facts})
    return True


def other_words(names: Iterable[AssetName]) -> str:
    """The files about which two reports contradict each other, as text."""
    return ", ".join(f"{name.kind} {name.index}" for name in sorted(names)[:MAX_NAMED])


def _confirm_assets(session: Session, task: TaskColumns, facts: TaskFacts, report: Report) -> None:
    """Files that only an unsigned delivery named are confirmed by the provider's report, or replaced by it."""
    if report.status is not TaskState.SUCCEEDED:
        return
    doubted = {name for name, asset in facts.assets.items() if asset.unconfirmed}
    for name in states.assets_in(report, facts.series).keys() & doubted:
        run(session, update(Asset).where(*_is(task, name)).values(unconfirmed=False))
    won = {name: url for name, url in states.other_files(facts, report).items() if name in doubted}
    if not won:
        return
    contradict(session, task, task.state, report.status, files=other_words(won))
    task.note = f"the provider names another file for {other_words(won)} than an unsigned delivery did"
    task.archive = states.ArchiveState.ARCHIVING
    for name, url in won.items():
        _fetch_anew(session, task, name, url)


def _fetch_anew(session: Session, task: TaskColumns, name: AssetName, url: str) -> None:
    """Fetch the new link. A worker that fetches the old one loses its claim. A file stored from the old link is
    superseded.
    """
    locked = select(Asset).where(*_is(task, name)).with_for_update()
    asset = session.exec(locked.execution_options(populate_existing=True)).one()
    asset.superseded = [*asset.superseded, asset.key] if asset.key else asset.superseded
    asset.source_url, asset.state = url, AssetState.DUE
    asset.key = asset.sha256 = asset.size = asset.archived_at = asset.error = None
    asset.fetched = {}
    claims.make_due(asset)
    session.flush()


def note_called_back(task: TaskColumns, report: Report, now: datetime) -> None:
    """Note that the provider called back: at the task's own URL, believed or not, or truly at the account's."""
    task.called_back_at = now
    tasks.clear_silence_note(task)
    if report.status in states.TERMINAL:
        task.end_called_back_at = task.end_called_back_at or now


def _change_state(session: Session, task: TaskColumns, report: Report, decision: Decision, now: datetime) -> None:
    if decision.contradicted:
        contradict(session, task, decision.state, report.status)
    task.archive = decision.archive
    if decision.state is task.state:
        return
    task.state = decision.state
    task.submitted_at = task.submitted_at or now
    if decision.state in states.TERMINAL:
        task.completed_at = now
        tasks.give_back(task)
    failed = decision.state is TaskState.FAILED
    task.error = (report.message or "the provider gave no reason") if failed else None
    record(session, STATE_EVENTS[decision.state], task.id, {"error": task.error} if failed else None)


def _write_links(
    session: Session,
    task: TaskColumns,
    report: Report,
    decision: Decision,
    schedule: Schedule,
    now: datetime,
    *,
    confirmed: bool,
) -> None:
    """Write the links of new files, and new links of known ones."""
    for name, url in decision.replace.items():
        asset = update(Asset).where(*_is(task, name))
        run(session, asset.values(source_url=url, files_expire_at=_files_expire_at(url, report, schedule, now)))
        # Due now unless it is settled or claimed meanwhile, because a claim takes no task lock. An unusable file keeps
        # its schedule, unless its try waits for this very link (`attempts` counts it).
        free = asset.where(col(Asset.state) == AssetState.DUE, col(Asset.lease).is_(None))
        free = free.where((col(Asset.unusable_tries) == 0) | (col(Asset.attempts) > 0))
        run(session, free.values(**claims.DUE_NOW, error=None))
    for name, url in decision.add.items():
        values = {
            **_BLANK,
            **vars(name),
            "id": tasks.asset_id(task.id, name),
            "task_id": task.id,
            "source_url": url,
            "files_expire_at": _files_expire_at(url, report, schedule, now),
            "created_at": now,
            "unconfirmed": not confirmed,
            **claims.due(now),
        }
        execute(session, _NEW_ASSET, values)
    ((task.files_expire_at,),) = execute(session, _FIRST_EXPIRY, {"of": task.id}).rows


def _is(task: TaskColumns, name: AssetName) -> list[ColumnElement[bool]]:
    """The condition of one file of the task."""
    columns = Asset.__table__.c  # type: ignore[attr-defined]
    return [columns[each] == value for each, value in {"task_id": task.id, **vars(name)}.items()]


_NEW_ASSET = insert(Asset.__table__)  # type: ignore[attr-defined]
_FIRST_EXPIRY = sqlalchemy.select(func.min(Asset.files_expire_at)).where(col(Asset.task_id) == bindparam("of"))
# The columns that no report sets. Made once, because a row object for each asset would cost more than its insertion.
_BLANK = Asset.model_construct().model_dump()


def _files_expire_at(url: str, report: Report, schedule: Schedule, now: datetime) -> datetime:
    """The expiry in the URL, else the lifetime from the task's end as the provider reports it (never after now)."""
    ended = now if report.updated_ms is None else min(now, datetime.fromtimestamp(report.updated_ms / 1000, UTC))
    return schedule.url_expiry(url) or ended + timedelta(seconds=schedule.result_lifetime_seconds)


def read_soon(session: Session, task: TaskColumns) -> bool:
    """Make a waiting read of the locked task due now. False: a step under way is left to its owner."""
    is_waiting = task.lease is None and task.step is Step.READ
    if is_waiting:
        claims.hasten(task)
        session.flush()
    return is_waiting


def reschedule(
    session: Session, task: TaskColumns, schedule: Schedule, *, read_now: bool = False, read_in: float | None = None
) -> None:
    """Set the next step of the locked task from its current rows.

    Only its own step settles a create: a create that waits becomes due at once, unless it waits for slots; a create
    under way is left to its owner. A read or a finish under way started from rows that have changed since: its claim is
    removed, so that it settles nothing, and the step is due again. A read that is due earlier than the next one keeps
    its time. `read_in`: a read comes first, in so many seconds. A deleted task waits for nothing.
    """
    if task.step is Step.CREATE and task.deleted_at is None:
        if task.lease is None and task.queued_at is None:
            claims.hasten(task)
        return
    following = states.next_step(tasks.facts_now(session, task), schedule.poll_delay(task.polls))
    if task.deleted_at is not None:
        following = Next()
    elif read_in is not None:
        following = Next(Step.READ, read_in)
    elif read_now or (task.lease is not None and following.step is task.step is Step.READ):
        following = states.READ_NOW
    if read_now or not waits_for(session, task, following):
        task.step = following.step
        claims.make_due(task, following.delay_seconds)
        session.flush()


def waits_for(session: Session, task: TaskColumns, following: Next) -> bool:
    """Whether the locked task is unclaimed and waits for this step already; for a read, no later than this one."""
    if task.lease is not None or task.due_at is None or task.step is None or task.step is not following.step:
        return False
    soon = timedelta(seconds=following.delay_seconds or 0)
    return task.step is not Step.READ or task.due_at <= tasks.now(session) + soon
