"""What a worker works on: lanes of rows, each with threads of its own, and jobs that run periodically."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.accounts.slots import Slots
from storage.circuit import Circuit


@dataclass(frozen=True)
class Lane:
    """One kind of work: `work` is called with each due row of `model` for which `where` holds, in `threads` threads.

    `work_many`: takes up to `batch()` rows; a single row goes to `work`. `linger_seconds`: pause between claims.
    `circuit`: of the store, provider or sink that the work needs; while it is open, nothing is claimed. `slots`: of the
    account; queued rows are admitted when the lane claims. `beside`: of a lane of spare threads: further conditions, by
    the rows of `model` that have been in hand for LASTING_SECONDS; None: claim nothing. `is_shared`: all processes
    together have `threads`, and each has at least one.
    """

    name: str
    model: Any
    work: Callable[[Any], None]
    threads: int
    where: Sequence[Any] = ()
    circuit: Circuit = field(default_factory=Circuit)
    work_many: Callable[[list[Any]], None] | None = None
    batch: Callable[[], int] = lambda: 1
    linger_seconds: float = 0
    slots: Slots | None = None
    beside: Callable[[Sequence[Any]], Sequence[Any] | None] | None = None
    is_shared: bool = False

    def threads_of(self, processes: int) -> int:
        """How many of its threads one of so many processes uses."""
        return max(self.threads // max(processes, 1), 1) if self.is_shared else self.threads


@dataclass(frozen=True)
class PeriodicJob:
    """A job that every worker process runs every `every_seconds`, so several at once must be harmless.

    `looks_for`: it runs soon after a commit, and only while this statement finds a row.
    """

    name: str
    every_seconds: float
    run: Callable[[], object]
    looks_for: Any = None


class BusyThreads:
    """How many threads of a lane have work. Only the lane's feeder starts more."""

    def __init__(self) -> None:
        self._count = 0
        self._fewer = threading.Condition()

    def wait_for_idle(self, limit: int, seconds: float) -> int:
        """How many more may start, up to `limit` in all. Waits until one may; 0: none in that time."""
        with self._fewer:
            self._fewer.wait_for(lambda: self._count < limit, seconds)
            return max(limit - self._count, 0)

    def start(self) -> None:
        with self._fewer:
            self._count += 1

    def end(self) -> None:
        with self._fewer:
            self._count -= 1
            self._fewer.notify()
