"""Deliveries as rows: their key, the statement that stores many of them at once, and what makes them due again."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, repeat
from struct import Struct
from typing import Any

from sqlalchemy import Connection, bindparam, case, func, literal_column, select, update
from sqlalchemy.dialects import sqlite
from sqlmodel import Session
from sqlmodel import select as select_rows

from storage.database.clock import db_now
from storage.database.prepared import execute
from storage.database.sessions import WAKE_CHANNEL, Database, run
from storage.rows import claims
from storage.rows.claims import PARK_LOSSES
from storage.rows.models import Callback, TaskColumns
from storage.states import CallbackState

# Rows of one statement. A larger batch gains nothing more from the shared fsync and delays its first delivery.
MAX_BATCH = 256
# A proxy that drops bodies makes all deliveries of a task equal. A repeated unreadable delivery is therefore applied
# again, which reads the task: at least UNREADABLE_SECONDS after the last time, and at most UNREADABLE_READS times for
# all unreadable rows of a task. Honest tasks bring three or four. A parked row has more claims and stays parked.
UNREADABLE_READS = PARK_LOSSES
UNREADABLE_SECONDS = 10.0

# The reason of an applied delivery whose report had no effect begins with this.
NOT_BELIEVED = "not believed"
# The reason of an applied delivery that waits for a read of its task. Rows are found by this value, also those of
# earlier releases, so it never changes. Other words for people belong into the console's catalogues.
AWAITS_READ = "not believed yet: the task is read at the provider"

_LENGTH = Struct(">Q").pack  # 8 bytes


@dataclass(slots=True)
class Delivery:
    """One raw delivery. `task_id`: the task its token names. `state`: received, or rejected when kept as evidence.

    `key`: equal deliveries collapse under it. A rejected one has a key of its own that never shadows a good one. It is
    computed when it is first needed, because it takes 60 µs for 64 KiB, and a refused body needs none.
    """

    provider: str
    source: str
    task_id: uuid.UUID | None
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    webhook_id: str | None = None
    state: CallbackState = CallbackState.RECEIVED
    reason: str | None = None
    _key: str | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def key(self) -> str:
        if self._key is None:
            words = [self.source, self.provider, str(self.task_id)]
            if self.source == "push":
                words[0] += "" if self.state is CallbackState.RECEIVED else self.state.value
                words.append(self.webhook_id or "")
            framed = b"".join(map(_framed, words)) + _LENGTH(len(self.body))
            self._key = hashlib.sha256(framed + self.body).hexdigest()
        return self._key


@lru_cache(maxsize=256)
def _framed(word: str) -> bytes:
    """After its length, so that different deliveries never have the same key. Most words are those of many."""
    raw = word.encode("utf-8", "surrogatepass")
    return _LENGTH(len(raw)) + raw


# One statement for any number of rows, passed to the driver unchanged. A multi-row VALUES of SQLAlchemy was compiled
# again for each batch, which took more of an acknowledgement's CPU than all the rest of it.
_COLUMNS = "delivery_key, provider, source, task_id, webhook_id, headers, body, state, reason"
_INTO = f"INSERT INTO callback ({_COLUMNS}, received_at, due_at, attempts, losses)"
_NOW = db_now().compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
# The driver releases the interpreter and requests it again once per statement, which costs up to 5 ms each time beside
# a busy event loop. So all rows are in one statement, of the smallest size that holds them, with NULL in the unused
# ones.
_SQLITE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SQLITE_ROW = f"({', '.join('?' * len(_COLUMNS.split(', ')))})"
_SQLITE_NO_ROW = (None,) * len(_COLUMNS.split(", "))
_SQLITE_INSERTS = {
    size: (
        f"{_INTO} SELECT given.*, {_NOW}, CASE column8 WHEN 'received' THEN {_NOW} END, 0, 0 "  # noqa: S608 - our own constants
        f"FROM (VALUES {', '.join([_SQLITE_ROW] * size)}) AS given WHERE column1 IS NOT NULL "
        "ON CONFLICT DO NOTHING"
    )
    for size in _SQLITE_SIZES
}
_SQLITE_AFTER = "SELECT delivery_key FROM callback WHERE id > ?"
# One document instead of an array per column, because psycopg makes arrays in Python, value by value. The bodies are
# one value beside it, each a part of that: base64 in the document was a third more bytes and, of 24 µs of the loop's
# CPU for each delivery, 2. The same statement wakes workers at its commit if it inserted something. One is for
# deliveries whose tokens name tasks, one for others: without a target, an id that a row has would count as a known
# delivery, which is answered 200. A sequence is behind its table after a switch to a logical replica.
_POSTGRESQL_INSERTS = [
    f"WITH new AS ({_INTO} SELECT delivery_key, provider, source, task_id, webhook_id, headers, "  # noqa: S608 - our own constants
    "substring(%(bodies)b FROM starts_at FOR size), state, reason, clock_timestamp(), "
    "CASE state WHEN 'received' THEN clock_timestamp() END, 0, 0 "
    "FROM json_to_recordset(%(rows)s::json) AS given (delivery_key text, provider text, source text, task_id uuid, "
    "webhook_id text, headers jsonb, starts_at int, size int, state text, reason text) "
    f"ON CONFLICT {target} DO NOTHING RETURNING delivery_key), "
    f"notified AS (SELECT pg_notify('{WAKE_CHANNEL}', '') FROM new LIMIT 1) "
    "SELECT delivery_key, (SELECT count(*) FROM notified) FROM new"
    for target in ("(task_id, delivery_key)", "(delivery_key) WHERE task_id IS NULL")
]


def store(session: Session, deliveries: Sequence[Delivery]) -> set[str]:
    """Insert at most 256 deliveries, except stored ones, in the session's transaction. Returns the new keys."""
    return insert(session.connection(), deliveries)


def insert(connection: Connection, deliveries: Sequence[Delivery]) -> set[str]:
    """Insert at most 256. Returns the keys that were new."""
    if connection.dialect.name == "sqlite":
        return insert_sqlite(connection.exec_driver_sql, deliveries)
    inserts = postgresql_inserts(deliveries)
    return {key for each in inserts for key in connection.exec_driver_sql(*each).scalars()}


def postgresql_inserts(deliveries: Sequence[Delivery]) -> Iterator[tuple[str, dict[str, str | bytes]]]:
    """The one or two statements that insert them, with their parameters.

    Sorted by key, because two batches that insert the same keys in different orders deadlock there.
    """
    ordered = sorted(deliveries, key=lambda delivery: delivery.key)
    for names_no_task, statement in enumerate(_POSTGRESQL_INSERTS):
        if some := [each for each in ordered if (each.task_id is None) == names_no_task]:
            starts = accumulate([len(each.body) for each in some], initial=1)
            rows = json.dumps([*map(_document, some, starts)])
            yield statement, {"rows": rows, "bodies": b"".join([each.body for each in some])}


def insert_sqlite(execute: Callable[[str, tuple[Any, ...]], Any], deliveries: Sequence[Delivery]) -> set[str]:
    """Insert at most 256 with `execute`, a connection's own, in one statement. Returns the keys that were new."""
    size = next(size for size in _SQLITE_SIZES if size >= len(deliveries))
    rows = [*map(_values, deliveries), *repeat(_SQLITE_NO_ROW, size - len(deliveries))]
    result = execute(_SQLITE_INSERTS[size], tuple(chain.from_iterable(rows)))
    keys, count = {each.key for each in deliveries}, result.rowcount
    if count in (0, len(deliveries)):
        return keys if count else set()
    after = result.lastrowid - count  # one statement assigns ids without a gap
    return keys.intersection(key for (key,) in execute(_SQLITE_AFTER, (after,)))


def _values(one: Delivery) -> tuple[Any, ...]:
    """The values in the order of the columns, in SQLite's types."""
    task_id, headers = one.task_id.hex if one.task_id else None, _as_json(tuple(one.headers.items()))
    return one.key, one.provider, one.source, task_id, one.webhook_id, headers, one.body, one.state.value, one.reason


@lru_cache(maxsize=256)
def _as_json(headers: tuple[tuple[str, str], ...]) -> str:
    """Headers as JSON. Cached, because a provider's headers are nearly always the same few."""
    return json.dumps(dict(headers))


def _document(one: Delivery, starts_at: int) -> dict[str, Any]:
    """The values by the names of the columns, as JSON. `starts_at`: where its body begins among the bodies, from 1."""
    return {
        "delivery_key": one.key, "provider": one.provider, "source": one.source,
        "task_id": one.task_id.hex if one.task_id else None, "webhook_id": one.webhook_id, "headers": one.headers,
        "starts_at": starts_at, "size": len(one.body), "state": one.state.value, "reason": one.reason,
    }  # fmt: skip


def store_poll(session: Session, delivery: Delivery) -> None:
    """Store the newest answer to a read of the task, one row a task. The caller applies it in the same transaction."""
    found = select_rows(Callback).where(Callback.task_id == delivery.task_id, Callback.source == "poll")
    row = session.exec(found).first()
    if row is None:
        row = Callback(provider=delivery.provider, source="poll", task_id=delivery.task_id, delivery_key="", body=b"")
    row.delivery_key, row.body, row.state = delivery.key, delivery.body, CallbackState.APPLIED
    row.received_at = row.applied_at = db_now()  # type: ignore[assignment]
    session.add(row)
    session.flush()


_CALLBACKS = Callback.__table__.c  # type: ignore[attr-defined]
_UNMATCHED = _CALLBACKS.state == literal_column(f"'{CallbackState.UNMATCHED}'")  # as the partial indexes write it
_AGAIN = {"state": CallbackState.RECEIVED, "reason": None, **claims.DUE_NOW}
_DUE_AGAIN = update(Callback.__table__).where(_UNMATCHED).values(_AGAIN)  # type: ignore[attr-defined]
_BY_TOKEN = _DUE_AGAIN.where(_CALLBACKS.task_id == bindparam("token_of"))
_BY_BODY = {  # one index each
    name: _DUE_AGAIN.where(_CALLBACKS[name] == bindparam("named"), _CALLBACKS.provider == bindparam("by"))
    for name in ("external_task_id", "provider_task_id")
}


def rematch(session: Session, task_id: uuid.UUID, provider: str, **ids: str) -> int:
    """Make the unmatched deliveries of a task due when its row or one of its ids becomes known.

    `ids`: `external_task_id` or `provider_task_id`, as a delivery's body names the task. A worker that holds one of
    these deliveries loses its lease. Returns how many there were.
    """
    session.flush()
    count = sum(
        execute(session, _BY_BODY[name], {"named": value, "by": provider}).changed for name, value in ids.items()
    )
    if "external_task_id" in ids:  # The task row is new, and deliveries whose token names it may wait for it.
        count += execute(session, _BY_TOKEN, {"token_of": task_id}).changed
    return count


_AWAITING = update(Callback.__table__).where(  # type: ignore[attr-defined]
    _CALLBACKS.state == CallbackState.APPLIED, _CALLBACKS.reason == AWAITS_READ
)
_AWAITING = _AWAITING.values(state=CallbackState.RECEIVED, reason=bindparam("then"), **claims.DUE_NOW)
_AWAITING_AT = (  # one index each
    _AWAITING.where(_CALLBACKS.task_id == bindparam("token_of")),
    _AWAITING.where(
        _CALLBACKS.task_id.is_(None),
        _CALLBACKS.external_task_id == bindparam("named"),
        _CALLBACKS.provider == bindparam("by"),
    ),
)


def compare_again(session: Session, task: TaskColumns, *, was_read: bool = True) -> None:
    """Make the deliveries due that await a read of the task, at its own URL and the account's.

    They are compared with the task, which a read has just changed, and cause no other read. Without a read they lose
    the reason, and are decided anew.
    """
    session.flush()
    then = AWAITS_READ if was_read else None
    values = {"then": then, "token_of": task.id, "named": task.external_task_id, "by": task.provider}
    for statement in _AWAITING_AT:
        execute(session, statement, values)


# Without a task of the token the sum is NULL, which is not below the bound, and there is nothing to read.
_OF_TASK = Callback.__table__.alias("of_task").c  # type: ignore[attr-defined]
_READS = select(func.sum(_OF_TASK.attempts)).where(
    _OF_TASK.task_id == _CALLBACKS.task_id, _OF_TASK.state.in_((CallbackState.UNREADABLE, CallbackState.RECEIVED))
)
_REPEATED = select(_CALLBACKS.id).where(
    _CALLBACKS.delivery_key.in_(bindparam("keys", expanding=True)),
    _CALLBACKS.state == literal_column(f"'{CallbackState.UNREADABLE}'"),
    _READS.scalar_subquery() < UNREADABLE_READS,
)
# Rows that another transaction changes are skipped, because two transactions that wait for several rows could deadlock.
_FREE = select(_REPEATED.with_for_update(skip_locked=True).cte("repeated").c.id)
_APPLY_AT = case((_CALLBACKS.applied_at <= db_now(-UNREADABLE_SECONDS), db_now()), else_=db_now(UNREADABLE_SECONDS))
_APPLY_AGAIN = update(Callback.__table__).where(_CALLBACKS.id.in_(_FREE))  # type: ignore[attr-defined]
_APPLY_AGAIN = _APPLY_AGAIN.values(state=CallbackState.RECEIVED, reason=None, **claims.due(_APPLY_AT))


def apply_unreadable_again(database: Database, keys: Collection[str]) -> None:
    """Make the unreadable among these rows due again, within their bounds. Without any it costs one read: 0.1 ms for
    one key and 0.8 for 256.
    """
    with database.autocommit_reader() as connection:
        if connection.execute(_REPEATED, {"keys": keys}).first() is None:
            return
    with database.write() as session:
        run(session, _APPLY_AGAIN, {"keys": keys})
        database.wake(session)
