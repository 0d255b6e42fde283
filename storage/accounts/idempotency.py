"""Idempotency keys of clients and the first response to each, kept for 24 hours. Callers own the transactions.

A clock that is set forward ends no key early in a process that ran before. Not covered: a process that starts with the
wrong clock, and the clock of PostgreSQL on another host.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, update
from sqlmodel import Session, col

from storage.database.clock import db_now, db_now_once
from storage.database.sessions import Database, insert_or_ignore, run
from storage.rows.models import Idempotency

# Documented for clients (infra/docs/gateway.md).
KEPT_SECONDS = 86_400
# Clocks are corrected by less than this all the time.
STEP_SECONDS = 1.0


class ForwardSteps:
    """How far this host's clock was set forward within the last 24 hours, seen by a clock that nobody sets.

    Sleep of the host counts as a step, so its keys are kept longer.
    """

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()
        self._earlier: list[tuple[float, float]] = []  # until when (monotonic) an earlier offset may have held
        self._lock = threading.Lock()

    def seconds(self) -> float:
        with self._lock:  # two threads at once would forget a step
            now = self._monotonic()
            offset = self._wall() - now
            if abs(offset - self._offset) > STEP_SECONDS:
                self._earlier.append((now, self._offset))
                self._offset = offset
            self._earlier = [each for each in self._earlier if each[0] > now - KEPT_SECONDS]
            return offset - min([offset, *(earlier for _, earlier in self._earlier)])


steps = ForwardSteps()


@dataclass(frozen=True)
class Key:
    """One client's key. `client`: fingerprint of its API key. `body_hash`: hash of the request under this key."""

    client: str
    word: str = field(repr=False)
    body_hash: str


def take(session: Session, key: Key, task_id: uuid.UUID) -> Idempotency | None:
    """Take the key for this task. Returns None when the key was free, else its row, which may have no answer yet.

    Of several concurrent transactions one takes the key; the others wait until it ends.
    """
    session.execute(delete(Idempotency).where(_is(key), col(Idempotency.created_at) <= db_now(-_age())))
    values = {"client": key.client, "key": key.word, "body_hash": key.body_hash, "task_id": task_id}
    while not insert_or_ignore(session, Idempotency, {**values, "created_at": db_now()}):
        known = find(session, key)
        if known is not None:
            return known
        # On PostgreSQL the key may be given back between the two statements. Then it is free again.
    return None


def find(session: Session, key: Key) -> Idempotency | None:
    """The row of a taken key, None when the key is free."""
    return session.get(Idempotency, (key.client, key.word), populate_existing=True)


def point_to(session: Session, key: Key, task_id: uuid.UUID) -> None:
    """Assign a key that this transaction took to another task."""
    session.execute(update(Idempotency).where(_is(key)).values(task_id=task_id))


def answer(session: Session, key: Key, task_id: uuid.UUID, status: int, body: dict[str, Any]) -> None:
    """Store the response of this task's create, unless the key has one already or is another create's by now."""
    unanswered = update(Idempotency).where(_is(key), _is_of(task_id), col(Idempotency.status).is_(None))
    session.execute(unanswered.values(status=status, answer=body))


def give_back(session: Session, key: Key, task_id: uuid.UUID) -> None:
    """Free this task's key, because its create made nothing, so that the client may use it again."""
    session.execute(delete(Idempotency).where(_is(key), _is_of(task_id)))


def prune_all(database: Database) -> int:
    """Delete keys older than 24 hours. Returns how many."""
    with database.write() as session:
        old = delete(Idempotency).where(col(Idempotency.created_at) <= db_now_once(-_age()))
        return run(session, old).rowcount


def _age() -> float:
    """The age by the database's clock, in seconds, at which a key is 24 hours old."""
    return KEPT_SECONDS + steps.seconds()


def _is(key: Key) -> Any:
    return (col(Idempotency.client) == key.client) & (col(Idempotency.key) == key.word)


def _is_of(task_id: uuid.UUID) -> Any:
    return col(Idempotency.task_id) == task_id
