"""`asyncio.timeout` for very many short waits, all equally long: one timer for all of them instead of one each.

A timer made and cancelled for each body and each commit was a twelfth of what the event loop spent on a callback.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class Timeouts:
    """`with timeouts.within(seconds):` around awaits of one task; all who use the same object wait equally long."""

    def __init__(self) -> None:
        self._waits: deque[_Wait] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def within(self, seconds: float) -> _Wait:
        """A block that raises `TimeoutError` after so many seconds."""
        return _Wait(self, seconds)

    def enter(self, wait: _Wait) -> None:
        self._waits.append(wait)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(wait.ends_at, self._look)

    def leave(self) -> None:
        while self._waits and self._waits[0].task is None:
            self._waits.popleft()

    def _look(self) -> None:
        """End the waits whose time is over; the oldest of the others says when to look again."""
        loop = asyncio.get_running_loop()
        self._timer = None
        for wait in self._waits:
            if wait.task is None:
                continue
            if wait.ends_at > loop.time():
                self._timer = loop.call_at(wait.ends_at, self._look)
                return
            wait.end()


class _Wait:
    __slots__ = ("_is_over", "_seconds", "_timeouts", "ends_at", "task")

    def __init__(self, timeouts: Timeouts, seconds: float) -> None:
        self._timeouts = timeouts
        self._seconds = seconds
        self._is_over = False
        self.ends_at = 0.0
        self.task: asyncio.Task[object] | None = None

    def __enter__(self) -> None:
        self.task = asyncio.current_task()
        self.ends_at = asyncio.get_running_loop().time() + self._seconds
        self._timeouts.enter(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        task, self.task = self.task, None
        self._timeouts.leave()
        if self._is_over and task is not None and task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def end(self) -> None:
        """Cancel the task's await; where the block ends that becomes a `TimeoutError`."""
        if self.task is not None and not self._is_over:
            self._is_over = True
            self.task.cancel()
