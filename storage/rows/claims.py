"""Claims: which worker works on a row. Claim, renew, settle, release.

    due_at <= now ──claim──▶ lease = fresh token, due_at = end of lease ──settle──▶ lease NULL, due_at NULL or later
         ▲                                   │ the worker died or hung
         └──────── the lease ran out ◀───────┘   (the row is simply due again; there is no rescue process)

Every write by an owner says `WHERE id = … AND lease = mine`. If it changes no row, the claim is lost: `LostClaim`.
A transaction that holds the task's lock may take a claim away: `make_due`, `rest`, and `DUE_NOW` and `NOT_DUE` in
statements. Only this module writes the claim columns of existing rows; a test looks for their names elsewhere. A row
without a lease has `losses` 0, unless it was released.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Integer,
    Uuid,
    and_,
    bindparam,
    case,
    exists,
    literal_column,
    select,
    union_all,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import Session, col

from storage.database.clock import UtcTime, db_now, db_now_once
from storage.database.prepared import execute, unattached
from storage.database.sessions import run
from storage.errors import LostClaim
from storage.rows.models import Asset, Callback, Dispatch, Task, TaskColumns

Row = TypeVar("Row", Task, Callback, Asset, Dispatch)

# A row that lost this many leases may have ended its workers. A process claims it only while it does nothing else.
QUARANTINE_AFTER = 3
# After three more lost leases it is parked: not claimed again until `receiver retry`.
PARK_LOSSES = 6

# The fewest losses of a row in quarantine, because its current lease may be the third that expires. A literal, as in
# the condition of the suspect indexes, because SQLite uses no partial index for a parameter.
SUSPECT_LOSSES: ColumnElement[int] = literal_column(str(QUARANTINE_AFTER - 1), Integer)
# The number of due rows, beyond those to be claimed, up to which a queue is sorted at each claim. Sorting 256 takes 0.2
# ms.
SHORT_QUEUE = 256

# What the keys and the metadata of files contain of their tasks. A claimed file has it as `task_…`.
OF_ITS_TASK = ("created_at", "external_task_id", "provider", "provider_task_id")

# Statements kept in each cache. A lane's conditions never change, and there are some ten lanes.
STATEMENTS = 64

BACKOFF_BASE_SECONDS = 2.0
# Spares a host in trouble, and notices the end of an outage within minutes.
BACKOFF_CAP_SECONDS = 300.0


def claim(
    session: Session,
    model: type[Row],
    *,
    limit: int,
    lease_seconds: float,
    alone: bool = False,
    in_turn: bool = False,
    where: Sequence[Any] = (),
) -> list[Row]:
    """Claim up to `limit` due rows in one statement, those whose files the provider deletes soonest first.

    Rows that other transactions have locked are skipped. `alone`: claim only rows in quarantine (see QUARANTINE_AFTER);
    the caller does nothing else meanwhile. `in_turn`: the rows that have waited longest first, so that none is tried
    again before the others. Returns the rows as claimed, all with the same fresh `lease`; [] if nothing is due.
    `attempts` counts this claim, `losses` the lease that expired before it.
    """
    values = {"most": limit, "lease_seconds": lease_seconds, "token": uuid.uuid4()}
    session.flush()
    found = execute(session, _claim_statement(model, alone, in_turn, tuple(where)), values)
    return sorted(unattached(model, found), key=_work_order)


_MOST = bindparam("most", type_=Integer)


@lru_cache(maxsize=STATEMENTS)
def _claim_statement(model: Any, alone: bool, in_turn: bool, where: tuple[Any, ...]) -> Any:
    losses = model.losses + case((model.lease.is_not(None), 1), else_=0)
    due = (model.due_at <= db_now_once(), *where)
    claimable = (losses >= QUARANTINE_AFTER, model.losses >= SUSPECT_LOSSES) if alone else (losses < QUARANTINE_AFTER,)
    chosen = select(model.id).where(*due, *claimable)
    if alone:  # few or no rows
        ids = _first(chosen.order_by(*_urgency(model)), "due")
    elif in_turn or model in (Callback, Dispatch):
        # A walk of the due index. Rows made due together have one `due_at`: without `attempts` one of them took every
        # trial.
        ids = _first(chosen.order_by(model.due_at, model.attempts), "due")
    else:
        ids = _soonest(model, due, claimable)
    of_its_task = [getattr(Task, name).label(f"task_{name}") for name in OF_ITS_TASK if model is Asset]
    also = [
        select(each).where(col(Task.id) == Asset.task_id).scalar_subquery().label(each.name) for each in of_its_task
    ]
    return (
        update(model)
        .where(model.id.in_(ids))
        .values(
            due_at=db_now("lease_seconds"), lease=bindparam("token", type_=Uuid), attempts=model.attempts + 1,
            losses=losses,
        )
        .returning(model, *also)
    )  # fmt: skip


def _soonest(model: Any, due: tuple[Any, ...], claimable: tuple[Any, ...]) -> Any:
    """Ids of the due rows whose files the provider deletes soonest, those without a known time last.

    A short queue is read and sorted. In a long one the urgent index is walked; its rows that are not due yet (in hand,
    or in backoff) are passed over at 0.1 µs (PostgreSQL) or 0.8 µs (SQLite) each. With a walk alone, 100,000 files in
    backoff would delay each claim of the few that are due; with sorting alone, 100,000 due files would.
    """
    further = select(model.id).where(*due).order_by(model.due_at, model.attempts)
    further_due = further.limit(1).offset(_MOST + SHORT_QUEUE).cte("further_due")
    is_long = exists(select(further_due.c.id))
    is_due = (model.due_at.is_not(None), _unindexed(model.due_at) <= db_now_once(), *due[1:])
    in_index_order = (model.files_expire_at.asc().nulls_last(), model.due_at)
    few = _first(select(model.id).where(*due, *claimable).order_by(*_urgency(model)), "few", unless=is_long)
    many = _first(select(model.id).where(*is_due, *claimable).order_by(*in_index_order), "many", unless=~is_long)
    # PostgreSQL's planner does not know how few rows these are. Without a limit of its own it reads the whole table.
    return union_all(few, many).limit(_MOST)


def _first(ordered: Any, name: str, *, unless: ColumnElement[bool] | None = None) -> Any:
    """The first rows, locked. Rows that other transactions have locked are skipped.

    `unless`: no rows if this holds. A limit of 0 reads nothing on either database; SQLite tests a condition at each
    row.
    """
    most = _MOST if unless is None else case((unless, 0), else_=_MOST)
    locked = ordered.limit(most).with_for_update(skip_locked=True).cte(name)
    return select(locked.c.id)


def _urgency(model: Any) -> tuple[Any, ...]:
    """The order of urgency as an expression without an index: for few rows, which are sorted."""
    if model in (Callback, Dispatch):
        return (model.due_at,)
    return model.files_expire_at.is_(None), model.files_expire_at, model.due_at


class _unindexed(FunctionElement[datetime]):
    """A column without its index in SQLite, which otherwise would sort the queue and not walk the urgent index."""

    type = UtcTime()
    inherit_cache = True


@compiles(_unindexed, "postgresql")
def _unindexed_postgresql(element: _unindexed, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(_unindexed, "sqlite")
def _unindexed_sqlite(element: _unindexed, compiler: Any, **options: Any) -> str:
    return f"+{compiler.process(element.clauses, **options)}"


def _work_order(row: Any) -> Any:
    """Sort key of claimed rows, because RETURNING has no order. Deliveries and events keep the order of their ids."""
    if isinstance(row, Callback | Dispatch):
        return row.id
    return row.files_expire_at is None, row.files_expire_at, str(row.id)


def any_due(model: type[Row], *, where: Sequence[Any] = (), alone: bool = False) -> Any:
    """A statement that finds a row if a claim may. A read, so that idle workers take no write lock. Includes rows in
    quarantine; `alone`: only these.

    It reads in the order of the due index. Without an order PostgreSQL scans the table past every waiting row.
    """
    return _any_due_statement(model, alone, tuple(where))


@lru_cache(maxsize=STATEMENTS)
def _any_due_statement(model: Any, alone: bool, where: tuple[Any, ...]) -> Any:
    table = model.__table__.c
    due = select(table.id).where(table.due_at <= db_now_once(), *where)
    if alone:
        losses = table.losses + case((table.lease.is_not(None), 1), else_=0)
        due = due.where(losses >= QUARANTINE_AFTER, table.losses >= SUSPECT_LOSSES)
    return due.order_by(table.due_at).limit(1)


def settle(session: Session, row: Row, *, due_in: float | None, counts: bool = True, **values: Any) -> None:
    """Write `values` and end the claim on `row`. `due_in`: seconds until the row is due again, None = never.

    `counts`: whether this claim counts as an attempt. Resets `losses` to 0, because this worker survived the row.
    Raises `LostClaim` if the lease is no longer ours.
    """
    due_at = None if due_in is None else db_now(due_in)
    if not counts:
        values["attempts"] = max(row.attempts - 1, 0)
    update_claimed(session, row, **{"lease": None, "due_at": due_at, "losses": 0, **values})


def update_claimed(session: Session, row: Row, **values: Any) -> None:
    """Write `values` and keep the claim. Raises `LostClaim` when the lease is no longer ours."""
    if not write(session, type(row), row, values, "id", "lease"):  # no row has a lease equal to NULL
        raise LostClaim(f"another worker owns {type(row).__tablename__} {row.id}")


def write(session: Session, model: type[Row], row: Any, values: Mapping[str, Any], *unchanged: str) -> bool:
    """Write `values` if the row's `unchanged` columns still are as in `row`. Returns whether they are.

    A value is no SQL expression, except for the database's time.
    """
    session.flush()
    times = tuple([name for name, value in values.items() if isinstance(value, db_now)])
    bound = {**values, **{name: values[name].seconds for name in times}}
    bound |= {f"old_{name}": getattr(row, name) for name in unchanged}
    return execute(session, _update(model, tuple(values), times, unchanged), bound).changed > 0


def is_held(row: Row, seconds: float) -> ColumnElement[bool]:
    """The condition that the claim on `row` is still ours and lasts for so many seconds."""
    model: Any = type(row)
    return and_(model.id == row.id, model.lease == row.lease, model.due_at >= db_now_once(seconds))


def release(session: Session, row: Row) -> None:
    """End a claim without an attempt: the row is due at once. Does nothing if the claim is lost.

    `losses` stay, because the work on the row did not end, and may not even have begun.
    """
    try:
        settle(session, row, due_in=0, counts=False, losses=row.losses)
    except LostClaim:
        return


def renew(session: Session, model: type[Row], ids: Sequence[Any], lease: uuid.UUID, lease_seconds: float) -> int:
    """Extend the leases of the rows still held under `lease`. Returns how many these were.

    Skips locked rows. Waiting for several rows while another transaction updates several can deadlock on PostgreSQL.
    """
    table = model.__table__  # type: ignore[attr-defined]
    held = select(table.c.id).where(table.c.id.in_(ids), table.c.lease == lease).with_for_update(skip_locked=True)
    return run(session, update(table).where(table.c.id.in_(held)).values(due_at=db_now(lease_seconds))).rowcount


@lru_cache(maxsize=STATEMENTS)
def _update(model: Any, names: tuple[str, ...], times: tuple[str, ...], unchanged: tuple[str, ...]) -> Any:
    """The statement of `write`. `times`: those of the columns that are set to the database's time."""
    same = [model.__table__.c[name] == bindparam(f"old_{name}") for name in unchanged]
    new = {name: db_now(name) if name in times else bindparam(name) for name in names}
    return update(model.__table__).where(*same).values(new)


# -- changes of due times without a claim ------------------------------------------------------------------------------

# For statements: due now like a new row, and not due. A worker that holds such a row loses its lease.
DUE_NOW: dict[str, Any] = {"due_at": db_now(), "lease": None, "attempts": 0, "losses": 0}
NOT_DUE: dict[str, Any] = {"due_at": None, "lease": None, "losses": 0}
# For a row whose tries are counted elsewhere.
NO_ATTEMPTS: dict[str, Any] = {"attempts": 0}


def due(at: Any = None) -> dict[str, Any]:
    """The claim columns of unclaimed rows that are due `at` a time, None: now. For statements."""
    return {"due_at": db_now() if at is None else at}


def take(row: Task, now: datetime, lease_seconds: float) -> None:
    """Claim a row that is new, or locked and unclaimed, whether it is due or not. Counts as its first attempt."""
    row.lease, row.attempts, row.losses = uuid.uuid4(), 1, 0
    row.due_at = now + timedelta(seconds=lease_seconds)


def hasten(row: TaskColumns) -> None:
    """Make a locked and unclaimed row due now."""
    row.due_at = db_now()  # type: ignore[assignment]


def hasten_far(session: Session, model: type[Row], ids: Any, lease_seconds: float) -> int:
    """Make the rows of the statement `ids` due now. A claimed row is due after a lease. Returns how many there were.

    The worker that holds a claimed row keeps it, and renews the lease before it ends.
    """
    table = model.__table__  # type: ignore[attr-defined]
    due_at = case((table.c.lease.is_(None), db_now()), else_=db_now(lease_seconds))
    return run(session, update(table).where(table.c.id.in_(ids)).values(due_at=due_at)).rowcount


def make_due(row: Row | TaskColumns, in_seconds: float | None = 0) -> None:
    """Make a locked row due like a new one, or with None not due. A worker that holds it loses its lease."""
    row.due_at = None if in_seconds is None else db_now(in_seconds)  # type: ignore[assignment]
    row.lease = None
    row.attempts = row.losses = 0


def rest(row: Row) -> None:
    """Make a locked row not due. A worker that holds it loses its lease."""
    make_due(row, None)


def backoff(attempts: int, *, base: float = BACKOFF_BASE_SECONDS, cap: float = BACKOFF_CAP_SECONDS) -> float:
    """Seconds to wait after the `attempts`-th failure: exponential, capped, full jitter.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. At least 0.5 s, so that a low draw does not
    cause a busy loop.
    """
    return max(0.5, random.uniform(0, min(cap, base * 2 ** min(attempts, 30))))  # noqa: S311 - no secret
