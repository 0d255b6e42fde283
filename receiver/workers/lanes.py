"""The lanes of a worker, each for rows of one kind with threads of its own, and jobs that run periodically."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from storage.accounts.slots import Slots
from storage.circuit import Circuit
from storage.errors import DatabaseUnavailable


@dataclass(frozen=True)
class Lane:
    """One kind of work: `work` is called with each due row of `model` for which `where` holds, in `threads` threads.

    `work_many`: takes up to `batch()` rows; a single row goes to `work`. `claim_pause_seconds`: pause between claims.
    `circuit`: of the store, provider or sink that the work needs; while it is open, nothing is claimed. `slots`: of the
    account; queued rows are admitted when the lane claims. `beside`: of a lane of spare threads: further conditions, by
    the rows of `model` that have been in hand for LASTING_SECONDS; None: claim nothing. `is_shared`: all processes
    together have `threads`, and each has at least one. `ahead`: while rows queue up, this many more are claimed in one
    transaction when none is left for the next idle thread. They are given back when their turn does not come soon.
    `batches`: of this lane alone; its threads may lend their places.
    """

    name: str
    model: Any
    work: Callable[[Any], None]
    threads: int
    where: Sequence[Any] = ()
    circuit: Circuit = field(default_factory=Circuit)
    work_many: Callable[[list[Any]], None] | None = None
    batch: Callable[[], int] = lambda: 1
    claim_pause_seconds: float = 0
    slots: Slots | None = None
    beside: Callable[[Sequence[Any]], Sequence[Any] | None] | None = None
    is_shared: bool = False
    ahead: int = 0
    batches: Batches = field(default_factory=lambda: Batches())

    def batches_of(self, rows: list[Any]) -> list[list[Any]]:
        size = self.batch()
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def threads_of(self, processes: int) -> int:
        """How many threads of this lane each of that many processes uses."""
        return max(self.threads // max(processes, 1), 1) if self.is_shared else self.threads


def together(begin: Callable[[Any], Callable[[], object]]) -> Callable[[Sequence[Any]], None]:
    """`work_many` for rows whose writes may share commits: `begin` is called for all, and then what it returned.

    Errors are raised after the last row, so that one row's fault stops no other.
    """

    def work_many(rows: Sequence[Any]) -> None:
        faults = list[Exception]()

        def tried(call: Callable[..., Any], *given: Any) -> Any:
            try:
                return call(*given)
            except Exception as error:  # noqa: BLE001 - raised below
                faults.append(error)

        for end in filter(None, [tried(begin, row) for row in rows]):
            tried(end)
        if faults and all(isinstance(fault, DatabaseUnavailable) for fault in faults):
            raise faults[0]
        if faults:
            raise ExceptionGroup("rows that could not be worked on", faults)

    return work_many


@dataclass(frozen=True)
class PeriodicJob:
    """A job that every worker process runs every `every_seconds`, so several at once must be harmless.

    `due_if`: the job runs soon after a commit, and only while this statement finds a row.
    """

    name: str
    every_seconds: float
    run: Callable[[], object]
    due_if: Any = None


class _Waiting(NamedTuple):
    since: float
    batch: list[Any]
    begin: Callable[[], object]


class Batches:
    """The batches of a lane: those in progress, and those that wait for a place (see `Lane.ahead`).

    A lane works on as many batches at once as it has threads. A thread that waits for a commit lends its place, and
    the next batch begins. Eight threads that archive small pictures were in such waits for 27 of 37 samples of a
    profile. Only the lane's feeder adds batches.
    """

    def __init__(self, most_lent: int = 0) -> None:
        """`most_lent`: how many places may be lent at once. The lane needs as many threads more."""
        self.most_lent = most_lent
        self._threads = self._ahead = self._begun = self._lent = 0
        self._waiting: deque[_Waiting] = deque()  # oldest first
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)

    def wait_for_room(self, threads: int, ahead: int, seconds: float) -> int:
        """How many more batches there may be. Waits until no batch waits for a place, and with `ahead` 0 until one is
        free.

        0: the time was over before that.
        """
        with self._lock:
            self._threads, self._ahead = threads, ahead
            return max(threads + ahead - self._begun, 0) if self._room.wait_for(self._has_room, seconds) else 0

    def _has_room(self) -> bool:
        return not self._waiting and self._begun < self._threads + bool(self._ahead)

    def add(self, batch: list[Any], begin: Callable[[], object]) -> None:
        """`begin` hands the batch to a thread, which calls `end`. It is called once a place is free."""
        with self._lock:
            self._waiting.append(_Waiting(time.monotonic(), batch, begin))
            self._begin_next()

    def end(self) -> None:
        with self._lock:
            self._begun -= 1
            self._begin_next()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend the place of a batch during the block. After the block the batch continues at once, because its bytes
        have arrived. While too many are in progress, none begins.
        """
        with self._lock:
            is_lent = self._lent < self.most_lent
            self._begun, self._lent = self._begun - is_lent, self._lent + is_lent
            self._begin_next()
        try:
            yield
        finally:
            with self._lock:
                self._begun, self._lent = self._begun + is_lent, self._lent - is_lent

    def _begin_next(self) -> None:
        """Begin what waits and has a place. Wake the feeder if there is room for more."""
        while self._waiting and self._begun < self._threads:
            self._begun += 1
            try:
                self._waiting.popleft().begin()
            except RuntimeError:  # the system has no further thread: one of those at work takes it next
                if self._begun + self._lent == 1:
                    raise
        if self._has_room():
            self._room.notify()

    def take_back(self, seconds: float = 0) -> list[Any]:
        """Take back the rows that have waited for a place for so long."""
        before, rows = time.monotonic() - seconds, list[Any]()
        with self._lock:
            while self._waiting and self._waiting[0].since <= before:
                rows += self._waiting.popleft().batch
        return rows
