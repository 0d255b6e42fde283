"""Maintenance of rows by an operator: retry, dismiss, reconcile, adopt, reprocess deliveries.

Queries and updates only. Sessions are passed in and callers own the transaction. Rows that a worker holds are left
alone, except by `dismiss`. Rows that wait for a worker afterwards are due now.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, exists, func, literal, literal_column, union, update
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from storage import states
from storage.accounts import pauses
from storage.accounts.accepted_creates import ENDED_WITHOUT_ANSWER, may_prove_accepted, was_accepted
from storage.database import walk
from storage.database.sessions import Database, run
from storage.operations import lists
from storage.rows import claims, reports, tasks
from storage.rows.deliveries import compare_again
from storage.rows.events import EventName, record
from storage.rows.models import Asset, Callback, Task
from storage.rows.task_conditions import DISMISSED, IS_PARKED, is_dismissed, not_dismissed
from storage.states import ArchiveState, AssetState, CallbackState, Report, Step, TaskState

# Rows changed in one transaction. It takes about 10 ms, in which no one else can write on SQLite.
BATCH = 1_000
# Failed rows that one read looks at, each with its task or files: 2 to 3 ms with a million tasks, and 10 to 13 for a
# thousand.
PART = 250


# -- retry ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retried:
    """What a retry made due: the number of files, and the task's step. `reason`: why nothing was changed."""

    files: int = 0
    step: Step | None = None
    reason: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        return {"files_due": self.files, **({f"{self.step}s_due": 1} if self.step else {})}


def retry(session: Session, task: Task, schedule: reports.Schedule) -> Retried:
    """Make the waiting step and the given-up files of a locked task due. A failed create is never sent again.

    A failed task is read once more, because a success ranks above a failure. So is one whose create was refused, if a
    delivery has made it due for a read.
    """
    if task.deleted_at is not None:
        return Retried(reason="deleted")
    if task.state not in states.TERMINAL:
        return _make_due_now(session, task)
    if task.state is TaskState.FAILED:
        return _read_failed(session, task, schedule)
    if task.archive is ArchiveState.ARCHIVED:
        return Retried(reason="archived already")
    assets = tasks.assets_of(session, task.id)
    files = retry_files(session, task, [asset.id for asset in assets], schedule)
    if not files and task.archive is ArchiveState.INCOMPLETE:
        task.archive, task.note = ArchiveState.ARCHIVING, None
        task.completeness_reads = task.completeness_reads if assets else 0  # without a file, all reads start again
        reports.reschedule(session, task, schedule)
        return Retried(step=task.step)
    own = _make_due_now(session, task)
    return Retried(files, own.step, None if files else own.reason)


def retry_files(
    session: Session,
    task: Task,
    ids: Sequence[uuid.UUID],
    schedule: reports.Schedule,
    *,
    accept_unverified: bool = False,
) -> int:
    """Make these files of a locked task due, if they failed or wait. Returns how many.

    An incomplete archive is archiving again. `accept_unverified`: archive a file even if its structure is broken.
    """
    open_states = (AssetState.DUE, AssetState.FAILED)
    chosen = update(Asset).where(col(Asset.id).in_(ids), col(Asset.task_id) == task.id)
    chosen = chosen.where(col(Asset.state).in_(open_states), col(Asset.lease).is_(None))
    values: dict[str, Any] = {"state": AssetState.DUE, **claims.DUE_NOW, "error": None}
    values |= {"unusable_since": None, "unusable_tries": 0}
    if accept_unverified:
        values["accept_unverified"] = True
    count = run(session, chosen.values(**values)).rowcount
    if count:
        if task.archive is ArchiveState.INCOMPLETE:
            task.archive, task.note = ArchiveState.ARCHIVING, None
        if task.step is not Step.READ:  # a read schedules the next step itself; a finish would come too early
            reports.reschedule(session, task, schedule)
    session.flush()
    return count


def _make_due_now(session: Session, task: Task) -> Retried:
    if task.queued_at is not None:
        paused = "; ".join(pauses.line(each) for each in pauses.holding(session, task))
        return Retried(reason=f"queued: {paused or 'all slots of the account are in use; it starts when one is free'}")
    if task.lease is not None or task.step is None:
        return Retried(reason="a worker holds it; retry when it has finished")
    claims.make_due(task)
    session.flush()
    return Retried(step=task.step)


def _read_failed(session: Session, task: Task, schedule: reports.Schedule) -> Retried:
    if not was_accepted(task):
        if task.step is Step.READ:  # a delivery says that the provider has it
            return _make_due_now(session, task)
        if may_prove_accepted(session, task):
            return Retried(reason="a delivery of it waits for a worker, which decides whether the task is read; "
                                  "`receiver status` shows what came of it")  # fmt: skip
        return Retried(reason="its create failed and only `receiver submit` sends: use --adopt and the same request, "
                              "or another id")  # fmt: skip
    if task.lease is not None:
        return Retried(reason="a worker holds it; retry when it has finished")
    if is_dismissed(task):
        task.archive, task.note = ArchiveState.NONE, None
    reports.reschedule(session, task, schedule, read_now=True)
    return Retried(step=task.step)


def failed_files(
    database: Database, *, since: datetime | None, error: str | None, limit: int
) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """(task id, asset id) of files that were given up or are unusable and not dismissed, the oldest first.

    `since`: only of tasks created then or later. `error`: only where the error contains this text, ignoring case.
    """
    order = (col(Asset.created_at), col(Asset.id))
    wanted = [col(Task.deleted_at).is_(None), *_failed_since(since), *_saying(Asset.error, error)]
    chosen = select(Asset.task_id, Asset.id).join(Task, col(Task.id) == col(Asset.task_id)).order_by(*order)
    chosen = chosen.where(*wanted)
    with database.read() as session:  # few rows
        found = list(session.exec(chosen.where(col(Asset.unusable_since).is_not(None), not_dismissed(Asset.error))))
    made = [] if since is None else [col(Asset.created_at) >= since]  # after its task
    for part, _ in walk.parts(database, order, PART, lists.GIVEN_UP, *made):
        if len(found) >= limit:
            break
        with database.read() as session:
            found += session.exec(chosen.where(*part, col(Asset.unusable_since).is_(None)))
    return found[:limit]


def failed_tasks(database: Database, *, since: datetime | None, error: str | None, limit: int) -> list[uuid.UUID]:
    """Tasks that a retry may still complete: parked ones, succeeded ones without files, silent ones, and
    creates that ended before it was known whether they arrived, which are only read.

    Tasks that the provider failed are left out, because that is final. The arguments are those of `failed_files`.
    """
    incomplete = col(Task.archive) == literal_column(f"'{ArchiveState.INCOMPLETE}'")
    failed = col(Task.state) == literal_column(f"'{TaskState.FAILED}'")
    without_files = and_(col(Task.state) == TaskState.SUCCEEDED, ~exists().where(col(Asset.task_id) == col(Task.id)))
    said = _saying(func.coalesce(Task.error, Task.note), error)
    chosen = select(Task.created_at, Task.id).where(not_dismissed(Task.note), col(Task.deleted_at).is_(None), *said)
    found = set[tuple[datetime, uuid.UUID]]()
    kinds = ((incomplete, without_files), (failed, ENDED_WITHOUT_ANSWER), (IS_PARKED, col(Task.step).is_not(None)))
    for in_index, wanted in kinds:
        some = set[tuple[datetime, uuid.UUID]]()
        order = (col(Task.created_at), col(Task.id))
        for part, _ in walk.parts(database, order, PART, in_index, *_failed_since(since)):
            if len(some) >= limit:
                break
            with database.read() as session:
                some.update(session.exec(chosen.where(*part, wanted)))
        found |= some
    return [task_id for _, task_id in sorted(found)[:limit]]


def _failed_since(since: datetime | None) -> list[Any]:
    return [] if since is None else [col(Task.created_at) >= since]


def _saying(column: Any, text: str | None) -> list[Any]:
    return [] if text is None else [func.lower(column).contains(text.lower(), autoescape=True)]


# -- dismiss ----------------------------------------------------------------------------------------------------------


def dismiss(session: Session, task: Task, reason: str, schedule: reports.Schedule) -> int:
    """End a locked task that cannot be completed. Returns how many files were given up.

    A task that the provider has not ended is failed here through `reports.apply`; a later success still wins. A worker
    that holds one of its rows loses the lease and changes nothing. Archived files stay; `retry` undoes the rest.

    A failed task keeps its states: it has no archive that could be incomplete.
    """
    note = DISMISSED + reason
    held = [task.due_at] if task.lease and task.step is Step.FINISH else []
    task.step = None
    claims.rest(task)
    compare_again(session, task)
    if task.state is TaskState.FAILED:
        task.note = note
        session.flush()
        return 0
    if task.state not in states.TERMINAL:
        failure = Report(None, None, TaskState.FAILED, message=note)
        reports.apply(session, task, failure, schedule, now=tasks.now(session), pushed=False)
    waiting = [asset for asset in tasks.assets_of(session, task.id) if asset.state is AssetState.DUE]
    held += [asset.due_at for asset in waiting if asset.lease]
    for asset in waiting:
        fact = {"kind": asset.kind, "index": asset.index, "error": asset.error, "reason": reason}
        record(session, EventName.ASSET_FAILED, task.id, fact)
    not_archived = update(Asset).where(col(Asset.task_id) == task.id, col(Asset.state) != AssetState.ARCHIVED)
    before = func.coalesce(literal(" (") + col(Asset.error) + ")", "")
    values: dict[str, Any] = {"state": AssetState.FAILED, "error": literal(note) + before, **claims.NOT_DUE}
    values |= {"unusable_since": None, "unusable_tries": 0}
    run(session, not_archived.values(**values))
    task.archive, task.note, task.step = ArchiveState.INCOMPLETE, note, None
    claims.rest(task)
    ended: dict[str, Any] = {"reason": reason, "given_up": len(waiting)}
    if held:  # a worker may still be storing an object; `delete` waits for the end of its lease
        ended["held_until"] = max(filter(None, held)).isoformat()
    record(session, EventName.TASK_INCOMPLETE, task.id, ended)
    session.flush()
    return len(waiting)


def dismiss_deliveries(session: Session, ids: Sequence[int], reason: str) -> set[int]:
    """End the alarm of those of these deliveries that match no task. Returns their ids.

    They stay unmatched, so they are still applied when a task with their ids appears; `put_back` undoes it.
    """
    chosen = update(Callback).where(col(Callback.id).in_(ids), col(Callback.state) == CallbackState.UNMATCHED)
    chosen = chosen.where(not_dismissed(Callback.reason))
    return set(run(session, chosen.values(reason=DISMISSED + reason).returning(col(Callback.id))).scalars())


# -- reconcile --------------------------------------------------------------------------------------------------------


def unfinished(session: Session) -> list[uuid.UUID]:
    """Ids of all tasks that wait for the provider's result, sorted. Unsent tasks have another step."""
    waiting = (_waiting_for(Step.READ, way) for way in (col(Task.due_at).is_not(None), IS_PARKED))
    found = union(*(each.where(col(Task.state).not_in(states.TERMINAL)) for each in waiting))
    return sorted(session.execute(found).scalars())


def _waiting_for(step: Step, way: Any) -> Any:
    """Ids of tasks that wait for this step. `way`: due, queued or parked, each with an index of few rows."""
    return select(Task.id).where(way, col(Task.step) == literal_column(f"'{step}'"))


def make_reads_due(session: Session, ids: Sequence[uuid.UUID]) -> int:
    """Make the waiting reads of these tasks due now, except those that a worker holds. Returns how many."""
    chosen = update(Task).where(col(Task.id).in_(ids), col(Task.step) == Step.READ, col(Task.lease).is_(None))
    return run(session, chosen.values(claims.DUE_NOW)).rowcount


def adopt(session: Session, task: Task, report: Report, schedule: reports.Schedule) -> bool:
    """Insert a task that was created elsewhere and apply `report` to it. Returns False when its id is taken.

    Its files are due, or it is read until it ends. It is never sent.
    """
    now = tasks.now(session)
    task.created_at = task.sent_at = task.submitted_at = min(now, report.created_at or now)
    if not tasks.insert_new(session, task):
        return False
    row = tasks.lock_existing(session, task.id)
    reports.apply(session, row, report, schedule, now=now, pushed=False)
    return True


def count_unsent(session: Session) -> int:
    """How many tasks wait for their create."""
    ways = (col(Task.due_at).is_not(None), col(Task.queued_at).is_not(None), IS_PARKED)
    found = union(*(_waiting_for(Step.CREATE, way) for way in ways)).subquery()
    return session.exec(select(func.count()).select_from(found)).one()


# -- replay -----------------------------------------------------------------------------------------------------------


def deliveries(session: Session, *within: Any, state: CallbackState | None = None) -> list[Callback]:
    """Stored deliveries that satisfy all these conditions, at most a batch, the oldest first.

    Their bodies are not loaded, because a batch of the largest takes 250 MB.
    """
    body: Any = Callback.body
    found = select(Callback).options(defer(body, raiseload=True)).where(*within)
    if state is not None:
        found = found.where(Callback.state == state)
    return list(session.exec(found.order_by(col(Callback.received_at), col(Callback.id)).limit(BATCH)))


def received(database: Database, since: datetime | None, until: datetime | None) -> Iterator[list[Any]]:
    """Conditions of `deliveries` for all that were pushed from `since` to before `until`, one batch after the other."""
    came = col(Callback.received_at)
    within = [*([] if since is None else [came >= since]), *([] if until is None else [came < until])]
    for part, _ in walk.parts(database, (came, col(Callback.id)), BATCH, *within):
        yield [*part, Callback.source == "push"]


def put_back(session: Session, ids: Sequence[int], *, webhook_id: str | None = None) -> int:
    """Set deliveries back to `received`, due now, unless a worker holds them. Returns how many.

    `webhook_id`: the id of a delivery whose signature is verified only now.
    """
    chosen = update(Callback).where(col(Callback.id).in_(ids), col(Callback.lease).is_(None))
    values: dict[str, Any] = {"state": CallbackState.RECEIVED, **claims.DUE_NOW}
    if webhook_id is not None:
        values["webhook_id"] = webhook_id
    return run(session, chosen.values(**values, reason=None, applied_at=None)).rowcount
