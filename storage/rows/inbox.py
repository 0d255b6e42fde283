"""Durable intake: a delivery is answered after its row is committed, and bursts share one commit.

    put() ─▶ waiting list ─▶ one writer thread: up to 256 that have queued up, one transaction ─▶ every waiter answered

Nothing waits here that was acknowledged; what was not acknowledged may be lost with the process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from itertools import chain, repeat
from typing import Any

import structlog
from sqlalchemy import Connection, bindparam, case, func, literal_column, update
from sqlalchemy import select as select_columns
from sqlalchemy.dialects import sqlite
from sqlmodel import Session, col, select

from storage.errors import DatabaseUnavailable
from storage.rows import claims, free_space
from storage.rows.claims import PARK_LOSSES
from storage.rows.database import WAKE_CHANNEL, Database, db_now, run
from storage.rows.free_space import Disk
from storage.rows.models import Callback
from storage.states import CallbackState

log = structlog.get_logger()

# What may wait in memory for its commit. 1,000 deliveries are a quarter second of work at the measured rates.
MAX_WAITING = 1_000
MAX_WAITING_BYTES = 64 * 2**20
# Honest tasks bring three or four deliveries; this many kept for one are a mistake, and the task is read instead.
MAX_KEPT_PER_TASK = 200
# Below this many new deliveries of a task in this process nobody counts its rows.
COUNT_FROM = 50
# Equal bytes say nothing when they are unreadable: a proxy that drops bodies makes all deliveries of a task alike. So a
# repeated one is applied again, which reads the task: this long after the time before, and so often for the unreadable
# rows of a task together, as honest tasks bring three or four. A parked row has more claims and stays parked.
UNREADABLE_LOOKS = PARK_LOSSES
UNREADABLE_SECONDS = 10.0
# How many tasks the process remembers counting for.
REMEMBERED_TASKS = 10_000
# A delivery that is not committed 5 s after it was read was answered 503; the last may have been read at the stop.
STOP_SECONDS = 10.0
# A batch larger than this gains nothing more from sharing its fsync and delays its first waiter.
MAX_BATCH = 256


class Intake(Enum):
    """What became of a delivery that was put into the inbox."""

    NEW = "new"
    DUPLICATE = "duplicate"


class InboxFull(DatabaseUnavailable):
    """Too much waits for its commit; the sender should try again in a moment."""


class TaskFull(InboxFull):
    """So many deliveries of this task are kept that new ones say nothing new: read the task instead."""


OnCommit = Callable[[Intake | Exception], None]


@dataclass(slots=True)
class Delivery:
    """One raw delivery. `task_id`: the task its token names. `state`: received, or rejected when kept as evidence.

    `key`: equal deliveries collapse under it. A rejected one has a key of its own that never shadows a good one.
    """

    provider: str
    source: str
    task_id: uuid.UUID | None
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    webhook_id: str | None = None
    state: CallbackState = CallbackState.RECEIVED
    reason: str | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        if self.source == "poll":
            self.key = _digest("poll", self.provider, str(self.task_id), body=self.body)
            return
        verdict = "" if self.state is CallbackState.RECEIVED else self.state.value
        words = ("push" + verdict, self.provider, str(self.task_id), self.webhook_id or "")
        self.key = _digest(*words, body=self.body)


def _digest(*words: str, body: bytes) -> str:
    """SHA-256 of all parts, each after its length: no two different deliveries are written alike."""
    parts = [*(word.encode("utf-8", "surrogatepass") for word in words), body]
    return hashlib.sha256(b"".join([len(part).to_bytes(8, "big") + part for part in parts])).hexdigest()


# One statement for any number of rows, handed to the driver as it is. A multi-row VALUES of SQLAlchemy was compiled
# anew for each batch, which took more of an acknowledgement's CPU than all the rest of it.
_COLUMNS = "delivery_key, provider, source, task_id, webhook_id, headers, body, state, reason"
_INTO = f"INSERT INTO callback ({_COLUMNS}, received_at, due_at, attempts, losses)"
_NOW = db_now().compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
# The driver lets go of the interpreter and asks for it again once per statement, and beside a busy event loop each time
# costs up to 5 ms: so all rows in one, of the smallest size that holds them, the rest of it left NULL.
_SQLITE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SQLITE_ROW = f"({', '.join('?' * len(_COLUMNS.split(', ')))})"
_SQLITE_NO_ROW = (None,) * len(_COLUMNS.split(", "))
_SQLITE_INSERTS = {
    size: (
        f"{_INTO} SELECT given.*, {_NOW}, CASE column8 WHEN 'received' THEN {_NOW} END, 0, 0 "  # noqa: S608 - our own constants
        f"FROM (VALUES {', '.join([_SQLITE_ROW] * size)}) AS given WHERE column1 IS NOT NULL "
        "ON CONFLICT (delivery_key) DO NOTHING"
    )
    for size in _SQLITE_SIZES
}
_SQLITE_AFTER = "SELECT delivery_key FROM callback WHERE id > ?"
# One document instead of an array per column: psycopg makes arrays in Python, value by value. Workers are woken by the
# same statement, when it commits, if it brought something new.
_POSTGRESQL_INSERT = (
    f"WITH new AS ({_INTO} SELECT delivery_key, provider, source, task_id, webhook_id, headers, "  # noqa: S608 - our own constants
    "decode(body, 'base64'), state, reason, clock_timestamp(), "
    "CASE state WHEN 'received' THEN clock_timestamp() END, 0, 0 "
    "FROM json_to_recordset(%(rows)s::json) AS given (delivery_key text, provider text, source text, task_id uuid, "
    "webhook_id text, headers jsonb, body text, state text, reason text) "
    "ON CONFLICT (delivery_key) DO NOTHING RETURNING delivery_key), "
    f"told AS (SELECT pg_notify('{WAKE_CHANNEL}', '') FROM new LIMIT 1) "
    "SELECT delivery_key, (SELECT count(*) FROM told) FROM new"
)


def store(session: Session, deliveries: Sequence[Delivery]) -> set[str]:
    """Insert deliveries that are not there yet, in the session's transaction. Returns the keys that were new."""
    return _insert(session.connection(), deliveries)


def _insert(connection: Connection, deliveries: Sequence[Delivery]) -> set[str]:
    """In one statement for every 256 of them. Returns the keys that were new."""
    # In key order: two batches that insert the same keys in different orders deadlock on PostgreSQL.
    ordered = sorted(deliveries, key=lambda delivery: delivery.key)
    insert = _insert_postgresql if connection.dialect.name == "postgresql" else _insert_sqlite
    return set().union(*(insert(connection, ordered[at : at + MAX_BATCH]) for at in range(0, len(ordered), MAX_BATCH)))


def _insert_postgresql(connection: Connection, ordered: Sequence[Delivery]) -> set[str]:
    rows = json.dumps([_document(each) for each in ordered])
    return set(connection.exec_driver_sql(_POSTGRESQL_INSERT, {"rows": rows}).scalars())


def _insert_sqlite(connection: Connection, ordered: Sequence[Delivery]) -> set[str]:
    size = next(size for size in _SQLITE_SIZES if size >= len(ordered))
    rows = [*map(_values, ordered), *repeat(_SQLITE_NO_ROW, size - len(ordered))]
    result = connection.exec_driver_sql(_SQLITE_INSERTS[size], tuple(chain.from_iterable(rows)))
    keys, count = {each.key for each in ordered}, result.rowcount
    if count in (0, len(ordered)):
        return keys if count else set()
    after = result.lastrowid - count  # one statement gives ids without a gap
    return keys.intersection(connection.exec_driver_sql(_SQLITE_AFTER, (after,)).scalars())


def _values(one: Delivery) -> tuple[Any, ...]:
    """In the order of the columns, as SQLite keeps them."""
    task_id, headers = one.task_id.hex if one.task_id else None, _as_json(tuple(one.headers.items()))
    return one.key, one.provider, one.source, task_id, one.webhook_id, headers, one.body, one.state.value, one.reason


@lru_cache(maxsize=256)
def _as_json(headers: tuple[tuple[str, str], ...]) -> str:
    """A provider's headers are nearly always the same few."""
    return json.dumps(dict(headers))


def _document(one: Delivery) -> dict[str, Any]:
    """By the names of the columns, as JSON can say it."""
    return {
        "delivery_key": one.key,
        "provider": one.provider,
        "source": one.source,
        "task_id": one.task_id.hex if one.task_id else None,
        "webhook_id": one.webhook_id,
        "headers": one.headers,
        "body": base64.b64encode(one.body).decode(),
        "state": one.state.value,
        "reason": one.reason,
    }


def store_poll(session: Session, delivery: Delivery, state: CallbackState, reason: str | None) -> Callback:
    """Keep the newest answer to a read of the task, one row per task. The caller applies it in the same transaction."""
    found = select(Callback).where(Callback.task_id == delivery.task_id, Callback.source == "poll")
    row = session.exec(found).first()
    if row is None:
        row = Callback(provider=delivery.provider, source="poll", task_id=delivery.task_id, delivery_key="", body=b"")
    row.delivery_key, row.body, row.state, row.reason = delivery.key, delivery.body, state, reason
    row.received_at = row.applied_at = db_now()  # type: ignore[assignment]
    session.add(row)
    session.flush()
    return row


_CALLBACKS = Callback.__table__.c  # type: ignore[attr-defined]
_UNMATCHED = _CALLBACKS.state == literal_column(f"'{CallbackState.UNMATCHED}'")  # as the partial indexes say it
_AGAIN = {"state": CallbackState.RECEIVED, "reason": None, **claims.AFRESH}
_DUE_AGAIN = update(Callback.__table__).where(_UNMATCHED).values(_AGAIN)  # type: ignore[attr-defined]
_BY_TOKEN = _DUE_AGAIN.where(_CALLBACKS.task_id == bindparam("token_of"))
_BY_BODY = {  # one index each
    name: _DUE_AGAIN.where(_CALLBACKS[name] == bindparam("named"), _CALLBACKS.provider == bindparam("by"))
    for name in ("external_task_id", "provider_task_id")
}


def rematch(session: Session, task_id: uuid.UUID, provider: str, **ids: str) -> int:
    """Make unmatched deliveries due that speak of a task whose row, or whose id, has just become known.

    `ids`: `external_task_id` or `provider_task_id`, as a delivery's body names the task. Whoever is at such a delivery
    loses its claim. Returns how many there were.
    """
    count = sum(run(session, _BY_BODY[name], {"named": value, "by": provider}).rowcount for name, value in ids.items())
    if "external_task_id" in ids:  # the row is new: deliveries whose token names it waited for it
        count += run(session, _BY_TOKEN, {"token_of": task_id}).rowcount
    return count


# Where the token names no task the sum is NULL, which is not below the bound: there is nothing to read.
_OF_TASK = Callback.__table__.alias("of_task").c  # type: ignore[attr-defined]
_LOOKS = select_columns(func.sum(_OF_TASK.attempts)).where(
    _OF_TASK.task_id == _CALLBACKS.task_id, _OF_TASK.state.in_((CallbackState.UNREADABLE, CallbackState.RECEIVED))
)
_REPEATED = select_columns(_CALLBACKS.id).where(
    _CALLBACKS.delivery_key.in_(bindparam("keys", expanding=True)),
    _CALLBACKS.state == CallbackState.UNREADABLE,
    _LOOKS.scalar_subquery() < UNREADABLE_LOOKS,
)
# Rows that another transaction changes are passed over: two that wait for several rows could deadlock.
_FREE = select_columns(_REPEATED.with_for_update(skip_locked=True).cte("repeated").c.id)
_APPLY_AT = case((_CALLBACKS.applied_at <= db_now(-UNREADABLE_SECONDS), db_now()), else_=db_now(UNREADABLE_SECONDS))
_APPLY_AGAIN = update(Callback.__table__).where(_CALLBACKS.id.in_(_FREE))  # type: ignore[attr-defined]
_APPLY_AGAIN = _APPLY_AGAIN.values(state=CallbackState.RECEIVED, reason=None, **claims.due(_APPLY_AT))


class Inbox:
    """The one writer of good deliveries in this process; refused ones are kept by their handler. Start it, `put` from
    any thread, stop it.

    `stop()` commits and answers what has been put, then refuses more: a delivery is either committed and answered
    or not acknowledged. A database that does not answer is waited for no longer than `STOP_SECONDS`.
    """

    def __init__(self, database: Database, *, free_share: Callable[[], float] | None = None) -> None:
        self._database = database
        self._disk = Disk(free_share or database.free_share)
        self._counted: OrderedDict[int, int] = OrderedDict()  # by a task id's number, which hashes faster
        self._waiting: deque[tuple[Delivery, OnCommit]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            log.error("inbox.not_stopped", after_seconds=STOP_SECONDS)  # its thread ends with the process

    @property
    def is_full(self) -> bool:
        """Whether new deliveries are refused for now: too many wait for their commit, or the disk is nearly full."""
        return len(self._waiting) >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES or self._disk.is_short

    def put(self, delivery: Delivery) -> Future[Intake]:
        """Queue one delivery for the next commit. The future ends when its row is durable, or with the reason it
        is not. Raises `InboxFull`."""
        future: Future[Intake] = Future()
        self.submit(delivery, partial(_end, future))
        return future

    def submit(self, delivery: Delivery, on_commit: OnCommit) -> None:
        """As `put`, with `on_commit` called in the inbox's thread: it must return at once and raise nothing.

        Raises `InboxFull`, as `put` does; `on_commit` is not called then.
        """
        with self._changed:
            if self.is_full or self._stopping:
                raise InboxFull("no room: too many deliveries wait for their commit, or the disk is nearly full")
            self._waiting.append((delivery, on_commit))
            self._bytes += len(delivery.body)
            self._changed.notify()

    def _run(self) -> None:
        self._disk.look()
        while (batch := self._take()) is not None:
            if batch:
                self._commit(batch)
            self._disk.look()

    def _take(self) -> list[tuple[Delivery, OnCommit]] | None:
        """What waits; [] when nothing came for a while, None when nothing comes any more."""
        with self._changed:
            pause = free_space.FREE_SPACE_INTERVAL_SECONDS
            if not self._changed.wait_for(lambda: self._waiting or self._stopping, pause):
                return []
            if not self._waiting:
                return None
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            self._bytes -= sum(len(delivery.body) for delivery, _ in batch)
            return batch

    def _commit(self, batch: list[tuple[Delivery, OnCommit]]) -> None:
        try:
            new, full = self._write([delivery for delivery, _ in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is, every waiter is told
            if len(batch) == 1 or isinstance(error, DatabaseUnavailable):
                for _, on_commit in batch:
                    on_commit(error)
                return
            for single in batch:  # one bad delivery fails no other
                self._commit([single])
            return
        for delivery, on_commit in batch:
            if delivery.key in full:
                on_commit(TaskFull(f"{MAX_KEPT_PER_TASK} deliveries of this task are kept already"))
                continue
            intake = Intake.NEW if delivery.key in new else Intake.DUPLICATE
            new.discard(delivery.key)  # twins in one batch: the first was new
            on_commit(intake)

    def _write(self, deliveries: list[Delivery]) -> tuple[set[str], set[str]]:
        """Store what there is room for. Returns the new keys, and those refused as their task is full."""
        full = self._over(deliveries)
        with self._database.autocommit_writer() as connection:
            new = _insert(connection, [delivery for delivery in deliveries if delivery.key not in full])
        self._count([delivery.task_id.int for delivery in deliveries if delivery.task_id and delivery.key in new])
        if known := {delivery.key for delivery in deliveries} - new - full:
            self._apply_unreadable_again(known)
        return new, full

    def _apply_unreadable_again(self, keys: set[str]) -> None:
        """Make the unreadable among these rows due again, within their bounds. Without any it costs one read: 0.1 ms
        for one key and 0.8 for 256."""
        with self._database.autocommit_reader() as connection:
            if connection.execute(_REPEATED, {"keys": keys}).first() is None:
                return
        with self._database.write() as session:
            run(session, _APPLY_AGAIN, {"keys": keys})
            self._database.wake(session)

    def _over(self, deliveries: list[Delivery]) -> set[str]:
        """The keys that are new and whose task has all the deliveries it may keep."""
        named = (each.task_id for each in deliveries if each.task_id)
        suspects = {task_id for task_id in named if self._counted.get(task_id.int, 0) >= COUNT_FROM}
        if not suspects:
            return set()
        with self._database.read() as session:
            return self._refused(session, deliveries, suspects)

    def _refused(self, session: Session, deliveries: list[Delivery], suspects: set[uuid.UUID]) -> set[str]:
        per_task = select(Callback.task_id).where(col(Callback.task_id).in_(suspects)).group_by(col(Callback.task_id))
        full = set(session.exec(per_task.having(func.count() >= MAX_KEPT_PER_TASK)))
        keys = {each.key for each in deliveries if each.task_id in full}
        if not keys:
            return keys
        known = select(Callback.delivery_key).where(col(Callback.delivery_key).in_(keys))
        there = set(session.exec(known))
        return keys - there

    def _count(self, task_numbers: list[int]) -> None:
        for number in task_numbers:
            self._counted[number] = self._counted.pop(number, 0) + 1
        while len(self._counted) > REMEMBERED_TASKS:
            self._counted.popitem(last=False)


def _end(future: Future[Intake], outcome: Intake | Exception) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
