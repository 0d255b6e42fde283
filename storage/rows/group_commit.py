"""Group commit of deliveries: each is answered after its row is durable, and a burst shares one fsync.

    commit() ─▶ waiting ─┬─▶ the event loop: all waiting ones in one transaction, if it can begin at once ─▶ answers
                         └─▶ a thread: what the loop could not commit, or would hang on                  ─▶ answers

The loop itself commits, because a thread beside a busy loop waits up to 5 ms for each turn at the interpreter lock. The
commit begins two turns of the loop after the first delivery of a batch arrived. By then every readable socket has added
its delivery: 50 of 64 at full load, instead of 28. The server's CPU for an acknowledgement fell by a sixth on SQLite
and by a fourth on PostgreSQL.

The thread handles every case that may take long or fail: a lock of another process, a slow disk, a failed batch, a task
near its cap, a repeated unreadable delivery. A disk that becomes slow delays the loop for one commit. The thread then
commits until several commits in a row were quick. It takes its batch once its turn has come, so a delivery waits for
one other writer's transaction and not for two.

An acknowledged delivery is durable. A delivery that waits here is not acknowledged and may be lost with the process.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import Enum
from traceback import clear_frames

import structlog
from sqlalchemy import Connection
from sqlmodel import col, func, select

from storage.database import free_space
from storage.database.free_space import Disk
from storage.database.sessions import Database, again_on_new_session
from storage.database.urls import place
from storage.errors import DatabaseUnavailable
from storage.rows.deliveries import MAX_BATCH, Delivery, apply_unreadable_again, insert
from storage.rows.loop_connections import Locked, LoopConnection, loop_connection
from storage.rows.models import Callback

log = structlog.get_logger()

# The most deliveries that wait in memory for their commit. 1,000 are a quarter second of work at the measured rates.
MAX_WAITING = 1_000
MAX_WAITING_BYTES = 64 * 2**20
# Honest tasks bring three or four deliveries. This many stored for one are a mistake, and the task is read instead.
MAX_KEPT_PER_TASK = 200
# Below this many new deliveries of a task in this process its rows are not counted.
COUNT_FROM = 50
# How many tasks with counted rows the process remembers.
REMEMBERED_TASKS = 10_000
# The longest wait of a delivery. A provider's own timeout is unknown; most give 5 to 10 s.
COMMIT_SECONDS = 5.0
# The longest wait at the stop. The last delivery may have come just before it.
STOP_SECONDS = 10.0
# A commit takes 2 to 5 ms on a healthy disk. On a slower one a thread is better, because the loop reads and answers
# meanwhile. With a limit of 20 ms here, a busy disk allowed 1,765 deliveries a second instead of 2,537.
SLOW_IN_LOOP_SECONDS = 0.01
# The same limit in the thread, which also waits for its turn at the interpreter lock, up to 5 ms each time.
SLOW_IN_THREAD_SECONDS = 0.02
# Bodies of this many bytes are written in about 5 ms. The longest single one has a quarter of that.
MAX_LOOP_BYTES = 2**20
# After this many quick commits of the thread in a row the loop commits; it never does before the first.
QUICK_COMMITS = 8


class Intake(Enum):
    """The outcome of a delivery."""

    NEW = "new"
    DUPLICATE = "duplicate"


class QueueFull(DatabaseUnavailable):
    """Too many deliveries wait for their commit. The sender should try again in a moment."""


class TaskFull(QueueFull):
    """The task has so many stored deliveries that a new one brings no news. Read the task instead."""


Waiting = tuple[Delivery, asyncio.Future[Intake]]


class GroupCommit:
    """The one writer of pushed deliveries in this process, for one event loop.

    `stop()` commits and answers the waiting deliveries, then refuses more: a delivery is either committed and answered
    or not acknowledged. It waits at most `STOP_SECONDS` for a database that does not answer.
    """

    def __init__(self, database: Database, *, free_share: Callable[[], float] | None = None) -> None:
        self._database = database
        self._disk = Disk(free_share or database.free_share)
        self._task_limit = _TaskLimit()
        self._waiting: deque[Waiting] = deque()
        self._bytes = 0
        self._quick_commits = 0
        self._changed = threading.Condition()  # guards what follows and what waits
        self._is_threads_turn = True
        self._is_loop_committing = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._connection: LoopConnection | None = None  # of the loop, opened by the thread
        self._committing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start it. Call this, and all but `is_full` and `state`, in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        with self._changed:
            self._is_stopping = self._is_threads_turn = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        if self._thread.is_alive():
            log.error("group_commit.not_stopped", after_seconds=STOP_SECONDS)  # its thread ends with the process
            if self._committing is not None:
                self._committing.cancel()
        elif self._connection is not None:
            await self._connection.close()

    @property
    def is_full(self) -> bool:
        """Whether new deliveries are refused for now: too many wait for their commit, or the disk is nearly full."""
        return len(self._waiting) >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES or self._disk.shortage != ""

    @property
    def state(self) -> str:
        """Why new deliveries are refused for now, or "ok"."""
        return self._disk.shortage or ("too many deliveries wait for their commit" if self.is_full else "ok")

    async def commit(self, delivery: Delivery) -> Intake:
        """Wait until the delivery's row is durable. Raises `QueueFull`, `TimeoutError` after `COMMIT_SECONDS`, or the
        reason why it could not be stored.
        """
        durable: asyncio.Future[Intake] = self._loop.create_future()
        with self._changed:
            if self.is_full or self._is_stopping:
                raise QueueFull(f"no room: {'the receiver stops' if self._is_stopping else self.state}")
            self._waiting.append((delivery, durable))
            self._bytes += len(delivery.body)
            self._call_writer()
        timer = self._loop.call_later(COMMIT_SECONDS, self._end_late, durable)
        try:
            return await durable
        finally:
            timer.cancel()
            del durable  # an error of it refers to this call, and both would keep the body until a collection

    def _end_late(self, durable: asyncio.Future[Intake]) -> None:
        """Give a delivery up, and log that the database ends no commit, as one that waits for its standby. No statement
        fails then.

        The thread commits next, because its writes end the outage.
        """
        if durable.done():
            return
        durable.set_exception(TimeoutError(f"not within {COMMIT_SECONDS} s"))
        self._database.outages.failed(f"database: {place(self._database.url)}: no commit ended in {COMMIT_SECONDS} s")
        self._quick_commits = 0

    def _call_writer(self) -> None:
        """Start the writer. Runs in the loop, with the lock held."""
        if self._is_threads_turn:
            self._changed.notify()
        elif not self._is_loop_committing:
            self._is_loop_committing = True
            self._committing = self._loop.create_task(self._commit_in_loop())

    async def _commit_in_loop(self) -> None:
        """Commit batch by batch while it is the loop's turn and deliveries wait."""
        batch: list[Waiting] = []
        try:
            while batch := await self._next_batch():
                self._hand_over(await self._commit_at_once(batch))
        except Locked:
            self._hand_over(batch)
        except Exception as error:  # noqa: BLE001 - the thread meets it too, and the handlers raise it
            log.warning("group_commit.delegated", error=type(error).__name__)
            clear_frames(error.__traceback__)  # psycopg's error refers to itself, and would keep the batch
            self._quick_commits = 0
            self._hand_over(batch)
        finally:
            with self._changed:
                self._is_loop_committing = False
                self._changed.notify()

    async def _next_batch(self) -> list[Waiting]:
        """The deliveries that wait two turns of the loop later. By then each readable socket has added its delivery."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [] if self._is_threads_turn else self._take(MAX_LOOP_BYTES)

    async def _commit_at_once(self, batch: list[Waiting]) -> list[Waiting]:
        """Commit and answer the deliveries that the loop can. Returns the rest."""
        assert self._connection is not None
        deliveries = [delivery for delivery, _ in batch]
        if self._task_limit.tasks_to_count(deliveries):
            return batch
        started = time.perf_counter()
        new = await self._connection.insert(deliveries)
        self._note(time.perf_counter() - started, SLOW_IN_LOOP_SECONDS)
        self._task_limit.count(deliveries, new)
        known = {delivery.key for delivery in deliveries} - new
        again = await self._connection.unreadable(known) if known else known
        _answer(batch, new, again=again)
        return batch

    def _hand_over(self, batch: list[Waiting]) -> None:
        """Let the thread commit these, and the following ones if there are any or the disk is slow."""
        with self._changed:
            self._waiting.extendleft(reversed(batch))
            self._bytes += sum(len(delivery.body) for delivery, _ in batch)
            self._is_threads_turn = self._is_threads_turn or bool(batch) or self._quick_commits < QUICK_COMMITS

    def _run(self) -> None:
        self._disk.check_soon()
        self._give_turn_to_loop()
        while True:
            with self._changed:
                is_called = self._changed.wait_for(
                    lambda: (
                        self._is_threads_turn and not self._is_loop_committing and (self._waiting or self._is_stopping)
                    ),
                    free_space.FREE_SPACE_INTERVAL_SECONDS,
                )
            if is_called:
                if not self._waiting:
                    return  # called by `stop`
                self._commit([])
                self._give_turn_to_loop()
            self._disk.check_soon()

    def _give_turn_to_loop(self) -> None:
        if self._quick_commits < QUICK_COMMITS or self._is_stopping or self._database.outages.lasts:
            return
        with suppress(sqlite3.Error, RuntimeError):  # the file cannot be opened now, or the loop has ended
            self._connection = self._connection or loop_connection(self._database)
            with self._changed:
                self._is_threads_turn = self._is_stopping
            self._loop.call_soon_threadsafe(self._on_turn)

    def _on_turn(self) -> None:
        with self._changed:
            if self._waiting:
                self._call_writer()

    def _commit(self, batch: list[Waiting]) -> None:
        """Commit and answer the batch. An empty one is filled with the deliveries that wait when its turn has come."""
        new, full, reason = set[str](), set[str](), None
        try:
            new, full = again_on_new_session(lambda: self._insert(batch))
            if known := {delivery.key for delivery, _ in batch} - new - full:
                again_on_new_session(lambda: apply_unreadable_again(self._database, known))
        except Exception as error:  # noqa: BLE001 - every waiting handler gets the error
            clear_frames(error.__traceback__)  # SQLAlchemy's, too
            self._quick_commits = 0
            batch = batch or self._take(MAX_WAITING_BYTES)
            if len(batch) > 1 and not isinstance(error, DatabaseUnavailable):
                while batch:  # one bad delivery fails no other
                    self._commit([batch.pop(0)])
                return
            reason = error
        # One wake-up of the loop per commit. One per handler doubled their CPU.
        with suppress(RuntimeError):  # the loop has ended, and all its handlers with it
            self._loop.call_soon_threadsafe(_answer, batch, new, full, reason)
        reason = None  # it refers to this call

    def _insert(self, batch: list[Waiting]) -> tuple[set[str], set[str]]:
        """Store the deliveries whose tasks have room. Returns the new keys, and those of the others."""
        with self._database.autocommit_writer(is_urgent=True) as connection:
            batch += [] if batch else self._take(MAX_WAITING_BYTES)
            deliveries = [delivery for delivery, _ in batch]
            counted = self._task_limit.tasks_to_count(deliveries)
            full = _beyond_limit(connection, deliveries, counted) if counted else set[str]()
            started = time.perf_counter()
            new = insert(connection, [delivery for delivery in deliveries if delivery.key not in full])
        self._note(time.perf_counter() - started, SLOW_IN_THREAD_SECONDS)
        self._task_limit.count(deliveries, new)
        return new, full

    def _take(self, max_bytes: int) -> list[Waiting]:
        """The next batch, with at least one delivery if any waits."""
        batch: list[Waiting] = []
        with self._changed:
            while self._waiting and len(batch) < MAX_BATCH and max_bytes > 0:
                batch.append(self._waiting.popleft())
                max_bytes -= len(batch[-1][0].body)
                self._bytes -= len(batch[-1][0].body)
        return batch

    def _note(self, seconds: float, slow_seconds: float) -> None:
        """Count quick commits in a row. PostgreSQL's are awaited: a slow one blocks nothing."""
        is_slow = self._database.is_sqlite and seconds > slow_seconds
        self._quick_commits = 0 if is_slow else self._quick_commits + 1


def _answer(
    batch: list[Waiting],
    new: set[str],
    full: Collection[str] = (),
    reason: Exception | None = None,
    again: Collection[str] = (),
) -> None:
    """Resolve the handlers, in the loop, and leave those of `again` in the batch. Of equal deliveries the first is new.

    `reason`: of a failure.
    """
    for delivery, durable in batch:
        key = delivery.key if reason is None else ""  # 60 µs for a body of 64 KiB
        if durable.done() or key in again:  # timed out, or its sender has left
            continue
        if reason is not None:
            durable.set_exception(reason)
        elif key in full:
            durable.set_exception(TaskFull(f"{MAX_KEPT_PER_TASK} deliveries of this task are kept already"))
        else:
            durable.set_result(Intake.NEW if key in new else Intake.DUPLICATE)
            new.discard(key)
    batch[:] = [each for each in batch if again and each[0].key in again]  # `reason` refers to it, handlers to `reason`


def _beyond_limit(connection: Connection, deliveries: list[Delivery], counted: set[uuid.UUID]) -> set[str]:
    """The new keys of those of the `counted` tasks that have MAX_KEPT_PER_TASK deliveries."""
    per_task = select(Callback.task_id).where(col(Callback.task_id).in_(counted))
    per_task = per_task.group_by(col(Callback.task_id)).having(func.count() >= MAX_KEPT_PER_TASK)
    full = set(connection.execute(per_task).scalars())
    keys = {each.key for each in deliveries if each.task_id in full}
    known = select(Callback.delivery_key).where(col(Callback.task_id).in_(full), col(Callback.delivery_key).in_(keys))
    return keys - set(connection.execute(known).scalars()) if keys else keys


class _TaskLimit:
    """Knows the tasks that may have MAX_KEPT_PER_TASK deliveries. Used by the one that commits, loop or thread."""

    def __init__(self) -> None:
        self._counted: OrderedDict[int, int] = OrderedDict()  # by the number of a task id, which hashes faster

    def tasks_to_count(self, deliveries: list[Delivery]) -> set[uuid.UUID]:
        """The tasks with so many deliveries that their rows have to be counted."""
        named = (each.task_id for each in deliveries if each.task_id)
        return {task_id for task_id in named if self._counted.get(task_id.int, 0) >= COUNT_FROM}

    def count(self, deliveries: list[Delivery], new: set[str]) -> None:
        for number in [each.task_id.int for each in deliveries if each.task_id and each.key in new]:
            self._counted[number] = self._counted.pop(number, 0) + 1
        while len(self._counted) > REMEMBERED_TASKS:
            self._counted.popitem(last=False)
