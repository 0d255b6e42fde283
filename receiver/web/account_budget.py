"""Limits the deliveries that are stored for the account URL. Its holder may send any number, for any task or none."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy import func, text
from sqlmodel import Session, col, select

from receiver.tasks import apply_deliveries
from receiver.tasks.allowance import Allowance
from receiver.web.rate_limits import REMEMBERED_TASKS
from receiver.web.refusals import AT_ONCE, LATE, RETRY_SOON, Refused
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows.deliveries import Delivery
from storage.rows.loop_connections import SqliteLoopReads
from storage.rows.models import Callback, Task
from storage.states import CallbackState

T = TypeVar("T")

# Tests by the provider's console, and tasks that are made elsewhere, bring some a day. `receiver prune` makes room.
MAX_ROWS, MAX_BYTES = 10_000, 64 * 2**20
# An honest task has three or four. Each is confirmed by a read, and deliveries cause at most this many reads of a task.
MAX_OF_TASK = 20
# The interval of counting the rows. Deliveries that are stored in between are added in memory.
COUNT_SECONDS = 10.0
# One thread finds the task of each delivery, in some 1 ms. Each waiting delivery holds a body of up to 64 KiB. On
# SQLite the event loop looks first, in 15 µs, and leaves the thread only deliveries of our tasks that are not full.
MAX_WAITING, TURN_SECONDS = 200, 1.5
# The same thread parses longer bodies. The event loop waits for the parser: 0.4 ms for 4 KiB of numbers, 2.6 at most.
MAX_LOOP_BYTES = 4 * 1024
# The processor time that the thread may take each second, and at once after a pause. It allows a hundred lookups a
# second and a thousand at once, or forty of the worst bodies.
SECONDS_A_SECOND, MOST_SECONDS = 0.1, 1.0
# The bytes of unmatched deliveries that may be stored each second, and at once after a pause. `ROW_BYTES` are added to
# each body. This allows 60 small deliveries a second and a thousand at once. Without it 18 MB a second were stored.
BYTES_A_SECOND, MOST_BYTES_AT_ONCE, ROW_BYTES = 2**18, 4 * 2**20, 4 * 1024
# The number of rows falls when deliveries are pruned. An overdrawn budget has room again after some seconds.
FULL_RETRY_AFTER_SECONDS, OVERDRAWN_RETRY_AFTER_SECONDS = 3_600, 10


class AccountRefused(Refused):
    """The account URL takes no delivery like this one now."""

    def __init__(self, words: str, outcome: str, retry_after_seconds: int) -> None:
        super().__init__(429, words, outcome, {"Retry-After": str(retry_after_seconds)})


class AccountFull(AccountRefused):
    """The account URL has all the deliveries it may store that match no task, or that match this task. `is_task`: the
    latter.
    """

    def __init__(self, *, is_task: bool) -> None:
        what = f"{MAX_OF_TASK} deliveries of this task" if is_task else "all it may of what matches no task"
        words, outcome = f"the account's address holds {what}", "task_full" if is_task else "account_full"
        super().__init__(words, outcome, FULL_RETRY_AFTER_SECONDS)


class AccountOverdrawn(AccountRefused):
    """The deliveries of the last seconds took the time, or the bytes, that the account URL may take."""

    def __init__(self) -> None:
        super().__init__(AT_ONCE, "many_at_once", OVERDRAWN_RETRY_AFTER_SECONDS)


class AccountBusy(AccountRefused):
    """Too many deliveries wait for a place."""

    def __init__(self) -> None:
        super().__init__(AT_ONCE, "many_at_once", OVERDRAWN_RETRY_AFTER_SECONDS)


# The external id and the provider's own id that a delivery's body names.
Ids = tuple[str | None, str | None]


class AccountBudget:
    """Used in one event loop. `ids`: reads them from a delivery's body."""

    def __init__(self, database: Database, ids: Callable[[Delivery], Ids]) -> None:
        self._database = database
        self._ids = ids
        self._reads: SqliteLoopReads | None = None
        self._rows = self._bytes = 0
        self._counted_at = float("-inf")
        self._counting = asyncio.Lock()
        self._thread, self._turn, self._waiting = CapacityLimiter(1), asyncio.Lock(), 0
        self._of_task: dict[uuid.UUID, int] = {}
        self._guard = threading.Lock()  # the time of those counts
        self._seconds = Allowance(SECONDS_A_SECOND, MOST_SECONDS)
        self._stored = Allowance(BYTES_A_SECOND, MOST_BYTES_AT_ONCE)

    def check_length(self, announced: int) -> None:
        """Raise AccountOverdrawn for a body that there is no time to parse, before it is read."""
        if announced > MAX_LOOP_BYTES and self._seconds.is_spent:
            raise AccountOverdrawn

    async def take(self, delivery: Delivery) -> uuid.UUID | None:
        """Take a place for a delivery. Returns its task. Raises AccountFull, AccountOverdrawn, AccountBusy,
        or Refused if the database is too slow.

        If the rows cannot be counted, it gives a place: the commit shows whether the database works.
        """
        if self._waiting >= MAX_WAITING:
            raise AccountBusy
        self._waiting += 1
        try:
            task_id = await self._find(delivery)
            if task_id is None and not await self._have_room():
                raise AccountFull(is_task=False)
            if task_id is None and self._stored.is_spent:
                raise AccountOverdrawn
        except DatabaseUnavailable:
            return None
        except TimeoutError:
            raise Refused(503, LATE, "late", RETRY_SOON) from None
        finally:
            self._waiting -= 1
        return task_id

    async def _find(self, delivery: Delivery) -> uuid.UUID | None:
        """Take a place of the delivery's task. None: it names none of ours, or the delivery is stored already."""
        is_long = len(delivery.body) > MAX_LOOP_BYTES
        ids = await self._in_time(self._ids, delivery) if is_long else self._ids(delivery)
        if not any(ids) or self._names_no_task(delivery, ids):
            return None
        return await self._in_time(self._take_of_task, delivery, ids)

    async def _in_time(self, work: Callable[..., T], *words: Any) -> T:
        """Run it in the one thread, while there is time for it. Raises AccountOverdrawn, TimeoutError."""
        if self._seconds.is_spent:
            raise AccountOverdrawn
        return await self._in_turn(self._spend_time, work, *words)

    def _spend_time(self, work: Callable[..., T], *words: Any) -> T:
        if self._seconds.is_spent:  # by deliveries that were parsed meanwhile
            raise AccountOverdrawn
        started = time.thread_time()
        try:
            return work(*words)
        finally:
            self._seconds.spend(time.thread_time() - started)

    def _names_no_task(self, delivery: Delivery, ids: Ids) -> bool:
        """Whether the event loop can tell that it names no task of ours. Raises AccountFull if the loop can tell so."""
        if self._database.is_sqlite:
            with suppress(sqlite3.Error, UnicodeError):  # the thread meets the same fault and reports it
                self._reads = self._reads or SqliteLoopReads(self._database)
                found = self._reads.task_named(delivery.provider, *ids)
                is_full = found is not None and self._of_task.get(found, 0) >= MAX_OF_TASK
                if is_full and not self._reads.is_stored(delivery.key):
                    raise AccountFull(is_task=True)
                return found is None
        return False

    def close(self) -> None:
        if self._reads is not None:
            self._reads.close()
            self._reads = None

    async def _in_turn(self, work: Callable[..., T], *words: Any) -> T:
        """Run it in the one thread. Raises TimeoutError; a statement in progress then keeps the turn until it ends."""
        async with asyncio.timeout(TURN_SECONDS):
            await self._turn.acquire()
        working = asyncio.ensure_future(to_thread.run_sync(work, *words, limiter=self._thread))
        working.add_done_callback(self._end_turn)
        async with asyncio.timeout(TURN_SECONDS):
            return await asyncio.shield(working)

    def _end_turn(self, working: asyncio.Future[Any]) -> None:
        self._turn.release()
        if not working.cancelled():
            working.exception()  # the waiting handler may have left

    def settle(self, delivery: Delivery, task_id: uuid.UUID | None, *, is_new: bool) -> None:
        """Report the outcome of a delivery that had a place. One that names no task may still match one later."""
        if task_id is None and is_new:
            self._rows += 1
            self._bytes += len(delivery.body)
            self._stored.spend(len(delivery.body) + ROW_BYTES)
        if task_id is not None and not is_new:
            with self._guard:
                self._of_task[task_id] = self._of_task.get(task_id, 1) - 1

    def _take_of_task(self, delivery: Delivery, ids: Ids) -> uuid.UUID | None:
        with self._database.read() as session:
            if (task_id := apply_deliveries.find(session, delivery.provider, *ids)) is None:
                return None
            before = self._of_task.get(task_id)
            counted = count_of_task(session, task_id) if before is None else before
            with self._guard:
                kept = self._of_task.setdefault(task_id, counted)
                is_full = kept >= MAX_OF_TASK
                self._of_task[task_id] = kept if is_full else kept + 1
                while len(self._of_task) > REMEMBERED_TASKS:
                    self._of_task.pop(next(iter(self._of_task)))
            at_account = col(Callback.task_id).is_(None)
            known = select(Callback.id).where(at_account, Callback.delivery_key == delivery.key)
            if is_full and session.exec(known).first() is None:
                raise AccountFull(is_task=True)
        return None if is_full else task_id

    async def _have_room(self) -> bool:
        """Count if the last count is old. One delivery does so, the others use the last count meanwhile: those that
        waited for the lock became a queue that did not end while a flood lasted.
        """
        is_first = self._counted_at == float("-inf")
        if self._is_count_old and (is_first or not self._counting.locked()):
            async with asyncio.timeout(2 * TURN_SECONDS), self._counting:
                if self._is_count_old:
                    self._rows, self._bytes = await self._in_turn(self._count)
                    self._counted_at = time.monotonic()
        return self._rows < MAX_ROWS and self._bytes < MAX_BYTES

    @property
    def _is_count_old(self) -> bool:
        return time.monotonic() >= self._counted_at + COUNT_SECONDS

    def _count(self) -> tuple[int, int]:
        with self._database.read() as session:
            return count(session)


def count(session: Session) -> tuple[int, int]:
    """The number of deliveries whose token names no task and that match none, and the bytes of their bodies."""
    rows, size = session.execute(text(of_nobody(session, "count(*), sum(length(body))"))).one()
    return rows, int(size or 0)


def of_nobody(session: Session, columns: str) -> str:
    """The statement that selects from the deliveries whose token names no task and that match none.

    SQLite would search those that match one, too: 180 ms beside 100,000 instead of 0.6.
    """
    index = "INDEXED BY callback_of_nobody" if session.connection().dialect.name == "sqlite" else ""
    return f"SELECT {columns} FROM callback {index} WHERE task_id IS NULL AND state <> '{CallbackState.APPLIED}'"  # noqa: S608 - our own constants


def count_of_task(session: Session, task_id: uuid.UUID) -> int:
    """The number of deliveries at the account URL that belong to this task."""
    name = session.exec(select(Task.external_task_id).where(Task.id == task_id)).first()
    mine = (col(Callback.task_id).is_(None), Callback.external_task_id == name)
    return session.exec(select(func.count()).select_from(Callback).where(*mine)).one()
