"""Durable intake: a delivery is answered after its row is committed, and bursts share one commit.

    put() ─▶ waiting list ─▶ one writer thread: everything that has queued up, one transaction ─▶ every waiter answered

Nothing waits here that was acknowledged; what was not acknowledged may be lost with the process.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, select

from storage.database import Database, clock
from storage.errors import StoreUnavailable
from storage.models import Callback
from storage.states import CallbackState

# What may wait in memory for its commit. 1,000 deliveries are a quarter second of work at the measured rates.
MAX_WAITING = 1_000
MAX_WAITING_BYTES = 64 * 2**20
# A batch larger than this gains nothing more from sharing its fsync and delays its first waiter.
MAX_BATCH = 256


class Intake(Enum):
    """What became of a delivery that was put into the inbox."""

    NEW = "new"
    DUPLICATE = "duplicate"


class InboxFull(StoreUnavailable):
    """Too much waits for its commit; the sender should try again in a moment."""


@dataclass(frozen=True)
class Delivery:
    """One raw delivery. `task_id`: the task its token names. `state`: received, or rejected when kept as evidence."""

    provider: str
    source: str
    task_id: uuid.UUID | None
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    webhook_id: str | None = None
    state: CallbackState = CallbackState.RECEIVED
    reason: str | None = None

    @property
    def key(self) -> str:
        """Equal deliveries collapse under it. A rejected one has a key of its own that never shadows a good one."""
        if self.source == "poll":
            return _digest("poll", self.provider, str(self.task_id), self.body)
        verdict = "" if self.state is CallbackState.RECEIVED else self.state.value
        return _digest("push" + verdict, self.provider, str(self.task_id), self.webhook_id or "", self.body)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


def store(session: Session, deliveries: Sequence[Delivery]) -> set[str]:
    """Insert deliveries that are not there yet; wake workers on commit. Returns the keys that were new."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    # In key order: two batches that insert the same keys in different orders deadlock on PostgreSQL.
    rows = [_row(delivery) for delivery in sorted(deliveries, key=lambda delivery: delivery.key)]
    statement: Any = insert(Callback).values(rows).on_conflict_do_nothing(index_elements=["delivery_key"])
    return set(session.scalars(statement.returning(Callback.delivery_key)))


def _row(delivery: Delivery) -> dict[str, Any]:
    return {
        "delivery_key": delivery.key,
        "provider": delivery.provider,
        "source": delivery.source,
        "task_id": delivery.task_id,
        "webhook_id": delivery.webhook_id,
        "headers": delivery.headers,
        "body": delivery.body,
        "received_at": clock(),
        "state": delivery.state,
        "reason": delivery.reason,
        "due_at": clock() if delivery.state is CallbackState.RECEIVED else None,
        "attempts": 0,
        "losses": 0,
    }


def store_poll(session: Session, delivery: Delivery, state: CallbackState, reason: str | None) -> Callback:
    """Keep the newest answer to a read of the task, one row per task. The caller applies it in the same transaction."""
    found = select(Callback).where(Callback.task_id == delivery.task_id, Callback.source == "poll")
    row = session.exec(found).first()
    if row is None:
        row = Callback(provider=delivery.provider, source="poll", task_id=delivery.task_id, delivery_key="", body=b"")
    row.delivery_key, row.body, row.state, row.reason = delivery.key, delivery.body, state, reason
    row.received_at = row.applied_at = clock()  # type: ignore[assignment]
    session.add(row)
    session.flush()
    return row


class Inbox:
    """The one writer of pushed deliveries in this process. Start it, `put` from any thread, stop it.

    `stop()` commits and answers what has been put, then refuses more: a delivery is either committed and answered
    or not acknowledged.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[tuple[Delivery, Future[Intake]]] = deque()
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
        self._thread.join()

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES

    def put(self, delivery: Delivery) -> Future[Intake]:
        """Queue one delivery for the next commit. The future ends when its row is durable, or with the reason it
        is not. Raises `InboxFull`."""
        future: Future[Intake] = Future()
        with self._changed:
            if self.is_full or self._stopping:
                raise InboxFull("too many deliveries wait for their commit")
            self._waiting.append((delivery, future))
            self._bytes += len(delivery.body)
            self._changed.notify()
        return future

    def _run(self) -> None:
        while batch := self._take():
            self._commit(batch)

    def _take(self) -> list[tuple[Delivery, Future[Intake]]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            self._bytes -= sum(len(delivery.body) for delivery, _ in batch)
            return batch

    def _commit(self, batch: list[tuple[Delivery, Future[Intake]]]) -> None:
        try:
            new = self._write([delivery for delivery, _ in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is, every waiter is told
            if len(batch) == 1 or isinstance(error, StoreUnavailable):
                for _, future in batch:
                    _refuse(future, error)
                return
            for single in batch:  # one bad delivery fails no other
                self._commit([single])
            return
        for delivery, future in batch:
            intake = Intake.NEW if delivery.key in new else Intake.DUPLICATE
            new.discard(delivery.key)  # twins in one batch: the first was new
            if future.set_running_or_notify_cancel():
                future.set_result(intake)

    def _write(self, deliveries: list[Delivery]) -> set[str]:
        with self._database.write() as session:
            new = store(session, deliveries)
            if new:
                self._database.wake(session)
            return new


def _refuse(future: Future[Intake], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
