"""The outbox of events: numbers in commit order, one dispatch row per event and sink, and the result of each sending.

    event(seq NULL) ─sequence─▶ event(seq 7), dispatch(due) per matching sink      one transaction, one at a time
                                               │ claimed by the sink's lane, sent
                          delivered ◀──────────┼────▶ due later, tries + 1 ─ … ─▶ dead after the schedule

Per sink and task only the first open dispatch has a `due_at`. The transaction that settles it makes the next one due.
So the events of a task are sent in order, and a sink that is down has one due row per task. An event without a task
does not wait for others.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Integer, bindparam, func, insert, literal_column, update
from sqlmodel import Session, col, select

from storage.database.clock import db_now
from storage.database.prepared import execute
from storage.database.sessions import Database, insert_or_ignore, run
from storage.operations import lists
from storage.rows import claims
from storage.rows.events import COUNTER, RECORDED
from storage.rows.models import Counter, Dispatch, Event, Sink, Task
from storage.states import DispatchState

# The sink of the gateway's clients, each of whom has an address of its own.
CLIENTS = "client"
# Events numbered in one transaction. It takes about 10 ms, in which no one else can write on SQLite.
BATCH = 500
# Events numbered at the end of a group of writes, which waits meanwhile. A full group records about as many.
GROUP_BATCH = 64
MAX_ERROR_CHARS = 500
_EVENTS = Event.__table__.c  # type: ignore[attr-defined]
# Literals, as in the partial indexes: SQLite uses no partial index for a parameter.
IS_OPEN = col(Dispatch.state) == literal_column(f"'{DispatchState.DUE}'")
IS_DEAD = col(Dispatch.state) == literal_column(f"'{DispatchState.DEAD}'")
_CONDITIONS: dict[DispatchState, Any] = {DispatchState.DUE: IS_OPEN, DispatchState.DEAD: IS_DEAD}


@dataclass(frozen=True)
class Subscription:
    """The event names that a sink wants. `of_clients`: only of tasks whose client asked to be called back."""

    sink: str
    names: frozenset[str]
    of_clients: bool = False


# -- numbers, fan-out -------------------------------------------------------------------------------------------------


def sequence_all(database: Database, subscriptions: Sequence[Subscription]) -> int:
    """Number all events in short transactions. Returns how many. Any process may do this at any time."""
    count = 0
    while True:
        with database.read() as session:
            if run(session, UNSEQUENCED).first() is None:
                return count
        done = database.write_in_group(lambda session: sequence(database, session, subscriptions))
        count += done
        # A short batch means: nothing left, or another process is numbering. Looping here would run one transaction
        # per new event while archiving is busy.
        if done < BATCH:
            return count


def sequence_recorded(database: Database, session: Session, subscriptions: Sequence[Subscription]) -> None:
    """Number the events of a group of writes in its own transaction, with older ones. `sequence_all` does the rest.

    A transaction of its own for them was an fsync for each report, and another turn at SQLite's lock.
    """
    if session.info.pop(RECORDED, False):
        count = sequence(database, session, subscriptions, limit=GROUP_BATCH)
        if count in (0, GROUP_BATCH):  # the others wait for their numbers
            database.wake(session)


UNSEQUENCED = select(_EVENTS.id).where(_EVENTS.seq.is_(None)).limit(1)
_PLACE = func.row_number().over(order_by=_EVENTS.id).label("place")
_OLDEST = select(_EVENTS.id, _PLACE).where(_EVENTS.seq.is_(None)).order_by(_EVENTS.id)
_FRESH = _OLDEST.limit(bindparam("most", type_=Integer)).subquery()
_NUMBERED = update(Event.__table__).where(_EVENTS.id == _FRESH.c.id)  # type: ignore[attr-defined]
_NUMBERED = _NUMBERED.values(seq=bindparam("so_far", type_=BigInteger) + _FRESH.c.place)
_TASKS = Task.__table__.c  # type: ignore[attr-defined]
_OF_CLIENT = select(_TASKS.id).where(_TASKS.id == _EVENTS.task_id, _TASKS.client_callback_url.is_not(None))
_OF_CLIENT = _OF_CLIENT.correlate(Event.__table__)  # type: ignore[attr-defined]
_NUMBERED = _NUMBERED.returning(
    _EVENTS.seq, _EVENTS.id, _EVENTS.name, _EVENTS.task_id, _OF_CLIENT.exists().label("of_client")
)
_COUNTERS = Counter.__table__.c  # type: ignore[attr-defined]
# The counter may be behind the events: a dump that is restored into migrated tables brings them, and leaves its row as
# the migration made it.
_HIGHEST = select(func.max(_EVENTS.seq)).scalar_subquery()
_SO_FAR = select(_COUNTERS.value, _HIGHEST.label("highest")).where(_COUNTERS.name == COUNTER)
_LOCKED_SO_FAR = _SO_FAR.with_for_update(skip_locked=True)
_COUNTED = update(Counter.__table__).where(_COUNTERS.name == COUNTER)  # type: ignore[attr-defined]
_COUNTED = _COUNTED.values(value=bindparam("until", type_=BigInteger))
_SINKS = Sink.__table__.c  # type: ignore[attr-defined]
_DISABLED = select(_SINKS.name).where(_SINKS.disabled_at.is_not(None))


def sequence(database: Database, session: Session, subscriptions: Sequence[Subscription], *, limit: int = BATCH) -> int:
    """Number the oldest visible events, insert the dispatches of matching sinks, and wake these. Returns how many
    events.

    The counter's row is locked until the commit, so numbers become visible in ascending order: a reader that has seen
    one never sees a smaller one appear. The numbers continue above those of all events, also where a restored database
    has a counter that is behind. Returns 0 when there are no events or another process holds the counter.
    """
    found = execute(session, _LOCKED_SO_FAR).rows
    if not found and not execute(session, _SO_FAR).rows:  # there is no counter yet
        insert_or_ignore(session, Counter, {"name": COUNTER, "value": 0})
        found = execute(session, _LOCKED_SO_FAR).rows
    if not found:  # another transaction holds it
        return 0
    so_far = max(found[0].value, found[0].highest or 0)
    numbered = sorted(execute(session, _NUMBERED, {"so_far": so_far, "most": limit}).rows)
    execute(session, _COUNTED, {"until": so_far + len(numbered)})
    if _fan_out(session, numbered, subscriptions):
        database.wake(session)
    return len(numbered)


def _fan_out(session: Session, numbered: Sequence[Any], subscriptions: Sequence[Subscription]) -> bool:
    """Insert a dispatch for every event that an enabled sink wants, in the order of the events. False: none does."""
    wanted = [
        (each.sink, event_id, task_id)
        for _, event_id, name, task_id, of_client in numbered
        for each in subscriptions
        if name in each.names and (of_client or not each.of_clients)
    ]
    if wanted:
        _insert_dispatches(session, wanted)
    return bool(wanted)


def _insert_dispatches(session: Session, wanted: Sequence[tuple[str, int, uuid.UUID | None]]) -> None:
    """Insert these dispatches (sink, event, task), but none of a disabled sink."""
    disabled = {row.name for row in execute(session, _DISABLED).rows}
    wanted = [each for each in wanted if each[0] not in disabled]
    if not wanted:
        return
    occupied = _open_chains(session, {task_id for _, _, task_id in wanted if task_id})
    now, rows = session.execute(select(db_now())).scalar_one(), []
    for sink, event_id, task_id in wanted:
        is_first = task_id is None or (sink, task_id) not in occupied
        occupied.add((sink, task_id))
        claim = claims.due(now) if is_first else claims.NOT_DUE
        row = Dispatch(sink=sink, event_id=event_id, task_id=task_id, created_at=now, **claim)
        rows.append(row.model_dump(exclude={"id"}))
    session.execute(insert(Dispatch.__table__), rows)  # type: ignore[attr-defined]


def _open_chains(session: Session, task_ids: Collection[uuid.UUID]) -> set[tuple[str, uuid.UUID | None]]:
    """(sink, task) with an open dispatch. The rows are locked: otherwise another transaction could settle the last one
    of a chain without seeing the row that is inserted behind it, which would never become due."""
    found = select(Dispatch.sink, Dispatch.task_id).where(IS_OPEN, col(Dispatch.task_id).in_(task_ids))
    return {(sink, task_id) for sink, task_id in session.exec(found.order_by(col(Dispatch.id)).with_for_update())}


# -- the result of an attempt -----------------------------------------------------------------------------------------


def delivered(session: Session, row: Dispatch) -> None:
    """Settle a claimed dispatch that its sink accepted. Raises `LostClaim`, like the others here."""
    _end(session, row, DispatchState.DELIVERED, None)


def failed(session: Session, row: Dispatch, error: str, due_in: float) -> None:
    """Count a failed try; the next one is due in `due_in` seconds. Later events of the task wait as well."""
    claims.settle(session, row, due_in=due_in, tries=row.tries + 1, error=error[:MAX_ERROR_CHARS])


def put_off(session: Session, row: Dispatch, due_in: float) -> None:
    """Postpone a claimed dispatch by `due_in` seconds without counting a try."""
    claims.settle(session, row, due_in=due_in, counts=False)


def dead(session: Session, row: Dispatch, error: str) -> None:
    """Give a claimed dispatch up; the task's next event becomes due. `redeliver` undoes it."""
    _end(session, row, DispatchState.DEAD, error[:MAX_ERROR_CHARS])


_DISPATCHES = Dispatch.__table__.c  # type: ignore[attr-defined]
_FIRST_OPEN = select(_DISPATCHES.id).where(
    IS_OPEN, _DISPATCHES.sink == bindparam("to"), _DISPATCHES.task_id == bindparam("of")
)
_FIRST_OPEN = _FIRST_OPEN.order_by(_DISPATCHES.id).limit(1)
_LOCK_FIRST = _FIRST_OPEN.with_for_update()
_FIRST_DUE = update(Dispatch.__table__).values(claims.due())  # type: ignore[attr-defined]
_FIRST_DUE = _FIRST_DUE.where(_DISPATCHES.id == _FIRST_OPEN.scalar_subquery(), _DISPATCHES.due_at.is_(None))


def _end(session: Session, row: Dispatch, state: DispatchState, error: str | None) -> None:
    now, chain = db_now(), {"to": row.sink, "of": row.task_id}
    if row.task_id is not None:  # Two ends at once would each wait for the other to make the next one due.
        execute(session, _LOCK_FIRST, chain)
    claims.settle(session, row, due_in=None, state=state, tries=row.tries + 1, error=error, settled_at=now)
    if row.task_id is not None:
        execute(session, _FIRST_DUE, chain)


def _is_for(sink: str) -> Any:
    """The condition on the sink of open dispatches, without its index: in that SQLite read every dispatch that the sink
    was ever sent, 0.3 s of 400,000, in which no one else could write.
    """
    return func.coalesce(Dispatch.sink, "") == sink


def _advance(session: Session, sink: str, task_ids: Collection[uuid.UUID] | None) -> None:
    """Make the first open dispatch of each of these tasks due, None: of all, unless it is due or claimed."""
    first = select(func.min(Dispatch.id)).where(IS_OPEN, _is_for(sink)).group_by(col(Dispatch.task_id))
    first = first.where(col(Dispatch.task_id).is_not(None) if task_ids is None else col(Dispatch.task_id).in_(task_ids))
    waiting = update(Dispatch).where(col(Dispatch.id).in_(first), col(Dispatch.due_at).is_(None))
    run(session, waiting.values(claims.due()))


# -- disabled sinks ---------------------------------------------------------------------------------------------------


def disable(session: Session, sink: str, reason: str) -> None:
    """Queue no more events for this sink. `end_disabled` ends its open dispatches in short transactions."""
    values = {"disabled_at": db_now(), "reason": reason[:MAX_ERROR_CHARS]}
    if not insert_or_ignore(session, Sink, {"name": sink, **values}):
        run(session, update(Sink).where(col(Sink.name) == sink).values(**values))


def end_disabled(database: Database) -> int:
    """Give up every open dispatch of disabled sinks. Returns how many. After a crash the next run ends the rest."""
    with database.read() as session:
        waiting = disabled(session)
    count = 0
    for sink, reason in waiting.items():
        values = {"state": DispatchState.DEAD, "settled_at": db_now(), **claims.NOT_DUE}
        given_up = update(Dispatch).where(IS_OPEN).values(**values, error=reason[:MAX_ERROR_CHARS])
        while True:
            # It reads the open ones of all sinks: 0.8 s of 300,000 of a sink that is down, in which others may write.
            with database.read() as session:
                some = session.exec(select(Dispatch.id).where(IS_OPEN, _is_for(sink)).limit(BATCH)).all()
            if not some:  # claimed ones count too
                break
            with database.write() as session:  # the row is locked: it may have been enabled meanwhile
                if not session.execute(_DISABLED.where(_SINKS.name == sink).with_for_update()).first():
                    break
                count += run(session, given_up.where(col(Dispatch.id).in_(some))).rowcount
    return count


def enable(session: Session, sink: str) -> bool:
    """Queue events for this sink from now on, and send those not yet given up. Returns whether it was disabled."""
    chosen = update(Sink).where(col(Sink.name) == sink, col(Sink.disabled_at).is_not(None))
    was_disabled = run(session, chosen.values(disabled_at=None, reason=None)).rowcount > 0
    if was_disabled:
        _advance(session, sink, None)
    return was_disabled


def disabled(session: Session) -> dict[str, str]:
    """Disabled sinks and their reasons."""
    found = session.exec(select(Sink.name, Sink.reason).where(col(Sink.disabled_at).is_not(None)).order_by(Sink.name))
    return {name: reason or "" for name, reason in found}


def is_known(session: Session, sink: str) -> bool:
    """Whether a sink is in the rows, configured or not. Reads at most one dispatch."""
    queued = select(Dispatch.id).where(col(Dispatch.sink) == sink).limit(1)
    return sink in disabled(session) or session.scalars(queued).first() is not None


def remembered(session: Session) -> set[str]:
    """Names of sinks in the rows, configured or not: those with dispatches and disabled ones."""
    return {*session.exec(select(Dispatch.sink).distinct()), *disabled(session)}


# -- listing and redelivery -------------------------------------------------------------------------------------------


def dispatches(
    session: Session,
    *,
    state: DispatchState | None = None,
    sink: str | None = None,
    ids: Iterable[int] = (),
    after: int = 0,
    limit: int = BATCH,
) -> list[tuple[Dispatch, Event, str | None]]:
    """Dispatches by id, from after `after`, each with its event and its task's external id."""
    found = select(Dispatch, Event, Task.external_task_id).join(Event, col(Event.id) == col(Dispatch.event_id))
    found = found.outerjoin(Task, col(Task.id) == col(Dispatch.task_id)).where(col(Dispatch.id) > after)
    if state is not None:
        found = found.where(_CONDITIONS.get(state, col(Dispatch.state) == state))
    if sink is not None:
        found = found.where(Dispatch.sink == sink)
    if chosen := list(ids):
        found = found.where(col(Dispatch.id).in_(chosen))
    found = found.order_by(col(Dispatch.id)).limit(limit)
    return [(row, event, external_id) for row, event, external_id in session.exec(found)]


def newest(session: Session, state: str, sink: str, *, before: int | None, limit: int = lists.PAGE) -> lists.Page:
    """One page of (dispatch, event, external id of its task), newest first, in one state or to one sink if given.

    `before`: the cursor of the page before. Open and dead ones are found by their own indexes unless there are very
    many. Then, and for delivered ones, the newest `SCANNED` behind the cursor are looked through.
    """
    key: Any = col(Dispatch.event_id) if sink else col(Dispatch.id)  # that of an index with the sink, and of the table
    keys = _few(session, state, sink, key)
    if keys is not None:
        behind = sorted((found for found in keys if before is None or found < before), reverse=True)
        return _page(session, key, sink, behind[: limit + 1], limit)
    is_narrow = state in list(DispatchState)
    window: Any = select(key.label("key"), col(Dispatch.state).label("state")).order_by(key.desc())
    window = window.where(*_to(sink), *([] if before is None else [key < before]))
    window = window.limit(lists.SCANNED if is_narrow else limit + 1).subquery()
    chosen = select(window.c.key).order_by(window.c.key.desc())
    if is_narrow:
        chosen = chosen.where(window.c.state == DispatchState(state))
    page = _page(session, key, sink, session.scalars(chosen.limit(limit + 1)).all(), limit)
    if is_narrow and page.further is None:
        last = select(window.c.key).order_by(window.c.key.desc()).offset(lists.SCANNED - 1).limit(1)
        if (end := session.scalars(last).first()) is not None:
            page.further = str(end)
            page.looked_until = session.scalars(select(Dispatch.created_at).where(*_to(sink), key == end)).first()
    return page


def _few(session: Session, state: str, sink: str, key: Any) -> list[int] | None:
    """The keys of all open or dead dispatches; None for another state, and if there are more than `SCANNED`."""
    condition = _CONDITIONS.get(DispatchState(state)) if state in list(DispatchState) else None
    if condition is None:
        return None
    rows = session.execute(select(key, col(Dispatch.sink)).where(condition).limit(lists.SCANNED + 1)).all()
    return None if len(rows) > lists.SCANNED else [found for found, name in rows if not sink or name == sink]


def _to(sink: str) -> list[Any]:
    return [col(Dispatch.sink) == sink] if sink else []


def _page(session: Session, key: Any, sink: str, keys: Sequence[int], limit: int) -> lists.Page:
    """The rows of these keys. One more key than `limit` says that there is a further page."""
    found = select(Dispatch, Event, Task.external_task_id).join(Event, col(Event.id) == col(Dispatch.event_id))
    found = found.outerjoin(Task, col(Task.id) == col(Dispatch.task_id))
    rows = session.execute(found.where(key.in_(keys[:limit]), *_to(sink)).order_by(key.desc())).all()
    return lists.Page(rows, str(keys[limit - 1]) if len(keys) > limit else None)


def pages_to_redeliver(database: Database, ids: Sequence[int], sink: str | None, size: int) -> Iterator[list[Dispatch]]:
    """These dispatches, or all dead ones (of one sink), `size` at a time."""
    after, state = 0, None if ids else DispatchState.DEAD
    while True:
        with database.read() as session:
            rows = [row for row, *_ in dispatches(session, state=state, sink=sink, ids=ids, after=after, limit=size)]
        if not rows:
            return
        after = rows[-1].id or 0
        yield rows


def redeliver(session: Session, rows: Sequence[Dispatch]) -> int:
    """Make these dispatches due again with all their tries. Returns how many. Claimed ones are left alone, and those of
    disabled sinks, which `end_disabled` would give up again.

    Those of one task are sent in their order and before its waiting ones. Events sent meanwhile came earlier.
    """
    off = disabled(session)
    rows = [row for row in rows if row.sink not in off]
    _open_chains(session, {row.task_id for row in rows if row.task_id})  # for the same reason
    free = update(Dispatch).where(col(Dispatch.id).in_([row.id for row in rows]), col(Dispatch.lease).is_(None))
    again = {**claims.DUE_NOW, **claims.NOT_DUE}  # the first of each task is made due below
    again |= {"state": DispatchState.DUE, "tries": 0, "error": None, "settled_at": None}
    count = run(session, free.values(again)).rowcount
    for sink in sorted({row.sink for row in rows}):
        of_sink = [row for row in rows if row.sink == sink]
        _advance(session, sink, {row.task_id for row in of_sink if row.task_id})
        without_task = update(Dispatch).where(col(Dispatch.id).in_([row.id for row in of_sink if row.task_id is None]))
        run(session, without_task.where(IS_OPEN, col(Dispatch.lease).is_(None)).values(claims.due()))
    return count
