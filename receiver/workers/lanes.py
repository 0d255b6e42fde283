"""The lanes of a worker, each for rows of one kind with threads of its own, and jobs that run periodically."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.accounts.slots import Slots
from storage.circuit import Circuit


@dataclass(frozen=True)
class Lane:
    """One kind of work: `work` is called with each due row of `model` for which `where` holds, in `threads` threads.

    `work_many`: takes up to `batch()` rows; a single row goes to `work`. `claim_pause_seconds`: pause between claims.
    `circuit`: of the store, provider or sink that the work needs; while it is open, nothing is claimed. `slots`: of the
    account; queued rows are admitted when the lane claims. `beside`: of a lane of spare threads: further conditions, by
    the rows of `model` that have been in hand for LASTING_SECONDS; None: claim nothing. `is_shared`: all processes
    together have `threads`, and each has at least one. `ahead`: while rows queue up, this many more are claimed in one
    transaction when none is left for the next idle thread. They are given back when their turn does not come soon.
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

    def threads_of(self, processes: int) -> int:
        """How many threads of this lane each of that many processes uses."""
        return max(self.threads // max(processes, 1), 1) if self.is_shared else self.threads


@dataclass(frozen=True)
class PeriodicJob:
    """A job that every worker process runs every `every_seconds`, so several at once must be harmless.

    `due_if`: the job runs soon after a commit, and only while this statement finds a row.
    """

    name: str
    every_seconds: float
    run: Callable[[], object]
    due_if: Any = None


class Batches:
    """The batches of a lane: those in work, and those that wait for a thread (see `Lane.ahead`).

    Only the lane's feeder adds batches.
    """

    def __init__(self) -> None:
        self._begun = 0
        self._waiting: dict[int, tuple[list[Any], float]] = {}
        self._fewer = threading.Condition()

    def wait_for_room(self, threads: int, ahead: int, seconds: float) -> int:
        """How many more batches there may be. Waits until no batch waits for a thread, and with `ahead` 0 until a
        thread is idle.

        0: the time was over before that.
        """

        def has_room() -> bool:
            return not self._waiting and self._begun < threads + bool(ahead)

        with self._fewer:
            return max(threads + ahead - self._begun, 0) if self._fewer.wait_for(has_room, seconds) else 0

    def add(self, batch: list[Any]) -> None:
        with self._fewer:
            self._waiting[id(batch)] = batch, time.monotonic()

    def begin(self, batch: list[Any]) -> bool:
        """Called by the thread that is about to work on the batch. False: it was taken back."""
        with self._fewer:
            is_ours = self._waiting.pop(id(batch), None) is not None
            self._begun += is_ours
            self._fewer.notify()
            return is_ours

    def end(self) -> None:
        with self._fewer:
            self._begun -= 1
            self._fewer.notify()

    def take_back(self, seconds: float = 0) -> list[Any]:
        """Take back the rows that have waited for a thread for so long. No thread will begin them."""
        before = time.monotonic() - seconds
        with self._fewer:
            late = [key for key, (_, since) in self._waiting.items() if since <= before]
            return [row for key in late for row in self._waiting.pop(key)[0]]
