"""Who works on a row: claim, renew, settle, release. The only module that writes the claim columns of a row.

Elsewhere rows are inserted, and what is written here is named: tests/test_rules.py looks for the columns' names. A row
without a lease has lost none: `losses` is 0.

    due_at <= now ──claim──▶ lease = fresh token, due_at = end of lease ──settle──▶ lease NULL, due_at NULL or later
         ▲                                   │ died, froze
         └──────── the lease ran out ◀───────┘   (simply due again; there is no rescue process)

Every write by an owner says `WHERE id = … AND lease = mine`; no row changed = the claim was lost = `LostClaim`.
Who holds the task's lock may take a claim away: `make_due`, `rest`, and `AFRESH` and `AT_REST` in a statement.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import ClauseElement, Connection, CursorResult, Integer, Uuid, bindparam, case, select, update
from sqlmodel import Session

from storage.errors import LostClaim
from storage.rows.database import db_now, db_now_once, run
from storage.rows.models import Asset, Callback, Claimable, Dispatch, Task

Row = TypeVar("Row", Task, Callback, Asset, Dispatch)

# After three lost leases a row is suspected of ending its workers: it is claimed by a process that does nothing else.
QUARANTINE_AFTER = 3
# If it ends that process three times more, it is parked: no claim until `receiver retry`.
PARK_LOSSES = 6

# What a lane claims by is the same for the life of a process, and there are some ten lanes.
STATEMENTS = 64

BACKOFF_BASE_SECONDS = 2.0
# Long enough to leave a struggling host alone, short enough that an outage's end is noticed within minutes.
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
    """Claim up to `limit` due rows in one statement, the soonest to be deleted by the provider first.

    Rows that others hold are passed over, never waited for. `alone`: claim suspects instead (see QUARANTINE_AFTER);
    the caller has nothing else in flight. `in_turn`: those that have waited longest first, so that none is tried
    again before the others. Returns the rows as claimed, all with the same fresh `lease`; [] when
    nothing is due. `attempts` counts this claim; `losses` counts the lease that ran out before it, if one did.
    """
    values = {"most": limit, "lease_seconds": lease_seconds, "token": uuid.uuid4()}
    rows: list[Row] = list(session.scalars(_claim(model, alone, in_turn, tuple(where)), values))
    return sorted(rows, key=_work_order)


@lru_cache(maxsize=STATEMENTS)
def _claim(model: Any, alone: bool, in_turn: bool, where: tuple[Any, ...]) -> Any:
    losses = model.losses + case((model.lease.is_not(None), 1), else_=0)
    suspect = losses >= QUARANTINE_AFTER if alone else losses < QUARANTINE_AFTER
    due = select(model.id).where(model.due_at <= db_now_once(), suspect, *where)
    order = (model.due_at,) if in_turn else _urgency(model)
    due = due.order_by(*order).limit(bindparam("most", type_=Integer)).with_for_update(skip_locked=True)
    return (
        update(model)
        .where(model.id.in_(select(due.cte("due").c.id)))
        .values(
            due_at=db_now("lease_seconds"), lease=bindparam("token", type_=Uuid), attempts=model.attempts + 1,
            losses=losses,
        )
        .returning(model)
        .execution_options(synchronize_session=False)
    )  # fmt: skip


def _work_order(row: Any) -> Any:
    """The order in which claimed rows are worked on; RETURNING promises none. Deliveries and events: as they came."""
    if isinstance(row, Callback | Dispatch):
        return row.id
    return row.files_expire_at is None, row.files_expire_at, str(row.id)


def is_any_due(connection: Connection, model: type[Row], *, alone: bool = False, where: Sequence[Any] = ()) -> bool:
    """Whether a claim may find something: a read, so that idle workers take no write lock. Suspects are told of, too.

    In the order of the due index: for one row of any order PostgreSQL reads the table past every row that waits.
    """
    return connection.execute(_any_due(model, alone, tuple(where))).first() is not None


@lru_cache(maxsize=STATEMENTS)
def _any_due(model: Any, alone: bool, where: tuple[Any, ...]) -> Any:
    table = model.__table__.c
    due = select(table.id).where(table.due_at <= db_now_once(), *where)
    if alone:
        losses = table.losses + case((table.lease.is_not(None), 1), else_=0)
        due = due.where(losses >= QUARANTINE_AFTER)
    return due.order_by(table.due_at).limit(1)


def _urgency(model: Any) -> tuple[Any, ...]:
    if model in (Callback, Dispatch):
        return (model.due_at,)
    return (model.files_expire_at.asc().nulls_last(), model.due_at)


def settle(session: Session, row: Row, *, due_in: float | None, counts: bool = True, **values: Any) -> None:
    """Give up the claim on `row` and write `values`. `due_in`: seconds until it wants work again, None = never.

    `counts`: whether this claim was an attempt. The row's `losses` are forgotten: it let its worker live. Raises
    `LostClaim` when the lease is not ours any more.
    """
    due_at = None if due_in is None else db_now(due_in)
    if not counts:
        values["attempts"] = max(row.attempts - 1, 0)
    _write(session, row, {"lease": None, "due_at": due_at, "losses": 0, **values})


def update_claimed(session: Session, row: Row, **values: Any) -> None:
    """Write `values` while keeping the claim. Raises `LostClaim`."""
    _write(session, row, values)


def release(session: Session, row: Row) -> None:
    """Hand an untouched claim back: due at once, not counted as an attempt. A lost one is left alone."""
    try:
        settle(session, row, due_in=0, counts=False)
    except LostClaim:
        return


def renew(session: Session, model: type[Row], ids: Sequence[Any], lease: uuid.UUID, lease_seconds: float) -> int:
    """Extend the leases of rows still held under `lease`. Returns how many still were.

    Those that another transaction has locked are passed over: somebody writes them just now, and to wait for several
    of them beside whoever writes several is how PostgreSQL comes to a deadlock.
    """
    table: Any = model
    held = select(table.id).where(table.id.in_(ids), table.lease == lease).with_for_update(skip_locked=True)
    return _execute(session, update(table).where(table.id.in_(held)).values(due_at=db_now(lease_seconds)))


def _write(session: Session, row: Row, values: dict[str, Any]) -> None:
    model: Any = type(row)
    if row.lease is None:  # never claimed: `lease = NULL` would be written as IS NULL and match
        raise LostClaim(f"{model.__tablename__} {row.id} is not claimed")
    owned: dict[str, Any] = {"row_id": row.id, "held": row.lease}
    said = {name: value for name, value in values.items() if isinstance(value, ClauseElement) and not _is_time(value)}
    columns = tuple((name, _is_time(value)) for name, value in values.items() if name not in said)
    for name, told in columns:
        owned[f"new_{name}"] = values[name].seconds if told else values[name]
    statement = _owned(model, columns)
    if said:  # rarely: a value in SQL's own words
        statement = statement.values(said)
    if run(session, statement, owned).rowcount == 0:
        raise LostClaim(f"{model.__tablename__} {row.id}")


def _is_time(value: Any) -> bool:
    return isinstance(value, db_now)


@lru_cache(maxsize=STATEMENTS)
def _owned(model: Any, columns: tuple[tuple[str, bool], ...]) -> Any:
    """An update of these columns (name, whether it is set to the clock) while the lease is ours."""
    table = model.__table__
    new = {name: db_now(f"new_{name}") if told else bindparam(f"new_{name}") for name, told in columns}
    owned = update(table).where(table.c.id == bindparam("row_id"), table.c.lease == bindparam("held"))
    return owned.values(new)


def _execute(session: Session, statement: Any) -> int:
    result = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount


# -- without a claim of one's own -------------------------------------------------------------------------------------

# For statements: due at once, as if for the first time; and waiting for nothing. Whoever holds such a row has lost it.
AFRESH: dict[str, Any] = {"due_at": db_now(), "lease": None, "attempts": 0, "losses": 0}
AT_REST: dict[str, Any] = {"due_at": None, "lease": None, "losses": 0}


def due(at: Any = None) -> dict[str, Any]:
    """The claim columns of rows that nobody holds and that are due `at` a time, None: now. For statements."""
    return {"due_at": db_now() if at is None else at}


def take(row: Task, now: datetime, lease_seconds: float) -> None:
    """Claim a row that is new, or locked and in nobody's hands, whether it is due or not: its first attempt."""
    row.lease, row.attempts, row.losses = uuid.uuid4(), 1, 0
    row.due_at = now + timedelta(seconds=lease_seconds)


def hasten(row: Task) -> None:
    """Let a locked row be due now that is in nobody's hands."""
    row.due_at = db_now()  # type: ignore[assignment]


def make_due(row: Task, in_seconds: float = 0) -> None:
    """Let a locked row be due as if for the first time. Whoever holds it has lost it."""
    rest(row)
    row.due_at = db_now(in_seconds)  # type: ignore[assignment]


def rest(row: Task) -> None:
    """Let a locked row wait for nothing. Whoever holds it has lost it."""
    row.due_at = row.lease = None
    row.attempts = row.losses = 0


def is_claimed(row: Claimable) -> bool:
    """Whether some worker holds the row, or died holding it."""
    return row.lease is not None


def backoff(attempts: int, *, base: float = BACKOFF_BASE_SECONDS, cap: float = BACKOFF_CAP_SECONDS) -> float:
    """Seconds to wait after the `attempts`-th failure: exponential, capped, full jitter.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. Never under half a second, so that
    a lucky draw does not become a busy loop.
    """
    return max(0.5, random.uniform(0, min(cap, base * 2 ** min(attempts, 30))))  # noqa: S311 - no secret
