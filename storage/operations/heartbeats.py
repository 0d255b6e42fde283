"""Heartbeats: one row per worker process, which shows whether workers are alive."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Sequence

from sqlalchemy import Uuid, bindparam, func, update
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, col, delete, select

from storage.background import BackgroundCheck
from storage.database.clock import db_now, db_now_once
from storage.database.prepared import execute
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows.models import Worker

BEAT_SECONDS = 5.0
# Three missed heartbeats plus 5 s for a slow moment.
ALIVE_SECONDS = 20.0
# The next worker that starts removes rows older than this.
FORGET_SECONDS = 86_400.0

_WORKERS = Worker.__table__  # type: ignore[attr-defined]
_IS_OWN = _WORKERS.c.id == bindparam("own", type_=Uuid)
# A later time is of a process that died before the clock was set back.
_IS_ALIVE = _WORKERS.c.seen_at.between(db_now_once(-ALIVE_SECONDS), db_now_once(ALIVE_SECONDS))
_OTHERS = select(func.count()).where(_IS_ALIVE, ~_IS_OWN).scalar_subquery()
_BEAT = update(_WORKERS).where(_IS_OWN).values(seen_at=db_now()).returning(_OTHERS)


def register(database: Database, threads: int, worker_id: uuid.UUID | None = None) -> uuid.UUID:
    """Insert this process's row and remove the rows of workers that died a day ago. Returns the row's id.

    `worker_id`: of a row that is gone.
    """
    row = Worker(id=worker_id or uuid.uuid4(), host=socket.gethostname(), pid=os.getpid(), threads=threads)
    row.started_at = row.seen_at = db_now()  # type: ignore[assignment]
    with database.write() as session:
        session.execute(delete(Worker).where(col(Worker.seen_at) < db_now(-FORGET_SECONDS)))
        session.add(row)
    return row.id


def beat(database: Database, worker_id: uuid.UUID) -> int:
    """Note that this process is alive. Returns how many are, this one included; 0: its row is gone.

    One statement without a transaction. With the objects of a session it took a third of an idle worker's CPU.
    """
    with database.autocommit_writer() as connection:
        others = execute(connection, _BEAT, {"own": worker_id}).rows
        return 1 + others[0][0] if others else 0


def alive(session: Session) -> Sequence[Worker]:
    """The workers that are alive, the oldest first."""
    return session.exec(select(Worker).where(_IS_ALIVE).order_by(col(Worker.started_at))).all()


def try_write(database: Database) -> None:
    """Write a row and remove it, which a standby, a read-only file and a full disk refuse.

    A row that a crash leaves counts as that of a dead worker, and the next worker that starts removes it.
    """
    row = Worker(host="receiver check", pid=os.getpid(), threads=0)
    row.started_at = row.seen_at = db_now(-FORGET_SECONDS)  # type: ignore[assignment]
    with database.write() as session:
        session.add(row)
    unregister(database, row.id)


def unregister(database: Database, worker_id: uuid.UUID) -> None:
    with database.write() as session:
        session.execute(delete(Worker).where(col(Worker.id) == worker_id))


def count_alive(database: Database) -> int:
    """How many worker processes were alive within the last 20 s."""
    with database.read() as session:
        return session.exec(select(func.count()).select_from(Worker).where(_IS_ALIVE)).one()


class WriteCheck(BackgroundCheck):
    """`state`: why the database takes no writes; empty if it does, and before the first result."""

    def __init__(self, database: Database, *, max_wait_seconds: float) -> None:
        self._database = database
        super().__init__("write-check", self._ask, "", refresh_seconds=BEAT_SECONDS, max_wait_seconds=max_wait_seconds)

    def _ask(self) -> str:
        try:
            try_write(self._database)
        except (DatabaseUnavailable, DBAPIError) as error:
            return str(error)
        return ""
