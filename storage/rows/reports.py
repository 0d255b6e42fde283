"""Applying a report to a task: its state, assets and events, and when it is read next. Callers own transactions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert, update
from sqlmodel import Session, col, select

from storage import states
from storage.database.clock import db_now
from storage.database.sessions import run
from storage.rows import aliases, claims, tasks
from storage.rows.events import EventName, record
from storage.rows.models import Asset, Task
from storage.states import (
    AssetName,
    AssetState,
    Decision,
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
    task: Task,
    report: Report,
    schedule: Schedule,
    *,
    now: datetime,
    pushed: bool,
    confirmed: bool = True,
) -> Decision:
    """Apply one report to a locked task: its state, its assets, the events, and its next step. Idempotent.

    `now`: the database's time. `pushed`: the report came as a callback, not as an answer to a read. `confirmed`: the
    provider itself reported it, in an answer or a signed delivery. It then replaces what only an unsigned delivery
    said, archived files too. An unconfirmed report replaces no confirmed link.
    """
    assets = {tasks.name_of(asset): asset for asset in tasks.assets_of(session, task.id)}
    before = tasks.facts(task, list(assets.values()))
    if task.deleted_at is not None:
        _rest(session, task)
        return Decision(task.state, task.archive)
    if before.series is None and report.series is not None:
        task.series = report.series
    if pushed:
        note_called_back(task, report, now)
        task.polls = 0
    else:
        task.step = None  # the read has been made
        task.completeness_reads += before.state is TaskState.SUCCEEDED and states.is_short(before)
    task.reported_at = now
    known = replace(before, series=task.series)
    decision = states.decide(known, report, confirmed=confirmed)
    _change_state(session, task, report, decision, now)
    _write_assets(session, task, assets, report, decision, schedule, now, confirmed=confirmed)
    if confirmed:
        task.units = task.units if report.units is None else report.units
        _confirm_assets(session, task, known, assets, report, now)
    # An unsigned delivery could name another's task, which would then be read in place of this one.
    if confirmed and report.provider_task_id is not None:
        task.provider_task_id = task.provider_task_id or report.provider_task_id
        aliases.note_alias(session, task, report.provider_task_id)
    # A doubted delivery caused the read of an ended task. The same one, sent again unsigned, must not withdraw it.
    is_asked = task.step is Step.READ and before.state in states.TERMINAL
    if confirmed or not is_asked or (decision.add and not task.contradicted):
        reschedule(session, task, schedule, read_now=decision.contradicted)
    return decision


def contradict(session: Session, task: Task, decision_state: TaskState, reported: Any, **facts: Any) -> bool:
    """Flag the locked task as contradicted and record the event, once. Returns whether it is new."""
    if task.contradicted:
        return False
    task.contradicted = True
    record(session, EventName.TASK_CONTRADICTED, task.id, {"kept": decision_state, "reported": reported, **facts})
    return True


def other_words(names: Iterable[AssetName]) -> str:
    """The files about which two reports contradict each other, as text."""
    return ", ".join(f"{name.kind} {name.index}" for name in sorted(names)[:MAX_NAMED])


def _confirm_assets(
    session: Session, task: Task, known: TaskFacts, assets: dict[AssetName, Asset], report: Report, now: datetime
) -> None:
    """Files that only an unsigned delivery named are confirmed by the provider's report, or replaced by it."""
    if report.status is not TaskState.SUCCEEDED:
        return
    other = states.other_files(known, report)
    won = {name: url for name, url in other.items() if assets[name].unconfirmed}
    for name in states.assets_in(report, known.series).keys() & assets.keys():
        assets[name].unconfirmed = False
    if not won:
        return
    contradict(session, task, task.state, report.status, files=other_words(won))
    task.note = f"the provider names another file for {other_words(won)} than an unsigned delivery did"
    task.archive = states.ArchiveState.ARCHIVING
    for name, url in won.items():
        _fetch_anew(session, assets[name], url)


def _fetch_anew(session: Session, asset: Asset, url: str) -> None:
    """Fetch the new link. A worker that fetches the old one loses its claim. A file stored from the old link is
    superseded.
    """
    session.flush()
    session.refresh(asset, with_for_update=True)
    asset.superseded = [*asset.superseded, asset.key] if asset.key else asset.superseded
    asset.source_url, asset.state = url, AssetState.DUE
    asset.key = asset.sha256 = asset.size = asset.archived_at = asset.error = None
    asset.fetched = {}
    claims.make_due(asset)
    session.flush()


def note_called_back(task: Task, report: Report, now: datetime) -> None:
    """Note that the provider called back: at the task's own URL, believed or not, or truly at the account's."""
    task.called_back_at = now
    tasks.clear_silence_note(task)
    if report.status in states.TERMINAL:
        task.end_called_back_at = task.end_called_back_at or now


def _change_state(session: Session, task: Task, report: Report, decision: Decision, now: datetime) -> None:
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


def _write_assets(
    session: Session,
    task: Task,
    assets: dict[AssetName, Asset],
    report: Report,
    decision: Decision,
    schedule: Schedule,
    now: datetime,
    *,
    confirmed: bool,
) -> None:
    for name, url in decision.replace.items():
        asset = assets[name]
        asset.source_url = url
        asset.files_expire_at = _files_expire_at(url, report, schedule, now)
        _make_due(session, asset)
    added = [
        {
            **_BLANK,
            "id": tasks.asset_id(task.id, name),
            "task_id": task.id,
            "kind": name.kind,
            "index": name.index,
            "original": name.original,
            "source_url": url,
            "files_expire_at": _files_expire_at(url, report, schedule, now),
            "created_at": now,
            "unconfirmed": not confirmed,
            **claims.due(now),
        }
        for name, url in decision.add.items()
    ]
    if added:
        run(session, _NEW_ASSETS, added)
    expiries = [row["files_expire_at"] for row in added] + [asset.files_expire_at for asset in assets.values()]
    task.files_expire_at = min((moment for moment in expiries if moment), default=None)
    session.flush()


def _make_due(session: Session, asset: Asset) -> None:
    """Make a file due now unless it is settled or claimed meanwhile, because a claim takes no task lock.

    An unusable file keeps its schedule, unless its try waits for this very link (`attempts` counts it).
    """
    free = update(Asset).where(
        col(Asset.id) == asset.id, col(Asset.state) == AssetState.DUE, col(Asset.lease).is_(None)
    )
    free = free.where((col(Asset.unusable_tries) == 0) | (col(Asset.attempts) > 0))
    free = free.values(**claims.DUE_NOW, error=None)
    session.execute(free.execution_options(synchronize_session=False))


_NEW_ASSETS = insert(Asset.__table__)  # type: ignore[attr-defined]
# The columns that no report sets. Made once, because a row object for each asset would cost more than its insertion.
_BLANK = Asset.model_construct().model_dump()


def _files_expire_at(url: str, report: Report, schedule: Schedule, now: datetime) -> datetime:
    """The expiry in the URL, else the lifetime from the task's end as the provider reports it (never after now)."""
    ended = now
    if report.updated_ms is not None:
        ended = min(now, datetime.fromtimestamp(report.updated_ms / 1000, UTC))
    return schedule.url_expiry(url) or ended + timedelta(seconds=schedule.result_lifetime_seconds)


def read_soon(session: Session, task: Task) -> bool:
    """Make a waiting read of the locked task due now. False: a step under way is left to its owner."""
    is_waiting = task.lease is None and task.step is Step.READ
    if is_waiting:
        claims.hasten(task)
        session.flush()
    return is_waiting


def reschedule(
    session: Session, task: Task, schedule: Schedule, *, read_now: bool = False, read_later: bool = False
) -> None:
    """Set the next step of the locked task from its current rows.

    Only its own step settles a create: a create that waits becomes due at once, unless it waits for slots; a create
    under way is left to its owner. A read or a finish under way started from rows that have changed since: its claim is
    removed, so that it settles nothing, and the step is due again. A read that is due earlier than the next one keeps
    its time. `read_later`: a read comes first, at the time of a task's first poll.
    """
    if task.deleted_at is not None:
        _rest(session, task)
        return
    if task.step is Step.CREATE:
        if task.lease is None and task.queued_at is None:
            claims.hasten(task)
        return
    following = states.next_step(tasks.facts_now(session, task), schedule.poll_delay(task.polls))
    if read_later:
        following = states.Next(Step.READ, schedule.poll_after_seconds)
    elif read_now or (task.lease is not None and following and following.step is task.step is Step.READ):
        following = states.Next(Step.READ, 0)
    if not read_now and following and _waits_for(session, task, following):
        return
    task.step = following.step if following else None
    if following:
        claims.make_due(task, following.delay_seconds)
    else:
        claims.rest(task)
    session.flush()


def _waits_for(session: Session, task: Task, following: states.Next) -> bool:
    """Whether the locked task is unclaimed and waits for this step already; for a read, no later than this one."""
    if task.lease is not None or task.step is not following.step:
        return False
    if following.step is Step.READ:
        return wants_read(session, task, within_seconds=following.delay_seconds)
    return task.due_at is not None


def _rest(session: Session, task: Task) -> None:
    """A deleted task waits for nothing, whatever is reported."""
    task.step = None
    claims.rest(task)
    session.flush()


def wants_read(session: Session, task: Task, *, within_seconds: float = 0) -> bool:
    """Whether a read of the locked task waits and is due now or within some seconds."""
    if task.step is not Step.READ:  # the usual case needs no query
        return False
    waits = (Task.id == task.id, Task.step == Step.READ, col(Task.lease).is_(None))
    return session.exec(select(Task.id).where(*waits, col(Task.due_at) <= db_now(within_seconds))).first() is not None
