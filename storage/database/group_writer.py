"""Group writes: short writes of many threads share one transaction, and each is answered after its commit.

    commit(operation) ─▶ waiting ─▶ the writer's thread: all waiting ones, one transaction ─▶ results

An archived picture is three durable writes one after the other (claimed, noted, settled), and eight threads archive at
once. With a transaction each they queued at the disk and at the turnstile: three commits a picture, and one in groups.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import structlog
from sqlmodel import Session

from storage.database.turnstile import SQLITE_BUSY_SECONDS
from storage.errors import DatabaseUnavailable, SessionReplaced

Result = TypeVar("Result")
Operation = Callable[[Session], Result]
Transaction = Callable[[], AbstractContextManager[Session]]

# PostgreSQL's codes of a statement that waited too long for a row, and of a deadlock.
WAITED = ("55P03", "40P01")

# On SQLite deliveries wait while a group is applied: 64 operations of four statements take about 10 ms.
MAX_GROUP = 64
# An operation that would begin later than this in a transaction waits for the next one.
MAX_GROUP_SECONDS = 0.02
# The longest wait of a caller: one turn at the turnstile and then SQLite's own lock.
WAIT_SECONDS = 2.0 * SQLITE_BUSY_SECONDS
CLOSE_SECONDS = 1.0
# How often a bug in the last operation of the groups is logged. Each group would meet it.
FAULT_SECONDS = 60.0
# How long the writer's connection is kept for the next group.
KEEP_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class _Write:
    operation: Operation[Any]
    task_id: uuid.UUID | None
    durable: Future[Any] = field(default_factory=Future)
    put_at: float = field(default_factory=time.monotonic)

    def begins(self) -> bool:
        """False: its caller has given up. A caller whose operation has begun waits for the outcome."""
        return self.durable.running() or (not self.durable.done() and self.durable.set_running_or_notify_cancel())


log = structlog.get_logger()


class _Waits(Exception):
    """The operation would keep its group waiting for a row."""


def _is_about_a_lock(error: BaseException) -> bool:
    cause = error.__cause__
    return getattr(getattr(cause, "orig", cause), "sqlstate", None) in WAITED


class GroupWriter:
    """One thread that writes for all others of its process. It starts with the first operation."""

    def __init__(
        self,
        transaction: Transaction,
        own_transaction: Transaction,
        rest: Callable[[], None],
        at_end: Callable[[Session], Future[bool] | None],
    ) -> None:
        """`transaction`: of a group, which does not wait long for a row. `own_transaction`: of one operation.
        `rest`: called by the writer's thread when there was no operation for a while, and at its end.
        `at_end`: the last operation of each group. Without it the group is committed where it fails. It may return a
        future that is resolved with whether the group was committed."""
        self._transaction = transaction
        self._own_transaction = own_transaction
        self._rest = rest
        self._at_end = at_end
        self._waiting: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._started: threading.Thread | None = None  # the last one, also while it ends
        self._fault_at = -math.inf

    def commit(self, operation: Operation[Result], *, task_id: uuid.UUID | None = None) -> Result:
        """Apply `operation` in a transaction with others. Returns its result once that transaction has committed.

        An error of the operation is raised here and fails no other: the transaction is rolled back, and the others are
        applied again. The operation may therefore run more than once, and must change only the session. `task_id`: the
        task that it locks. An operation that waits for another transaction's row gets a transaction of its own, in the
        caller's thread, so that no other waits with it. Raises `DatabaseUnavailable` if nothing was committed: also
        after `WAIT_SECONDS` in which the operation did not begin. It then never begins. If it has begun, and its end
        takes as long again, it may be committed.
        """
        return self.begin(operation, task_id=task_id)()

    def begin(self, operation: Operation[Result], *, task_id: uuid.UUID | None = None) -> Callable[[], Result]:
        """Begin a `commit`. The returned function waits for its end. Several of a thread wait together."""
        write = _Write(operation, task_id)
        self._waiting.put(write)
        if self._thread is None:
            self._start()
        return partial(self._end, write)

    def _end(self, write: _Write) -> Any:
        until_it_begins = max(write.put_at + WAIT_SECONDS - time.monotonic(), 0)
        for seconds in (until_it_begins, WAIT_SECONDS):
            try:
                return write.durable.result(seconds)
            except _Waits:
                with self._own_transaction() as session:
                    return write.operation(session)
            except (TimeoutError, CancelledError):
                write.durable.cancel()  # without effect once the operation has begun
        raise DatabaseUnavailable(f"database: no commit within {WAIT_SECONDS:g} s")

    def close(self) -> None:
        """End the thread once the waiting operations are committed. A later operation starts another."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join(CLOSE_SECONDS)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, args=(self._started,), name="group-writer", daemon=True)
                thread.start()
                self._thread = self._started = thread  # started, because `close` and the next one join it

    def _next(self) -> _Write | None:
        try:
            return self._waiting.get(timeout=KEEP_SECONDS)
        except queue.Empty:
            self._rest()
            return self._waiting.get()

    def _run(self, before: threading.Thread | None) -> None:
        if before is not None:  # they would share a session: on PostgreSQL a COMMIT after the other's rollback succeeds
            before.join()
        try:
            self._commit_groups()
        finally:
            if self._thread is threading.current_thread():
                self._thread = None  # a bug has ended it, and the next operation starts another

    def _commit_groups(self) -> None:
        while (first := self._next()) is not None:
            group = [first]
            while len(group) < MAX_GROUP and not self._waiting.empty():
                if (write := self._waiting.get()) is None:
                    self._waiting.put(None)
                    break
                group.append(write)
            # Two transactions that lock the same tasks in different orders would wait for each other.
            self._commit(sorted(group, key=lambda write: (write.task_id is None, str(write.task_id))))
        self._rest()

    def _commit(self, group: list[_Write]) -> None:
        """Apply and commit them, without those that fail; answer each."""
        has_new_session, at_end = False, self._at_end
        while group := [write for write in group if not write.durable.done()]:
            done, at_fault, told = dict[_Write, Any](), group, Future[bool]()
            try:
                with self._transaction() as session:
                    end = time.monotonic() + MAX_GROUP_SECONDS
                    for write in filter(_Write.begins, group):
                        at_fault = [write]
                        done[write] = write.operation(session)
                        if session.identity_map or session.new:
                            session.flush()
                            session.expunge_all()  # no operation sees the objects of another
                        if time.monotonic() > end:
                            break
                    at_fault = []
                    told = at_end(session) or told
                    at_fault = group
            except BaseException as error:  # noqa: BLE001 - the callers raise it
                told.set_result(False)
                if isinstance(error, SessionReplaced) and not has_new_session:
                    has_new_session = True
                elif not _fail(error, group, at_fault):
                    self._log_fault(error)
                    at_end = _nothing
            else:
                for write, result in done.items():
                    write.durable.set_result(result)
                told.set_result(True)

    def _log_fault(self, error: BaseException) -> None:
        """Nobody waits for the last operation of a group, so its fault is logged here."""
        if not _is_about_a_lock(error) and time.monotonic() > self._fault_at + FAULT_SECONDS:
            self._fault_at = time.monotonic()
            log.error("worker.step_failed", job="group_end", exc_info=error)


def _fail(error: BaseException, group: list[_Write], at_fault: list[_Write]) -> bool:
    """Tell the callers of the operations that this error ends. Returns whether there are any."""
    waits = _is_about_a_lock(error)
    failed = group if isinstance(error, DatabaseUnavailable) and not waits else at_fault
    for write in failed:
        if write.begins():
            write.durable.set_exception(_Waits() if waits else error)
    return bool(failed)


def _nothing(_: Session) -> None:
    """The last operation of a group whose own one failed."""
