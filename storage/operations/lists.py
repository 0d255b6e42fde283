"""Lists that page by key: newest first, a bounded number of rows looked through, no count over a table.

A filter on a state, a model or words of a prompt has no index of its own. It is applied to the newest `SCANNED` rows
behind the cursor; a page that comes out short says how far back it looked and goes on from there.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import func, or_
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from storage.accounts import batches
from storage.rows import tasks
from storage.rows.models import Asset, Callback, Task
from storage.states import ArchiveState, AssetState, CallbackState, TaskState

PAGE, MAX_PAGE = 50, 100
# 20,000 rows by the index of creation times take PostgreSQL 30 to 60 ms and SQLite 40 to 90 ms beside a million.
SCANNED = 20_000
# What filters look at.
WINDOW = ("id", "created_at", "state", "archive", "provider", "external_task_id", "request")
MAX_FIELD_CHARS = 200


@dataclass(frozen=True)
class TaskFilter:
    """What the address of a list asks for; an empty field asks for nothing. `q`: words in an id or in the prompt."""

    q: str = ""
    state: str = ""
    archive: str = ""
    provider: str = ""
    model: str = ""
    batch: str = ""
    since: str = ""
    until: str = ""

    @property
    def is_set(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))


@dataclass
class Page:
    """`rows`: newest first. `further`: the next page's cursor; `looked_until`: set when the scan ended at its bound."""

    rows: Sequence[Any] = field(default_factory=list)
    further: str | None = None
    looked_until: datetime | None = None


def read_filter(query: Mapping[str, str]) -> TaskFilter:
    """The filter in an address; what is too long or not printable counts as not given."""
    given = {each.name: query.get(each.name, "").strip() for each in fields(TaskFilter)}
    return TaskFilter(
        **{name: value for name, value in given.items() if len(value) <= MAX_FIELD_CHARS and value.isprintable()}
    )


def newest_tasks(
    session: Session, wanted: TaskFilter, before: str | None, limit: int = PAGE, *, kept: bool = False
) -> Page:
    """One page of tasks. `before`: the cursor of the page before. `kept`: only tasks that may have archived files."""
    found: Any = select(*(getattr(Task, name) for name in WINDOW))
    reach = _in_reach(session, wanted)
    if reach is None:
        return Page()
    found = found.where(*reach, *_behind(Task.created_at, Task.id, _task_cursor(before)))
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
        page.further = _cursor(keys[limit - 1])
    elif narrow:
        last = select(window.c.id, window.c.created_at).order_by(window.c.created_at.desc(), window.c.id.desc())
        if end := session.execute(last.offset(SCANNED - 1).limit(1)).first():
            page.further, page.looked_until = _cursor(end), end.created_at
    return page


def _in_reach(session: Session, wanted: TaskFilter) -> list[Any] | None:
    """Conditions that an index answers; None when nothing can match."""
    conditions: list[Any] = []
    since, until = _day(wanted.since), _day(wanted.until)
    if since:
        conditions.append(col(Task.created_at) >= since)
    if until:
        conditions.append(col(Task.created_at) < until + timedelta(days=1))
    if wanted.batch:
        batch = batches.find(session, wanted.batch)
        if batch is None:
            return None
        conditions.append(col(Task.batch_id) == batch.id)
    return conditions


def _matching(columns: Any, wanted: TaskFilter, kept: bool) -> list[Any]:
    conditions = []
    if wanted.state in list(TaskState):
        conditions.append(columns.state == TaskState(wanted.state))
    if wanted.archive in list(ArchiveState):
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
    if kept:
        conditions.append(columns.archive != ArchiveState.NONE)
    return conditions


def exact(session: Session, words: str, providers: Sequence[str] = ()) -> Task | None:
    """The task that has exactly this id: ours, or one that one of these providers calls it by."""
    if not words or len(words) > MAX_FIELD_CHARS:
        return None
    found = tasks.by_external_id(session, words)
    if found is not None:
        return found
    try:
        return session.get(Task, uuid.UUID(words))
    except ValueError:
        owners = (tasks.by_provider_id(session, provider, words) for provider in providers)
        return next((session.get(Task, owner) for owner in owners if owner), None)


def files_of(session: Session, rows: Sequence[Task]) -> dict[uuid.UUID, list[Asset]]:
    """The files of these tasks in reading order."""
    return batches.files_of(session, [row.id for row in rows])


def is_kept(asset: Asset) -> bool:
    return asset.state is AssetState.ARCHIVED and bool(asset.key)


# -- deliveries -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeliveryFilter:
    """`task`: the external id of the task that its token names. `cause`: words in the reason."""

    state: str = ""
    provider: str = ""
    cause: str = ""
    task: str = ""
    since: str = ""
    until: str = ""

    @property
    def is_set(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))


def read_delivery_filter(query: Mapping[str, str]) -> DeliveryFilter:
    given = {each.name: query.get(each.name, "").strip() for each in fields(DeliveryFilter)}
    return DeliveryFilter(**{name: value for name, value in given.items() if len(value) <= MAX_FIELD_CHARS})


def newest_deliveries(session: Session, wanted: DeliveryFilter, before: str | None, limit: int = PAGE) -> Page:
    """One page of (delivery, size of its body, external id of its task); bodies are not loaded."""
    found: Any = select(*(getattr(Callback, name) for name in ("id", "state", "provider", "reason", "received_at")))
    found = found.where(Callback.source == "push")
    if before and before.isascii() and before.isdigit() and len(before) <= 18:
        found = found.where(col(Callback.id) < int(before))
    if wanted.task:
        task = exact(session, wanted.task)
        found = found.where(col(Callback.task_id) == (task.id if task else uuid.UUID(int=0)))
    since, until = _day(wanted.since), _day(wanted.until)
    found = found.where(*([Callback.received_at >= since] if since else []))
    found = found.where(*([Callback.received_at < until + timedelta(days=1)] if until else []))
    if wanted.state in (CallbackState.UNMATCHED, CallbackState.RECEIVED):
        found = found.where(col(Callback.state) == CallbackState(wanted.state))  # few rows, found by their index
    window = found.order_by(col(Callback.id).desc()).limit(SCANNED).subquery()
    chosen = select(window.c.id).where(*_delivery_conditions(window.c, wanted)).order_by(window.c.id.desc())
    ids = list(session.scalars(chosen.limit(limit + 1)))
    page = Page(_deliveries(session, ids[:limit]))
    if len(ids) > limit:
        page.further = str(ids[limit - 1])
    elif wanted.is_set:
        last = select(window.c.id, window.c.received_at).order_by(window.c.id.desc()).offset(SCANNED - 1).limit(1)
        if end := session.execute(last).first():
            page.further, page.looked_until = str(end.id), end.received_at
    return page


def _delivery_conditions(columns: Any, wanted: DeliveryFilter) -> list[Any]:
    conditions = []
    if wanted.state in list(CallbackState):
        conditions.append(columns.state == CallbackState(wanted.state))
    if wanted.provider:
        conditions.append(columns.provider == wanted.provider)
    if wanted.cause:
        conditions.append(func.lower(columns.reason).contains(wanted.cause.lower(), autoescape=True))
    return conditions


def _deliveries(session: Session, ids: Sequence[int]) -> list[tuple[Callback, int, str | None]]:
    body: Any = Callback.body
    found = select(Callback, func.length(body), Task.external_task_id)
    found = found.outerjoin(Task, col(Task.id) == col(Callback.task_id)).options(defer(body, raiseload=True))
    found = found.where(col(Callback.id).in_(ids)).order_by(col(Callback.id).desc())
    return [(row, size, name) for row, size, name in session.execute(found)]


# -- cursors ----------------------------------------------------------------------------------------------------------


def _cursor(key: Any) -> str:
    return f"{key.created_at.isoformat()}~{key.id.hex}"


def _task_cursor(text: str | None) -> tuple[datetime, uuid.UUID] | None:
    moment, _, key = (text or "").partition("~")
    try:
        at = datetime.fromisoformat(moment)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)), uuid.UUID(key)
    except ValueError:
        return None


def _behind(at: Any, key: Any, cursor: tuple[datetime, uuid.UUID] | None) -> list[Any]:
    if cursor is None:
        return []
    moment, last = cursor
    return [at <= moment, or_(at < moment, key < last)]  # the first alone is what the index is entered by


def _day(text: str) -> datetime | None:
    try:
        found = date.fromisoformat(text)
        return datetime(found.year, found.month, found.day, tzinfo=UTC) if 1970 < found.year < 9000 else None
    except ValueError:
        return None
