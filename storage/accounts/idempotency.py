"""A client's `Idempotency-Key` and the first answer to it, for 24 hours. Callers own the transactions."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import CursorResult, delete, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col

from storage.rows.database import Database, db_now, db_now_once
from storage.rows.models import Idempotency

# As long as the issue promises; a client that retries for longer than a day has made another decision.
KEPT_SECONDS = 86_400


@dataclass(frozen=True)
class Key:
    """One key of one client. `client`: a fingerprint of its API key. `body_hash`: of what it asks for under it."""

    client: str
    word: str = field(repr=False)
    body_hash: str


def take(session: Session, key: Key, task_id: uuid.UUID) -> Idempotency | None:
    """Take the key for this task. None: it is taken now; else whoever took it before, maybe not answered yet.

    Of several at once one takes it, and the others wait for that transaction's end.
    """
    session.execute(delete(Idempotency).where(_is(key), col(Idempotency.created_at) <= db_now(-KEPT_SECONDS)))
    while not _insert(session, key, task_id):
        known = find(session, key)
        if known is not None:
            return known
        # Given back between the two statements, which PostgreSQL lets us see: it is free again.
    return None


def _insert(session: Session, key: Key, task_id: uuid.UUID) -> bool:
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    values = {"client": key.client, "key": key.word, "body_hash": key.body_hash, "task_id": task_id}
    taken: Any = dialect.insert(Idempotency).values(created_at=db_now(), **values).on_conflict_do_nothing()
    return session.execute(taken.returning(Idempotency.task_id)).first() is not None


def find(session: Session, key: Key) -> Idempotency | None:
    """Who took the key; None: nobody, or it was given back."""
    return session.get(Idempotency, (key.client, key.word), populate_existing=True)


def point_to(session: Session, key: Key, task_id: uuid.UUID) -> None:
    """The task that the key, taken in this transaction, stands for after all."""
    session.execute(update(Idempotency).where(_is(key)).values(task_id=task_id))


def answer(session: Session, key: Key, status: int, body: dict[str, Any]) -> None:
    """Remember the answer, unless there is one already: the first counts."""
    unanswered = update(Idempotency).where(_is(key), col(Idempotency.status).is_(None))
    session.execute(unanswered.values(status=status, answer=body))


def give_back(session: Session, key: Key) -> None:
    """Forget a key that nothing came of: its client may ask again under it."""
    session.execute(delete(Idempotency).where(_is(key)))


def prune_all(database: Database) -> int:
    """Forget the keys whose time is over. Returns how many."""
    with database.write() as session:
        old = delete(Idempotency).where(col(Idempotency.created_at) <= db_now_once(-KEPT_SECONDS))
        result = session.execute(old)
    assert isinstance(result, CursorResult)
    return result.rowcount


def _is(key: Key) -> Any:
    return (col(Idempotency.client) == key.client) & (col(Idempotency.key) == key.word)
