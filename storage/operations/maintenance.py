"""What an operator may do to rows: bring work back, put deliveries back, end alarms, forget what is old.

Queries and updates alone: sessions are passed in, callers own the transaction. Rows that a worker holds are left to
it, except by `dismiss`. What waits for a worker afterwards is due now.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, and_, delete, exists, func, literal, or_, update
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from storage import states
from storage.operations import outbox
from storage.rows import claims, tasks
from storage.rows.events import EventName, record
from storage.rows.models import Asset, Callback, Dispatch, Event, Task
from storage.rows.task_conditions import DISMISSED, IS_OVER, not_dismissed
from storage.states import ArchiveState, AssetState, CallbackState, Report, Step, TaskState

# So many rows are changed in one transaction: some 10 ms, in which nobody else can write on SQLite.
BATCH = 1_000


# -- retry ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retried:
    """What a retry made due: how many files, and the task's own step. `reason`: why something was left alone."""

    files: int = 0
    step: Step | None = None
    reason: str | None = None


def retry(session: Session, task: Task, schedule: tasks.Schedule) -> Retried:
    """Make everything of a locked task due that waits or was given up. A create that failed is never sent again.

    A failed task is read once: ranks only rise, but a success that came after all still wins.
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
        task.completeness_reads = task.completeness_reads if assets else 0  # none came: ask as if for the first time
        tasks.reschedule(session, task, schedule)
        return Retried(step=task.step)
    own = _make_due_now(session, task)
    return Retried(files, own.step, None if files else own.reason)


def retry_files(
    session: Session, task: Task, ids: Sequence[uuid.UUID], schedule: tasks.Schedule, *, accept_unverified: bool = False
) -> int:
    """Make these files of a locked task due, if they failed or wait. Returns how many.

    An archive that had ended goes on. `accept_unverified`: a file whose structure is broken is kept as it is.
    """
    open_states = (AssetState.DUE, AssetState.FAILED)
    chosen = update(Asset).where(col(Asset.id).in_(ids), col(Asset.task_id) == task.id)
    chosen = chosen.where(col(Asset.state).in_(open_states), col(Asset.lease).is_(None))
    values: dict[str, Any] = {"state": AssetState.DUE, **claims.AFRESH, "error": None}
    if accept_unverified:
        values["accept_unverified"] = True
    count = _execute(session, chosen.values(**values))
    if count:
        if task.archive is ArchiveState.INCOMPLETE:
            task.archive, task.note = ArchiveState.ARCHIVING, None
        if task.step is not Step.READ:  # a read looks at the files itself when it ends; a finish would come too early
            tasks.reschedule(session, task, schedule)
    session.flush()
    return count


def _make_due_now(session: Session, task: Task) -> Retried:
    """Whatever the task waits for, now."""
    if task.queued_at is not None:
        return Retried(reason="it waits for its turn: all slots of the account are held")
    if task.lease is not None or task.step is None:
        return Retried(reason="a worker is at it")
    claims.make_due(task)
    session.flush()
    return Retried(step=task.step)


def _read_failed(session: Session, task: Task, schedule: tasks.Schedule) -> Retried:
    if task.provider_task_id is None:
        return Retried(reason="its create failed, and only `receiver submit` sends: with --adopt and the same request, "
                              "or with another id")  # fmt: skip
    if task.lease is not None:
        return Retried(reason="a worker is at it")
    if task.archive is ArchiveState.INCOMPLETE:  # dismissed
        task.archive, task.note = ArchiveState.NONE, None
    tasks.reschedule(session, task, schedule, read_now=True)
    return Retried(step=task.step)


def failed_files(
    session: Session, *, since: datetime | None, error: str | None, limit: int
) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """(task, asset) of files that were given up, those of the oldest tasks first; dismissed ones left out.

    `since`: only of tasks created then or later. `error`: only where the error contains this text, in any case.
    """
    found = select(Asset.task_id, Asset.id).join(Task, col(Task.id) == col(Asset.task_id))
    found = found.where(Asset.state == AssetState.FAILED, not_dismissed(Asset.error), col(Task.deleted_at).is_(None))
    found = found.where(*_failed_since(since), *_saying(Asset.error, error))
    return list(session.exec(found.order_by(col(Task.created_at), col(Task.id), col(Asset.id)).limit(limit)))


def failed_tasks(
    session: Session, *, silent: str, since: datetime | None, error: str | None, limit: int
) -> list[uuid.UUID]:
    """Tasks that may still be mended: parked ones, and those that brought no file or fell silent.

    What the provider failed is left alone: that is its last word.
    `silent`: the error of a task that never reported. The rest as in `failed_files`.
    """
    empty = and_(
        col(Task.state) == TaskState.SUCCEEDED,
        col(Task.archive) == ArchiveState.INCOMPLETE,
        ~exists().where(col(Asset.task_id) == col(Task.id)),
    )
    mute = and_(col(Task.state) == TaskState.FAILED, col(Task.error) == silent, col(Task.provider_task_id).is_not(None))
    parked = and_(col(Task.step).is_not(None), col(Task.due_at).is_(None), col(Task.queued_at).is_(None))
    found = select(Task.id).where(or_(empty, mute, parked), not_dismissed(Task.note), *_failed_since(since))
    found = found.where(col(Task.deleted_at).is_(None))
    found = found.where(*_saying(func.coalesce(Task.error, Task.note), error))
    return list(session.exec(found.order_by(col(Task.created_at)).limit(limit)))


def _failed_since(since: datetime | None) -> list[Any]:
    return [] if since is None else [col(Task.created_at) >= since]


def _saying(column: Any, text: str | None) -> list[Any]:
    return [] if text is None else [func.lower(column).contains(text.lower(), autoescape=True)]


# -- dismiss ----------------------------------------------------------------------------------------------------------


def dismiss(session: Session, task: Task, reason: str, schedule: tasks.Schedule) -> int:
    """End a locked task that cannot be completed: nothing of it waits any more. Returns how many files were given up.

    One that the provider has not ended is failed here, through the apply step: a success that comes after all still
    wins. Work in flight loses its claim and changes no row. What is archived stays; `retry` brings the rest back.
    """
    words = DISMISSED + reason
    task.step = None
    claims.rest(task)
    if task.state not in states.TERMINAL:
        failure = Report(None, None, TaskState.FAILED, message=words)
        tasks.apply(session, task, failure, schedule, now=tasks.now(session), pushed=False)
    waiting = [asset for asset in tasks.assets_of(session, task.id) if asset.state is AssetState.DUE]
    for asset in waiting:
        fact = {"kind": asset.kind, "index": asset.index, "error": asset.error, "reason": reason}
        record(session, EventName.ASSET_FAILED, task.id, fact)
    unkept = update(Asset).where(col(Asset.task_id) == task.id, col(Asset.state) != AssetState.ARCHIVED)
    before = func.coalesce(literal(" (") + col(Asset.error) + ")", "")
    _execute(session, unkept.values(state=AssetState.FAILED, error=literal(words) + before, **claims.AT_REST))
    task.archive, task.note, task.step = ArchiveState.INCOMPLETE, words, None
    claims.rest(task)
    record(session, EventName.TASK_INCOMPLETE, task.id, {"reason": reason, "given_up": len(waiting)})
    session.flush()
    return len(waiting)


# -- reconcile --------------------------------------------------------------------------------------------------------


def unfinished(session: Session, after: uuid.UUID | None = None, limit: int = BATCH) -> list[uuid.UUID]:
    """Tasks the provider may still have news of, by id from `after` on. Those not sent yet have a step of their own."""
    found = select(Task.id).where(col(Task.state).not_in(states.TERMINAL), Task.step == Step.READ)
    if after is not None:
        found = found.where(col(Task.id) > after)
    return list(session.exec(found.order_by(col(Task.id)).limit(limit)))


def make_reads_due(session: Session, ids: Sequence[uuid.UUID]) -> int:
    """Make the waiting reads of these tasks due now; one in flight is left to its owner. Returns how many."""
    chosen = update(Task).where(col(Task.id).in_(ids), col(Task.step) == Step.READ, col(Task.lease).is_(None))
    return _execute(session, chosen.values(claims.AFRESH))


def adopt(session: Session, task: Task, report: Report, schedule: tasks.Schedule) -> bool:
    """Insert a task that was made elsewhere, with all that `report` says of it. Returns False when its id is taken.

    It goes on from its row: its files are due, or it is read until it ends. It is never sent.
    """
    if not tasks.insert_new(session, task):
        return False
    row = tasks.lock(session, task.id)
    assert row is not None
    tasks.apply(session, row, report, schedule, now=tasks.now(session), pushed=False)
    return True


def count_unsent(session: Session) -> int:
    """How many tasks wait for their create."""
    return session.exec(select(func.count()).where(Task.step == Step.CREATE)).one()


# -- replay -----------------------------------------------------------------------------------------------------------


def deliveries(
    session: Session,
    *,
    ids: Sequence[int] = (),
    since: datetime | None = None,
    until: datetime | None = None,
    state: CallbackState | None = None,
    after: int = 0,
    limit: int = BATCH,
) -> list[Callback]:
    """Stored deliveries by id from `after` on: these `ids`, or the pushed ones received from `since` up to `until`.

    Their bodies are not loaded: a batch of the largest would be 250 MB.
    """
    body: Any = Callback.body
    found = select(Callback).options(defer(body, raiseload=True)).where(col(Callback.id) > after)
    found = found.where(col(Callback.id).in_(ids)) if ids else found.where(Callback.source == "push")
    if since is not None:
        found = found.where(Callback.received_at >= since)
    if until is not None:
        found = found.where(Callback.received_at < until)
    if state is not None:
        found = found.where(Callback.state == state)
    return list(session.exec(found.order_by(col(Callback.id)).limit(limit)))


def put_back(session: Session, ids: Sequence[int], *, webhook_id: str | None = None) -> int:
    """Set deliveries back to `received`, due now, unless somebody works on them. Returns how many.

    `webhook_id`: of one whose signature was verified now.
    """
    chosen = update(Callback).where(col(Callback.id).in_(ids), col(Callback.lease).is_(None))
    values: dict[str, Any] = {"state": CallbackState.RECEIVED, **claims.AFRESH}
    if webhook_id is not None:
        values["webhook_id"] = webhook_id
    return _execute(session, chosen.values(**values, reason=None, applied_at=None))


# -- prune ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prunable:
    """One kind of thing that is pruned: rows of `model` for which `old` holds; `values` None = the rows go."""

    name: str
    model: Any
    old: ColumnElement[bool]
    values: dict[str, Any] | None = None


def prunable(session: Session, before: datetime) -> list[Prunable]:
    """What may be forgotten of the time before `before`: nothing of a task that is not over, and nothing that waits.

    A delivery to the account's own URL does not say whose it is: it is kept while any task is not over that was
    there when it came. An event that a sink has not got yet is kept, and one that has no number: no reader saw it.
    With a request goes where its client wanted to be called back, which may hold a secret; not before it was.
    """
    oldest = session.exec(select(func.min(Task.created_at)).where(~IS_OVER)).one()
    unnamed = col(Callback.received_at) < min(before, oldest or before)
    settled = and_(
        col(Callback.state) != CallbackState.RECEIVED,
        col(Callback.due_at).is_(None),
        col(Callback.received_at) < before,
        or_(col(Callback.task_id).is_not(None), unnamed),
        _is_over(Callback.task_id),
    )
    told = and_(
        col(Event.at) < before,
        col(Event.seq).is_not(None),
        _is_over(Event.task_id),
        ~exists().where(col(Dispatch.event_id) == col(Event.id), outbox.IS_OPEN),
    )
    of_told = exists().where(col(Event.id) == col(Dispatch.event_id), told)
    ended_at = func.coalesce(Task.archived_at, Task.completed_at, Task.created_at)
    untold = or_(
        exists().where(col(Dispatch.task_id) == col(Task.id), outbox.IS_OPEN),
        exists().where(col(Event.task_id) == col(Task.id), col(Event.seq).is_(None)),
    )
    filled = or_(col(Task.request) != {}, col(Task.client_callback_url).is_not(None))
    asked = and_(IS_OVER, ended_at < before, filled, ~untold)
    return [
        Prunable("deliveries", Callback, settled),
        Prunable("dispatches", Dispatch, and_(~outbox.IS_OPEN, of_told)),
        Prunable("events", Event, told),
        Prunable("requests", Task, asked, {"request": {}, "client_callback_url": None}),
    ]


def _is_over(task_id: Any) -> Any:
    return ~exists().where(col(Task.id) == task_id, ~IS_OVER)


def count_old(session: Session, kind: Prunable) -> int:
    """How many rows `prune` would take."""
    return session.exec(select(func.count()).select_from(kind.model).where(kind.old)).one()


def old_ids(session: Session, kind: Prunable, after: Any = None) -> list[Any]:
    """The next rows to prune, at most a batch, by id from `after` on."""
    found = select(kind.model.id).where(kind.old)
    if after is not None:
        found = found.where(kind.model.id > after)
    return list(session.exec(found.order_by(kind.model.id).limit(BATCH)))


def prune(session: Session, kind: Prunable, ids: Sequence[Any]) -> int:
    """Forget these rows, or what `kind` empties in them, where it is still so. Returns how many."""
    model = kind.model
    statement: Any = delete(model) if kind.values is None else update(model).values(**kind.values)
    return _execute(session, statement.where(model.id.in_(ids), kind.old))


def _execute(session: Session, statement: Any) -> int:
    result = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount
