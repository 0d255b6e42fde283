"""Task rows and their assets: find, lock, apply a report, say what comes next. Callers own the transaction."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy import bindparam, insert, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col, select

from storage import states
from storage.database.clock import db_now
from storage.database.prepared import execute
from storage.database.sessions import run
from storage.errors import LostClaim
from storage.rows import aliases, claims
from storage.rows.deliveries import rematch
from storage.rows.events import EventName, record
from storage.rows.held_slots import give_back, heard_of
from storage.rows.models import Asset, Task
from storage.states import (
    ArchiveState,
    AssetFacts,
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
# As many files as a note or an event names of those that are contradicted.
MAX_NAMED = 9
# Names an asset for ever: the same task, kind and index give the same id after a rebuild.
ASSET_NAMESPACE = uuid.UUID("5f0f2c1e-6c36-4c55-9f0b-5d8f1f6f3c0a")


@dataclass(frozen=True)
class Schedule:
    """When unfinished tasks are read, and how long the provider keeps files. All in seconds."""

    poll_after_seconds: float = 60
    poll_max_seconds: float = 3_600
    result_lifetime_seconds: float = 2_592_000
    # When a signed URL says itself how long it lives, that counts.
    url_expiry: Callable[[str], datetime | None] = lambda url: None

    def poll_delay(self, polls: int) -> float:
        """Doubling with jitter (±20 %), so that tasks sent together are not read together for ever."""
        delay = min(self.poll_max_seconds, self.poll_after_seconds * 2.0 ** min(polls, 30))
        return delay * random.uniform(0.8, 1.2)  # noqa: S311 - no secret


def insert_new(session: Session, task: Task) -> bool:
    """Insert a task unless its external id is taken; unmatched deliveries of it are due. Returns whether it was."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    values = {name: getattr(task, name) for name in Task.__table__.columns.keys()}  # type: ignore[attr-defined]  # noqa: SIM118
    statement: Any = dialect.insert(Task).values(values).on_conflict_do_nothing(index_elements=["external_task_id"])
    if session.execute(statement.returning(Task.id)).scalar_one_or_none() is None:
        return False
    record(session, EventName.TASK_CREATED, task.id, {"external_task_id": task.external_task_id})
    rematch(session, task.id, task.provider, external_task_id=task.external_task_id)
    return True


_BY_EXTERNAL_ID = select(Task).where(Task.external_task_id == bindparam("wanted"))


def by_external_id(session: Session, external_task_id: str) -> Task | None:
    return session.scalars(_BY_EXTERNAL_ID, {"wanted": external_task_id}).one_or_none()


_LOCKED = select(Task).where(Task.id == bindparam("wanted")).with_for_update()
_LOCKED = _LOCKED.execution_options(populate_existing=True)


def lock(session: Session, task_id: uuid.UUID) -> Task | None:
    """The task row, locked until the transaction ends, as it stands now."""
    return session.scalars(_LOCKED, {"wanted": task_id}).one_or_none()


class Standing(NamedTuple):
    """What a task's row says of how it stands, without an object of it."""

    id: uuid.UUID
    state: TaskState
    archive: ArchiveState
    series: bool | None
    expected: int | None
    contradicted: bool
    completeness_reads: int
    step: Step | None
    deleted_at: datetime | None


_TASKS = Task.__table__.c  # type: ignore[attr-defined]
_STANDING = sqlalchemy.select(*(_TASKS[name] for name in Standing._fields)).where(_TASKS.id == bindparam("wanted"))
_STANDING = _STANDING.with_for_update()


def lock_standing(session: Session, task_id: uuid.UUID) -> Standing | None:
    """`lock` for a caller that will rarely change the row."""
    rows = execute(session, _STANDING, {"wanted": task_id}).rows
    return Standing._make(rows[0]) if rows else None


def waits_for_files(session: Session, task: Standing) -> bool:
    """Whether the locked task is being archived and has no step to take, as its files are now."""
    is_archiving = task.archive is ArchiveState.ARCHIVING and task.step is None and task.deleted_at is None
    return is_archiving and states.next_step(_facts_now(session, task), 0) is None


def lock_claimed(session: Session, claimed: Task) -> Task:
    """The task row, locked, still held under the claim's lease. Raises `LostClaim` when it is not."""
    task = lock(session, claimed.id)
    if task is None or task.lease != claimed.lease:
        raise LostClaim(f"task {claimed.id}")
    return task


_IN_READING_ORDER = select(Asset).order_by(Asset.kind, Asset.original, col(Asset.index))
_ASSETS_OF = _IN_READING_ORDER.where(Asset.task_id == bindparam("of")).execution_options(populate_existing=True)


def assets_of(session: Session, task_id: uuid.UUID) -> list[Asset]:
    """The task's assets in reading order."""
    return list(session.scalars(_ASSETS_OF, {"of": task_id}))


def assets_of_all(session: Session, task_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[Asset]]:
    """The assets of many tasks at once, in reading order; a task without any has an empty list."""
    found: dict[uuid.UUID, list[Asset]] = {task_id: [] for task_id in task_ids}
    for asset in session.exec(_IN_READING_ORDER.where(col(Asset.task_id).in_(task_ids))):
        found[asset.task_id].append(asset)
    return found


def name_of(asset: Asset) -> AssetName:
    return AssetName(asset.kind, asset.index, asset.original)


def facts(task: Task, assets: Sequence[Asset]) -> TaskFacts:
    """The part of the rows that decisions read."""
    found = (
        AssetFacts(asset.state, asset.source_url, asset.unusable_tries, unconfirmed=asset.unconfirmed)
        for asset in assets
    )
    return _facts(task, dict(zip(map(name_of, assets), found, strict=True)))


_ASSETS = Asset.__table__.c  # type: ignore[attr-defined]
_ASSET_FACTS = sqlalchemy.select(
    _ASSETS.kind, _ASSETS.index, _ASSETS.original, _ASSETS.state, _ASSETS.source_url, _ASSETS.unusable_tries
).where(_ASSETS.task_id == bindparam("of"))


def _facts_now(session: Session, task: Task | Standing) -> TaskFacts:
    """`facts` as the rows stand now, without making objects of them: every settled file asks."""
    session.flush()
    rows = execute(session, _ASSET_FACTS, {"of": task.id}).rows
    names = [AssetName(row.kind, row.index, row.original) for row in rows]
    found = (AssetFacts(row.state, row.source_url, row.unusable_tries) for row in rows)
    return _facts(task, dict(zip(names, found, strict=True)))


def _facts(task: Task | Standing, assets: dict[AssetName, AssetFacts]) -> TaskFacts:
    return TaskFacts(
        state=task.state,
        archive=task.archive,
        series=task.series,
        expected=task.expected,
        contradicted=task.contradicted,
        completeness_reads=task.completeness_reads,
        assets=assets,
    )


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
    """Apply one report to a locked task: its state, its assets, the facts, and what it waits for next.

    Harmless to repeat. `now`: the database's time. `pushed`: it came as a callback, not as an answer to a read.
    `confirmed`: the provider said so, in an answer or a signed delivery. What only an unsigned delivery said gives way
    to it: another file for an index takes the place of the first, archived or not.
    """
    assets = {name_of(asset): asset for asset in assets_of(session, task.id)}
    before = facts(task, list(assets.values()))
    if task.deleted_at is not None:
        _rest(session, task)
        return Decision(task.state, task.archive)
    if before.series is None and report.series is not None:
        task.series = report.series
    if not pushed:
        task.step = None  # the read that waited has been made
    if not pushed and before.state is TaskState.SUCCEEDED and states.is_short(before):
        task.completeness_reads += 1
    known = replace(before, series=task.series)
    decision = states.decide(known, report)
    _note_time(task, report, now=now, pushed=pushed, confirmed=confirmed)
    _change_state(session, task, report, decision, now)
    _write_assets(session, task, assets, report, decision, schedule, now, confirmed=confirmed)
    if confirmed:
        _confirm_assets(session, task, known, assets, report, now)
    _note_provider_id(session, task, report, confirmed=confirmed)
    reschedule(session, task, schedule, read_now=decision.contradicted)
    return decision


def _note_provider_id(session: Session, task: Task, report: Report, *, confirmed: bool) -> None:
    """While the create is under way its own answer alone says by which id the provider is asked: whoever holds the
    callback URL could name another's task."""
    if report.provider_task_id is None:
        return
    if task.provider_task_id is None and (confirmed or task.step is not Step.CREATE):
        task.provider_task_id = report.provider_task_id
    aliases.note_alias(session, task, report.provider_task_id, unsigned=not confirmed)


def contradict(session: Session, task: Task, decision_state: TaskState, reported: Any, **facts: Any) -> bool:
    """Flag the locked task as contradicted and say so, once for good. Returns whether that is new."""
    if task.contradicted:
        return False
    task.contradicted = True
    record(session, EventName.TASK_CONTRADICTED, task.id, {"kept": decision_state, "reported": reported, **facts})
    return True


def other_words(names: Iterable[AssetName]) -> str:
    """Which files two reports contradict each other about."""
    return ", ".join(f"{name.kind} {name.index}" for name in sorted(names)[:MAX_NAMED])


def _confirm_assets(
    session: Session, task: Task, known: TaskFacts, assets: dict[AssetName, Asset], report: Report, now: datetime
) -> None:
    """What an unsigned delivery said of files is confirmed by the provider's word, or gives way to it."""
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
    """Whoever fetches the old link loses the claim; what was stored from it is superseded."""
    session.flush()
    session.refresh(asset, with_for_update=True)
    asset.superseded = [*asset.superseded, asset.key] if asset.key else asset.superseded
    asset.source_url, asset.state = url, AssetState.DUE
    asset.key = asset.sha256 = asset.size = asset.archived_at = asset.error = None
    asset.fetched = {}
    claims.make_due(asset)
    session.flush()


def _note_time(task: Task, report: Report, *, now: datetime, pushed: bool, confirmed: bool) -> None:
    task.reported_at = now
    if pushed:
        note_called_back(task, report, now)
        task.polls = 0
    if report.units is not None and confirmed:
        task.units = report.units


def note_called_back(task: Task, report: Report, now: datetime) -> None:
    """Remember that the provider called back, whether or not its words are believed."""
    task.called_back_at = now
    heard_of(task)
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
        give_back(task)
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
        _new_asset(task, name, url, _files_expire_at(url, report, schedule, now), now) | {"unconfirmed": not confirmed}
        for name, url in decision.add.items()
    ]
    if added:
        run(session, _NEW_ASSETS, added)
    expiries = [row["files_expire_at"] for row in added] + [asset.files_expire_at for asset in assets.values()]
    task.files_expire_at = min((moment for moment in expiries if moment), default=None)
    session.flush()


def _make_due(session: Session, asset: Asset) -> None:
    """Make a file due now unless it is settled or claimed, which may be so by now: a claim takes no task lock.

    An unusable file keeps to its schedule, unless its try waits for this very link (`attempts` counts it).
    """
    free = update(Asset).where(
        col(Asset.id) == asset.id, col(Asset.state) == AssetState.DUE, col(Asset.lease).is_(None)
    )
    free = free.where((col(Asset.unusable_tries) == 0) | (col(Asset.attempts) > 0))
    free = free.values(**claims.AFRESH, error=None)
    session.execute(free.execution_options(synchronize_session=False))


_NEW_ASSETS = insert(Asset.__table__)  # type: ignore[attr-defined]
# What no report says of a new asset. Made once: a row object for each would cost more than its insertion.
_BLANK = Asset.model_construct().model_dump()


def _new_asset(task: Task, name: AssetName, url: str, files_expire_at: datetime, now: datetime) -> dict[str, Any]:
    return {
        **_BLANK,
        "id": asset_id(task.id, name),
        "task_id": task.id,
        "kind": name.kind,
        "index": name.index,
        "original": name.original,
        "source_url": url,
        "files_expire_at": files_expire_at,
        "created_at": now,
        **claims.due(now),
    }


def asset_id(task_id: uuid.UUID, name: AssetName) -> uuid.UUID:
    """The same for the same task, kind and index, for ever."""
    return uuid.uuid5(ASSET_NAMESPACE, f"{task_id}/{name.kind}/{name.original}/{name.index}")


def _files_expire_at(url: str, report: Report, schedule: Schedule, now: datetime) -> datetime:
    """The URL's own word, else the lifetime counted from when the provider says the task ended (never after now)."""
    ended = now
    if report.updated_ms is not None:
        ended = min(now, datetime.fromtimestamp(report.updated_ms / 1000, UTC))
    return schedule.url_expiry(url) or ended + timedelta(seconds=schedule.result_lifetime_seconds)


def read_soon(session: Session, task: Task) -> None:
    """Make a waiting read of the locked task due now. A step in flight is left to its owner."""
    if task.lease is None and task.step is Step.READ:
        claims.hasten(task)
        session.flush()


def reschedule(
    session: Session, task: Task, schedule: Schedule, *, read_now: bool = False, read_later: bool = False
) -> None:
    """Set what the locked task waits for next, from its rows as they are now.

    A create is settled by its own step alone: one that waits is made due at once, unless for slots; one in flight is
    left to its owner. A read or a finish in flight started from rows that have just changed: its claim is taken
    away, so that it settles nothing, and the step is due anew. A read that comes sooner than the next is not put off.
    `read_later`: a read comes first, as late as the first poll of a task does.
    """
    if task.deleted_at is not None:
        _rest(session, task)
        return
    if task.step is Step.CREATE:
        if task.lease is None and task.queued_at is None:
            claims.hasten(task)
        return
    following = states.next_step(_facts_now(session, task), schedule.poll_delay(task.polls))
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
    """Whether the locked task is in nobody's hands and waits for this step as it is: a read, for none that is later."""
    if task.lease is not None or task.step is not following.step:
        return False
    if following.step is Step.READ:
        return wants_read(session, task, within_seconds=following.delay_seconds)
    return task.due_at is not None


def _rest(session: Session, task: Task) -> None:
    """A deleted task waits for nothing, whatever is reported of it."""
    task.step = None
    claims.rest(task)
    session.flush()


def wants_read(session: Session, task: Task, *, within_seconds: float = 0) -> bool:
    """Whether a read of the locked task waits and is due by now, or within some seconds."""
    if task.step is not Step.READ:  # nearly always: then there is nothing to ask
        return False
    waits = (Task.id == task.id, Task.step == Step.READ, col(Task.lease).is_(None))
    return session.exec(select(Task.id).where(*waits, col(Task.due_at) <= db_now(within_seconds))).first() is not None


_NOW = sqlalchemy.select(db_now())


def now(session: Session) -> datetime:
    """The database's time."""
    moment: datetime = run(session, _NOW).scalar_one()
    return moment


def newest(session: Session, limit: int, *, skip: int = 0, of_client: str | None = None) -> list[Task]:
    """The newest tasks, newest first, after the `skip` newest, which are read in the index alone.
    `of_client`: only those that it asked for; None: all.
    """
    wanted = [] if of_client is None else [Task.client == of_client]
    order = (col(Task.created_at).desc(), col(Task.id).desc())
    ids = select(Task.id).where(*wanted).order_by(*order).limit(limit).offset(skip).subquery()
    return list(session.exec(select(Task).where(col(Task.id).in_(select(ids.c.id))).order_by(*order)))
