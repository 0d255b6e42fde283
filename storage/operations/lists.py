"""Lists that page by key: newest first, a bounded number of rows per page, no count over a table.

A filter on a state, a model or words of a prompt has no index of its own. It is applied to the newest `SCANNED` rows
behind the cursor. A page with too few matches says how far back it searched, and the next page continues there.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import and_, func, literal_column, or_, text
from sqlalchemy.orm import aliased, defer
from sqlmodel import Session, col, select

from storage.accounts import batches
from storage.filters import DeliveryFilter, Fault, FilterInvalid, TaskFilter, day_of, is_plain, number
from storage.operations import deadlines
from storage.rows import aliases, tasks
from storage.rows.deliveries import NOT_BELIEVED
from storage.rows.events import PERSON_ACTED
from storage.rows.models import Asset, Batch, Callback, Dispatch, Event, Task
from storage.rows.task_conditions import not_dismissed
from storage.states import UNMATCHED, ArchiveState, AssetState, CallbackState, TaskState

K = TypeVar("K")

PAGE = 50
# Rows searched by the index of creation times: 20 to 60 ms with a million tasks, on either database.
SCANNED = 10_000
# The columns that filters need.
WINDOW = ("id", "created_at", "state", "archive", "provider", "external_task_id")
# The newest rows of one task. A task that ends well has six and one for each file.
SHOWN_EVENTS = 200
# Files that such a filter reads. Their tasks are looked up one by one.
WITH_FILES = 1_000
# States of a delivery whose report was not applied.
REFUSED = (CallbackState.REJECTED, CallbackState.UNREADABLE)

# Files that were given up and not dismissed, of which a person has to decide. SQLite needs the exact words of the index
# `asset_given_up`.
GIVEN_UP: Any = (col(Asset.state) == literal_column(f"'{AssetState.FAILED}'")) & not_dismissed(Asset.error)


@dataclass
class Page:
    """`rows`: newest first. `further`: the next page's cursor; `looked_until`: set if the search ended at its bound."""

    rows: Sequence[Any] = field(default_factory=list)
    further: str | None = None
    looked_until: datetime | None = None


def newest_tasks(
    session: Session,
    wanted: TaskFilter,
    before: str | None,
    limit: int = PAGE,
    *,
    kept: bool = False,
    lead_seconds: float = deadlines.LEAD_SECONDS,
) -> Page:
    """One page of tasks. `before`: the cursor of the page before. `kept`: only tasks that may have archived files.
    `lead_seconds`: how close to their deletion files are expiring.
    """
    asks_request = ("request",) if wanted.q or wanted.model else ()  # SQLite copies the columns of a window
    found: Any = select(*(getattr(Task, name) for name in (*WINDOW, *asks_request)))
    found = found.where(*_in_reach(session, wanted, lead_seconds))
    found = found.where(*_behind(Task.created_at, Task.id, _cursor(before, uuid.UUID)))
    ordered = found.order_by(col(Task.created_at).desc(), col(Task.id).desc())
    # Without a condition of its own the outer query would only make SQLite sort the whole window.
    narrow = bool(_matching(Task, wanted, kept))
    window = ordered.limit(SCANNED if narrow else limit + 1).subquery()
    chosen = select(window.c.id, window.c.created_at).where(*_matching(window.c, wanted, kept))
    chosen = chosen.order_by(window.c.created_at.desc(), window.c.id.desc()).limit(limit + 1)
    keys = session.execute(chosen).all()
    rows = {
        row.id: row for row in session.scalars(select(Task).where(col(Task.id).in_([key.id for key in keys[:limit]])))
    }
    page = Page([rows[key.id] for key in keys[:limit] if key.id in rows])
    if len(keys) > limit:
        page.further = _cursor_text(keys[limit - 1].created_at, keys[limit - 1].id)
    elif narrow:
        # From the index alone, because a query on the window would compute it a second time.
        last = ordered.with_only_columns(col(Task.id), col(Task.created_at))
        if end := session.execute(last.offset(SCANNED - 1).limit(1)).first():
            page.further, page.looked_until = _cursor_text(end.created_at, end.id), end.created_at
    return page


def first_files(page: Page, counts: Mapping[uuid.UUID, int], most: int) -> Page:
    """The first tasks of a page that have at most this many files together, and the cursor behind them."""
    kept, files = list[Task](), 0
    for task in page.rows:
        files += counts.get(task.id, 0)
        if kept and files > most:
            return Page(kept, _cursor_text(kept[-1].created_at, kept[-1].id))
        kept.append(task)
    return page


def _in_reach(session: Session, wanted: TaskFilter, lead_seconds: float) -> list[Any]:
    """Conditions that an index answers."""
    conditions: list[Any] = []
    since, until = day_of(wanted.since), day_of(wanted.until)
    if since:
        conditions.append(col(Task.created_at) >= since)
    if until:
        conditions.append(col(Task.created_at) < until + timedelta(days=1))
    if wanted.batch:
        batch = batches.find(session, wanted.batch)
        if batch is None:
            raise FilterInvalid(Fault("batch", "absent"))
        conditions.append(col(Task.batch_id) == batch.id)
    # Literals: SQLite uses no partial index for a parameter.
    if wanted.state == TaskState.FAILED:
        conditions.append(col(Task.state) == literal_column(f"'{TaskState.FAILED}'"))
    if wanted.archive == ArchiveState.INCOMPLETE:
        conditions.append(col(Task.archive) == literal_column(f"'{ArchiveState.INCOMPLETE}'"))
    if wanted.files:
        conditions.append(col(Task.id).in_(_tasks_with_files(session, wanted.files, lead_seconds)))
    return conditions


def _tasks_with_files(session: Session, files: str, lead_seconds: float) -> list[uuid.UUID]:
    """The ids of tasks for a filter's `files`, by the index of each kind. They are read first, because as a part of the
    page's query they could make a planner walk all tasks.
    """
    if files == "expiring":
        some = [select(Task.id).where(each).limit(WITH_FILES) for each in deadlines.near(lead_seconds)]
    elif files == "waiting":
        some = [waiting_files().limit(WITH_FILES)]
    else:
        failed = select(Asset.task_id).where(GIVEN_UP)
        some = [failed.order_by(col(Asset.created_at).desc()).limit(WITH_FILES)]
    return list({task_id for each in some for task_id in session.execute(each).scalars()})


def waiting_files() -> Any:
    """The tasks of files that failed and wait for their next try, one row a file."""
    waiting = (col(Asset.due_at).is_not(None), Asset.state == AssetState.DUE, col(Asset.error).is_not(None))
    return select(Asset.task_id).where(*waiting).limit(SCANNED)


def _matching(columns: Any, wanted: TaskFilter, kept: bool) -> list[Any]:
    """The other conditions, for rows that are in reach."""
    conditions = []
    if wanted.state and wanted.state != TaskState.FAILED:
        conditions.append(columns.state == TaskState(wanted.state))
    if wanted.archive and wanted.archive != ArchiveState.INCOMPLETE:
        conditions.append(columns.archive == ArchiveState(wanted.archive))
    if wanted.provider:
        conditions.append(columns.provider == wanted.provider)
    if wanted.model:
        conditions.append(columns.request["model_name"].as_string() == wanted.model)
    if wanted.q:
        words = wanted.q.lower()
        prompt = func.lower(columns.request["prompt"].as_string())
        named = func.lower(columns.external_task_id).contains(words, autoescape=True)
        conditions.append(or_(named, prompt.contains(words, autoescape=True)))
    if kept and wanted.archive != ArchiveState.INCOMPLETE:
        conditions.append(columns.archive != ArchiveState.NONE)
    return conditions


def exact(session: Session, words: str, providers: Sequence[str] = ()) -> Task | None:
    """The task with exactly this id: our own, or an id that one of these providers uses for it."""
    if not words or not is_plain(words):
        return None
    if found := tasks.by_name(session, words):
        return found
    owners = (aliases.by_provider_id(session, provider, words) for provider in providers)
    return next((session.get(Task, owner) for owner in owners if owner), None)


def dispatches_of(session: Session, events: Sequence[Event]) -> dict[int, list[Dispatch]]:
    """The dispatches of these events, by the event's id."""
    ids = [event.id for event in events[-SHOWN_EVENTS:]]
    found: dict[int, list[Dispatch]] = {}
    for row in session.scalars(select(Dispatch).where(col(Dispatch.event_id).in_(ids)).order_by(col(Dispatch.id))):
        found.setdefault(row.event_id, []).append(row)
    return found


def chosen_files(session: Session, ids: Collection[uuid.UUID]) -> tuple[list[Asset], list[str]]:
    """Those of these files that are archived, in the order of their keys, and a line for each other one, whose row
    `delete` may have removed.
    """
    kept = (col(Asset.id).in_(ids), Asset.state == AssetState.ARCHIVED, col(Asset.key).is_not(None))
    found = list(session.scalars(select(Asset).where(*kept).order_by(col(Asset.key))))
    absent = {*ids} - {asset.id for asset in found}
    return found, [f"file {each}: not archived, or deleted since" for each in sorted(absent)]


def batch_names(session: Session, rows: Sequence[Task]) -> dict[uuid.UUID, str]:
    """The names of these tasks' batches, by id."""
    ids = {row.batch_id for row in rows if row.batch_id}
    return dict(session.execute(select(Batch.id, Batch.name).where(col(Batch.id).in_(ids))).all()) if ids else {}


def is_kept(asset: Asset) -> bool:
    return asset.state is AssetState.ARCHIVED and bool(asset.key)


def kept_files_of(session: Session, rows: Sequence[Task]) -> dict[uuid.UUID, list[Asset]]:
    """The archived files of each of these tasks in reading order."""
    files = tasks.assets_of_all(session, [row.id for row in rows])
    return {task_id: [each for each in found if is_kept(each)] for task_id, found in files.items()}


def newest_batches(session: Session, before: str | None, limit: int = PAGE) -> Page:
    """One page of batches."""
    order = (col(Batch.created_at).desc(), col(Batch.id).desc())
    found = select(Batch).where(*_behind(Batch.created_at, Batch.id, _cursor(before, uuid.UUID)))
    rows = session.scalars(found.order_by(*order).limit(limit + 1)).all()
    further = _cursor_text(rows[limit - 1].created_at, rows[limit - 1].id) if len(rows) > limit else None
    return Page(rows[:limit], further)


# -- deliveries -------------------------------------------------------------------------------------------------------


def newest_deliveries(session: Session, wanted: DeliveryFilter, before: str | None, limit: int = PAGE) -> Page:
    """One page of (delivery, size of its body, external and own id of its task); bodies are not loaded."""
    found: Any = select(*(getattr(Callback, name) for name in ("id", "state", "provider", "reason", "received_at")))
    behind = _behind(Callback.received_at, Callback.id, _cursor(before, number))
    found = found.where(Callback.source == "push", *behind, *_deliveries_in_reach(session, wanted, behind))
    narrow = bool(_delivery_conditions(Callback, wanted))
    ordered = found.order_by(col(Callback.received_at).desc(), col(Callback.id).desc())
    window = ordered.limit(SCANNED if narrow else limit + 1).subquery()
    order = (window.c.received_at.desc(), window.c.id.desc())
    chosen = select(window.c.id, window.c.received_at).where(*_delivery_conditions(window.c, wanted))
    keys = session.execute(chosen.order_by(*order).limit(limit + 1)).all()
    page = Page(_deliveries(session, [key.id for key in keys[:limit]]))
    if len(keys) > limit:
        page.further = _cursor_text(keys[limit - 1].received_at, keys[limit - 1].id)
    elif narrow:
        last = ordered.with_only_columns(col(Callback.id), col(Callback.received_at))
        if end := session.execute(last.offset(SCANNED - 1).limit(1)).first():
            page.further, page.looked_until = _cursor_text(end.received_at, end.id), end.received_at
    return page


def _deliveries_in_reach(session: Session, wanted: DeliveryFilter, behind: Sequence[Any]) -> list[Any]:
    """Conditions that an index answers. `behind`: those of the cursor."""
    conditions: list[Any] = []
    since, until = day_of(wanted.since), day_of(wanted.until)
    if wanted.task:
        task = exact(session, wanted.task)
        if task is None:
            raise FilterInvalid(Fault("task", "absent"))
        # Read first, because as a part of the page's query they could make a planner walk all deliveries.
        newest = select(Callback.id).order_by(col(Callback.id).desc()).limit(SCANNED)
        some = [newest.where(each, *behind) for each in _belongs_to(task)]
        conditions.append(col(Callback.id).in_([number for each in some for number in session.scalars(each)]))
    if since:
        conditions.append(col(Callback.received_at) >= since)
    if until:
        conditions.append(col(Callback.received_at) < until + timedelta(days=1))
    # Literals, because SQLite uses no partial index for a parameter. Where very many rows have the state, a few of the
    # newest deliveries fill a page.
    waiting = and_(col(Callback.due_at).is_not(None), col(Callback.state) == literal_column("'received'"))
    unmatched = col(Callback.state) == literal_column("'unmatched'")
    in_index: dict[str, Any] = {"unmatched": text(UNMATCHED), "dismissed": unmatched, "received": waiting}
    if wanted.state in in_index:
        few = select(Callback.id).where(in_index[wanted.state])
        if len(session.scalars(few.limit(SCANNED + 1)).all()) <= SCANNED:
            conditions.append(col(Callback.id).in_(few.limit(SCANNED).subquery().select()))
    return conditions


def _delivery_conditions(columns: Any, wanted: DeliveryFilter) -> list[Any]:
    conditions = []
    if wanted.state == "refused":
        conditions.append(columns.state.in_(REFUSED))
    elif wanted.state in ("unmatched", "dismissed"):
        still = not_dismissed(columns.reason)
        conditions += [columns.state == CallbackState.UNMATCHED, still if wanted.state == "unmatched" else ~still]
    elif wanted.state:
        conditions.append(columns.state == CallbackState(wanted.state))
    if wanted.provider:
        conditions.append(columns.provider == wanted.provider)
    if wanted.cause:
        conditions.append(func.lower(columns.reason).contains(wanted.cause.lower(), autoescape=True))
    return conditions


def _belongs_to(task: Any) -> list[Any]:
    """How a delivery belongs to a task: its token names it, or it came to the account's URL and was applied to it. One
    that was not believed only claims to be about the task. An index answers each condition.
    """
    at_account = and_(col(Callback.task_id).is_(None), col(Callback.external_task_id) == task.external_task_id)
    was_applied = and_(col(Callback.state) == CallbackState.APPLIED, col(Callback.provider) == task.provider)
    was_believed = func.coalesce(Callback.reason, "").not_like(f"{NOT_BELIEVED}%")
    return [col(Callback.task_id) == task.id, and_(at_account, was_applied, was_believed)]


def _deliveries(session: Session, ids: Sequence[int]) -> list[tuple[Callback, int, str | None, uuid.UUID | None]]:
    body: Any = Callback.body
    by_token, by_body = owners = aliased(Task), aliased(Task)
    name, own_id = func.coalesce(*(each.external_task_id for each in owners)), func.coalesce(*(e.id for e in owners))
    found: Any = select(Callback, func.length(body), name, own_id).options(defer(body, raiseload=True))
    found = found.outerjoin(by_token, _belongs_to(by_token)[0]).outerjoin(by_body, _belongs_to(by_body)[1])
    found = found.where(col(Callback.id).in_(ids)).order_by(col(Callback.received_at).desc(), col(Callback.id).desc())
    return [tuple(each) for each in session.execute(found)]


def deliveries_of(session: Session, task: Task, limit: int) -> list[tuple[Callback, int]]:
    """The newest deliveries and reads of a task, each with the size of its body, which is not loaded. Those at the
    account's URL, where a stranger may name any task, are counted for themselves.
    """
    body: Any = Callback.body
    found = select(Callback, func.length(body)).options(defer(body, raiseload=True))
    newest = [found.where(each).order_by(col(Callback.id).desc()).limit(limit) for each in _belongs_to(task)]
    return [(row, size) for each in newest for row, size in session.execute(each)]


def task_of(session: Session, row: Callback) -> Task | None:
    """The task that a delivery belongs to."""
    if row.task_id is not None:
        return session.get(Task, row.task_id)
    is_applied = row.state is CallbackState.APPLIED and not (row.reason or "").startswith(NOT_BELIEVED)
    task = tasks.by_external_id(session, row.external_task_id or "") if is_applied else None
    return task if task and task.provider == row.provider else None


def outcome_of_replay(session: Session, number: int) -> Counter[tuple[str, CallbackState]] | None:
    """How many deliveries of a replay were in which state before and are in which state now. `number`: the id of its
    kept row; None if it is no replay.
    """
    act = session.get(Event, number)
    before: dict[str, str] = {} if act is None or act.name != PERSON_ACTED else act.data.get("before", {})
    found = select(Callback.id, Callback.state).where(col(Callback.id).in_([int(each) for each in before]))
    return Counter((before[str(each)], state) for each, state in session.execute(found)) if before else None


# -- cursors ----------------------------------------------------------------------------------------------------------


def _cursor_text(at: datetime, key: uuid.UUID | int) -> str:
    return f"{at.isoformat()}~{key.hex if isinstance(key, uuid.UUID) else key}"


def _cursor(text: str | None, read_key: Callable[[str], K]) -> tuple[datetime, K] | None:
    """The values of a cursor in an address, None without one. Raises FilterInvalid."""
    if not text:
        return None
    moment, _, key = text.partition("~")
    try:
        at = datetime.fromisoformat(moment)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC), read_key(key)
    except (ValueError, OverflowError):
        raise FilterInvalid(Fault("before", "page")) from None


def _behind(at: Any, key: Any, cursor: tuple[datetime, Any] | None) -> list[Any]:
    if cursor is None:
        return []
    moment, last = cursor
    return [at <= moment, or_(at < moment, key < last)]  # only the first condition can use the index
