"""Durable intake: a delivery is answered after its row is committed, and bursts share one commit.

    put() ─▶ waiting list ─▶ one writer thread: everything that has queued up, one transaction ─▶ every waiter answered

Nothing waits here that was acknowledged; what was not acknowledged may be lost with the process.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum
from functools import partial

import structlog
from sqlmodel import Session, col, func, select

from storage.errors import DatabaseUnavailable
from storage.rows import free_space
from storage.rows.database import Database
from storage.rows.deliveries import MAX_BATCH, Delivery, apply_unreadable_again, insert
from storage.rows.free_space import Disk
from storage.rows.models import Callback

log = structlog.get_logger()

# What may wait in memory for its commit. 1,000 deliveries are a quarter second of work at the measured rates.
MAX_WAITING = 1_000
MAX_WAITING_BYTES = 64 * 2**20
# Honest tasks bring three or four deliveries; this many kept for one are a mistake, and the task is read instead.
MAX_KEPT_PER_TASK = 200
# Below this many new deliveries of a task in this process nobody counts its rows.
COUNT_FROM = 50
# How many tasks the process remembers counting for.
REMEMBERED_TASKS = 10_000
# A delivery that is not committed 5 s after it was read was answered 503; the last may have been read at the stop.
STOP_SECONDS = 10.0


class Intake(Enum):
    """What became of a delivery that was put into the inbox."""

    NEW = "new"
    DUPLICATE = "duplicate"


class QueueFull(DatabaseUnavailable):
    """Too much waits for its commit; the sender should try again in a moment."""


class TaskFull(QueueFull):
    """So many deliveries of this task are kept that new ones say nothing new: read the task instead."""


OnCommit = Callable[[Intake | Exception], None]


class GroupCommit:
    """The one writer of pushed deliveries in this process. Start it, `put` from any thread, stop it.

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
        is not. Raises `QueueFull`."""
        future: Future[Intake] = Future()
        self.submit(delivery, partial(_end, future))
        return future

    def submit(self, delivery: Delivery, on_commit: OnCommit) -> None:
        """As `put`, with `on_commit` called in the inbox's thread; it returns at once and raises nothing."""
        with self._changed:
            if self.is_full or self._stopping:
                raise QueueFull("no room: too many deliveries wait for their commit, or the disk is nearly full")
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
            new = insert(connection, [delivery for delivery in deliveries if delivery.key not in full])
        self._count([delivery.task_id.int for delivery in deliveries if delivery.task_id and delivery.key in new])
        if known := {delivery.key for delivery in deliveries} - new - full:
            apply_unreadable_again(self._database, known)
        return new, full

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
