"""Events on their way out: a number in commit order, one dispatch row per event and sink, and what a sending changes.

    event(seq NULL) ─sequence─▶ event(seq 7), dispatch(due) per matching sink      one transaction, one at a time
                                               │ claimed by the sink's lane, sent
                          delivered ◀──────────┼────▶ due later, tries + 1 ─ … ─▶ dead after the schedule

Per sink and task only the first open dispatch has a `due_at`; whoever settles it gives the next one its own. So
events of a task leave in order, and a receiver that is down has one row a task that waits for it, however many events
there are. An event without a task waits for no other.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CursorResult, Integer, bindparam, func, insert, literal_column, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col, select

from storage.rows import claims
from storage.rows.database import Database, db_now, run
from storage.rows.events import COUNTER
from storage.rows.models import Counter, Dispatch, Event, Sink, Task
from storage.states import DispatchState

# So many events get their numbers in one transaction: some 10 ms, in which nobody else can write on SQLite.
BATCH = 500
MAX_ERROR_CHARS = 500
_EVENTS = Event.__table__.c  # type: ignore[attr-defined]
# The condition of the partial index, word for word: SQLite uses none for a parameter.
IS_OPEN = col(Dispatch.state) == literal_column(f"'{DispatchState.DUE}'")
IS_DEAD = col(Dispatch.state) == literal_column(f"'{DispatchState.DEAD}'")


@dataclass(frozen=True)
class Subscription:
    """What a sink wants to be told. `of_clients`: only of tasks whose client asked to be called back."""

    sink: str
    names: frozenset[str]
    of_clients: bool = False


# -- numbers, fan-out -------------------------------------------------------------------------------------------------


def sequence_all(database: Database, subscriptions: Sequence[Subscription]) -> int:
    """Number all events there are, in short transactions; returns how many. Any process may, at any time."""
    count = 0
    while _any_unsequenced(database):
        with database.write() as session:
            done = sequence(session, subscriptions)
            if done:
                database.wake(session)
        count += done
        # Less than a batch: that was all, or another process is at it. To look again now would number the few events
        # committed meanwhile in a transaction of their own, and so on without end while pictures are archived.
        if done < BATCH:
            break
    return count


_UNSEQUENCED = select(_EVENTS.id).where(_EVENTS.seq.is_(None)).limit(1)


def _any_unsequenced(database: Database) -> bool:
    with database.read() as session:
        return run(session, _UNSEQUENCED).first() is not None


_PLACE = func.row_number().over(order_by=_EVENTS.id).label("place")
_OLDEST = select(_EVENTS.id, _PLACE).where(_EVENTS.seq.is_(None)).order_by(_EVENTS.id)
_FRESH = _OLDEST.limit(bindparam("most", type_=Integer)).subquery()
_NUMBERED = update(Event.__table__).where(_EVENTS.id == _FRESH.c.id)  # type: ignore[attr-defined]
_NUMBERED = _NUMBERED.values(seq=bindparam("so_far", type_=BigInteger) + _FRESH.c.place)
_NUMBERED = _NUMBERED.returning(_EVENTS.seq, _EVENTS.id, _EVENTS.name, _EVENTS.task_id)
_LOCKED_COUNTER = select(Counter).where(Counter.name == COUNTER).with_for_update(skip_locked=True)
_LOCKED_COUNTER = _LOCKED_COUNTER.execution_options(populate_existing=True)
_SINKS = Sink.__table__.c  # type: ignore[attr-defined]
_DISABLED = select(_SINKS.name).where(_SINKS.disabled_at.is_not(None))


def sequence(session: Session, subscriptions: Sequence[Subscription], *, limit: int = BATCH) -> int:
    """Give the oldest visible events their numbers, and each matching sink its dispatches. Returns how many events.

    The counter's row is held until the commit, so numbers become visible in their order: a reader who has seen one
    will see no smaller one appear. 0: there are none, or another process holds the counter.
    """
    counter = _lock_counter(session)
    if counter is None:
        return 0
    told = sorted(run(session, _NUMBERED, {"so_far": counter.value, "most": limit}).all(), key=lambda row: row.seq)
    counter.value += len(told)
    _fan_out(session, told, subscriptions)
    session.flush()
    return len(told)


def _lock_counter(session: Session) -> Counter | None:
    """The counter, locked; None while another transaction holds it."""
    counter = session.scalars(_LOCKED_COUNTER).one_or_none()
    if counter is not None or session.exec(select(Counter).where(Counter.name == COUNTER)).first() is not None:
        return counter
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    highest = select(func.coalesce(func.max(Event.seq), 0)).scalar_subquery()
    session.execute(dialect.insert(Counter).values(name=COUNTER, value=highest).on_conflict_do_nothing())
    return session.scalars(_LOCKED_COUNTER).one_or_none()


def _fan_out(session: Session, told: Sequence[Any], subscriptions: Sequence[Subscription]) -> None:
    wanted = _wanted(session, told, subscriptions)
    if not wanted:
        return
    occupied = _open_chains(session, {task_id for _, _, task_id in wanted if task_id})
    now, rows = session.execute(select(db_now())).scalar_one(), []
    for sink, event_id, task_id in wanted:
        is_first = task_id is None or (sink, task_id) not in occupied
        occupied.add((sink, task_id))
        claim = claims.due(now) if is_first else claims.AT_REST
        rows.append(_dispatch(sink, event_id, task_id, now, claim))
    session.execute(insert(Dispatch.__table__), rows)  # type: ignore[attr-defined]


def _wanted(
    session: Session, told: Sequence[Any], subscriptions: Sequence[Subscription]
) -> list[tuple[str, int, uuid.UUID | None]]:
    """(sink, event, task) of everything that a sink is to be told, in the order of the events."""
    disabled = set(run(session, _DISABLED).scalars())
    wanting = [each for each in subscriptions if each.sink not in disabled]
    of_clients = [each.names for each in wanting if each.of_clients]
    asked = {task_id for _, _, name, task_id in told if task_id and any(name in names for names in of_clients)}
    clients = _with_client(session, asked) if asked else set()
    return [
        (each.sink, event_id, task_id)
        for _, event_id, name, task_id in told
        for each in wanting
        if name in each.names and (not each.of_clients or task_id in clients)
    ]


def _dispatch(
    sink: str, event_id: int, task_id: uuid.UUID | None, now: datetime, claim: dict[str, Any]
) -> dict[str, Any]:
    row = Dispatch(sink=sink, event_id=event_id, task_id=task_id, created_at=now, **claim)
    return row.model_dump(exclude={"id"})


def _with_client(session: Session, task_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
    asked = select(Task.id).where(col(Task.id).in_(task_ids), col(Task.client_callback_url).is_not(None))
    return set(session.exec(asked))


def _open_chains(session: Session, task_ids: Collection[uuid.UUID]) -> set[tuple[str, uuid.UUID | None]]:
    """(sink, task) with an open dispatch. They are locked: who settles the last one of a chain meanwhile would not
    see what is put behind it, and nobody would ever make that due."""
    found = select(Dispatch.sink, Dispatch.task_id).where(IS_OPEN, col(Dispatch.task_id).in_(task_ids))
    return {(sink, task_id) for sink, task_id in session.exec(found.order_by(col(Dispatch.id)).with_for_update())}


# -- what a sending changes -------------------------------------------------------------------------------------------


def delivered(session: Session, row: Dispatch) -> None:
    """Settle a claimed dispatch: its sink has it. Raises `LostClaim`, as all of these."""
    _end(session, row, DispatchState.DELIVERED, None)


def failed(session: Session, row: Dispatch, error: str, due_in: float) -> None:
    """Count a try; the next one is due in so many seconds. What is behind it waits as well."""
    claims.settle(session, row, due_in=due_in, tries=row.tries + 1, error=error[:MAX_ERROR_CHARS])


def put_off(session: Session, row: Dispatch, due_in: float) -> None:
    """Not tried: no try is counted."""
    claims.settle(session, row, due_in=due_in, counts=False)


def dead(session: Session, row: Dispatch, error: str) -> None:
    """Give a claimed dispatch up; what is behind it goes on. `redeliver` brings it back."""
    _end(session, row, DispatchState.DEAD, error[:MAX_ERROR_CHARS])


def _end(session: Session, row: Dispatch, state: DispatchState, error: str | None) -> None:
    now = db_now()
    claims.settle(session, row, due_in=None, state=state, tries=row.tries + 1, error=error, settled_at=now)
    if row.task_id is not None:
        _advance(session, row.sink, [row.task_id])


def _advance(session: Session, sink: str, task_ids: Collection[uuid.UUID]) -> None:
    """Make the first open dispatch of these chains due, unless it is already, or in somebody's hands."""
    first = select(func.min(Dispatch.id)).where(
        IS_OPEN, col(Dispatch.sink) == sink, col(Dispatch.task_id).in_(task_ids)
    )
    first = first.group_by(col(Dispatch.task_id))
    waiting = update(Dispatch).where(col(Dispatch.id).in_(first), col(Dispatch.due_at).is_(None))
    _execute(session, waiting.values(claims.due()))


# -- sinks that are gone, and their return ----------------------------------------------------------------------------


def disable(session: Session, sink: str, reason: str) -> None:
    """Queue nothing more for this sink. What is open is ended by `end_disabled`, in short transactions."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    values = {"disabled_at": db_now(), "reason": reason[:MAX_ERROR_CHARS]}
    row: Any = dialect.insert(Sink).values(name=sink, **values)
    session.execute(row.on_conflict_do_update(index_elements=["name"], set_=values))


def end_disabled(database: Database) -> int:
    """Let every open dispatch of disabled sinks be dead. Returns how many. A crash half-way leaves the rest open: every
    worker looks now and then."""
    with database.read() as session:
        waiting = disabled(session)
    count = 0
    for sink, reason in waiting.items():
        ended = BATCH
        while ended == BATCH:
            with database.write() as session:
                ended = _end_open(session, sink, reason)
            count += ended
    return count


def _end_open(session: Session, sink: str, reason: str, *, limit: int = BATCH) -> int:
    """Up to `limit` of a sink, those in hand as well."""
    some = select(Dispatch.id).where(IS_OPEN, Dispatch.sink == sink).limit(limit)
    values = {"state": DispatchState.DEAD, "error": reason[:MAX_ERROR_CHARS], "settled_at": db_now(), **claims.AT_REST}
    return _execute(session, update(Dispatch).where(col(Dispatch.id).in_(some)).values(values))


def enable(session: Session, sink: str) -> bool:
    """Queue events for this sink again, from now on. Returns whether it was disabled."""
    chosen = update(Sink).where(col(Sink.name) == sink, col(Sink.disabled_at).is_not(None))
    return bool(_execute(session, chosen.values(disabled_at=None, reason=None)))


def disabled(session: Session) -> dict[str, str]:
    """Sinks that are disabled, and why."""
    found = session.exec(select(Sink.name, Sink.reason).where(col(Sink.disabled_at).is_not(None)).order_by(Sink.name))
    return {name: reason or "" for name, reason in found}


def remembered(session: Session) -> set[str]:
    """Sinks that something was queued for, or that are disabled: configured or not."""
    return {*session.exec(select(Dispatch.sink).distinct()), *disabled(session)}


# -- looking and sending again ----------------------------------------------------------------------------------------


def dispatches(
    session: Session,
    *,
    state: DispatchState | None = None,
    sink: str | None = None,
    ids: Iterable[int] = (),
    after: int = 0,
    limit: int = BATCH,
) -> list[tuple[Dispatch, Event, str | None]]:
    """Dispatches by id from `after` on, each with its event and its task's external id."""
    found = select(Dispatch, Event, Task.external_task_id).join(Event, col(Event.id) == col(Dispatch.event_id))
    found = found.outerjoin(Task, col(Task.id) == col(Dispatch.task_id)).where(col(Dispatch.id) > after)
    conditions: dict[DispatchState, Any] = {DispatchState.DUE: IS_OPEN, DispatchState.DEAD: IS_DEAD}
    if state is not None:
        found = found.where(conditions.get(state, col(Dispatch.state) == state))
    if sink is not None:
        found = found.where(Dispatch.sink == sink)
    if chosen := list(ids):
        found = found.where(col(Dispatch.id).in_(chosen))
    found = found.order_by(col(Dispatch.id)).limit(limit)
    return [(row, event, external_id) for row, event, external_id in session.exec(found)]


def redeliver(session: Session, rows: Sequence[Dispatch]) -> int:
    """Send these again, as if for the first time; returns how many. One that a worker holds is left to it.

    Those of one task go in their order, and before what waits; what was sent meanwhile has overtaken them.
    """
    free = update(Dispatch).where(col(Dispatch.id).in_([row.id for row in rows]), col(Dispatch.lease).is_(None))
    again = {**claims.AFRESH, **claims.AT_REST}  # the first of its chain is made due below
    again |= {"state": DispatchState.DUE, "tries": 0, "error": None, "settled_at": None}
    count = _execute(session, free.values(again))
    for sink in sorted({row.sink for row in rows}):
        of_sink = [row for row in rows if row.sink == sink]
        _advance(session, sink, {row.task_id for row in of_sink if row.task_id})
        alone = update(Dispatch).where(col(Dispatch.id).in_([row.id for row in of_sink if row.task_id is None]))
        _execute(session, alone.where(IS_OPEN, col(Dispatch.lease).is_(None)).values(claims.due()))
    return count


def _execute(session: Session, statement: Any) -> int:
    result = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount
