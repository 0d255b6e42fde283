"""Work beside other work: a thread that ends with its block of code, a check, and turns with rests between them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
# The ASGI scope's extension that is the connection of the request (`receiver.web.http_protocol`). Other servers, and
# clients of tests, do not have it, and neither has a request whose client has left.
CONNECTION = "receiver.connection"

# A turn takes at most a tenth of the time while many wait. One that took long, as on a busy machine, rests for this.
RESTS, MAX_REST_SECONDS = 9, 0.5
# The most turns that wait or run, and half of them for one person. With the longest rests the last one waits half a
# minute.
MOST_TURNS = 64


@contextmanager
def background_thread(
    name: str, work: Callable[[threading.Event], None], *, join_seconds: float | None = None
) -> Iterator[None]:
    """Run `work` in a daemon thread. When the block ends, its event is set and the thread is joined. `join_seconds`: at
    most this long, None: without a limit.
    """
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(join_seconds)


class BackgroundCheck:
    """The latest result of `check`, which runs in a thread of its own when a result is asked for. Thread-safe.

    A caller waits `max_wait_seconds` for a check that is under way, and otherwise gets the previous result, at first
    `before`. A result older than `refresh_seconds` starts a new check. `check` raises nothing.
    """

    def __init__(
        self, name: str, check: Callable[[], str], before: str, *, refresh_seconds: float, max_wait_seconds: float
    ) -> None:
        self._name = name
        self._check = check
        self._state = before
        self._refresh_seconds, self._max_wait_seconds = refresh_seconds, max_wait_seconds
        self._lock = threading.Lock()
        self._checking: threading.Thread | None = None
        self._checked_at = float("-inf")
        self._began_at = 0.0

    def state(self) -> str:
        with self._lock:
            checking = self._checking
            if checking is None and time.monotonic() > self._checked_at + self._refresh_seconds:
                checking = threading.Thread(target=self._run, name=self._name, daemon=True)
                checking.start()
                self._checking, self._began_at = checking, time.monotonic()  # started: else a later call tries again
        if checking is not None:
            checking.join(self._max_wait_seconds)
        return self._state

    def unanswered_seconds(self) -> float:
        """How long the check under way has taken; 0.0 = none is under way."""
        with self._lock:
            return time.monotonic() - self._began_at if self._checking is not None else 0.0

    def _run(self) -> None:
        state = self._check()
        with self._lock:
            self._state, self._checked_at, self._checking = state, time.monotonic(), None


async def abort(scope: Mapping[str, Any], receive: Receive) -> None:
    """End the connection of a request in the middle of its answer, so that the answer does not seem whole."""
    if connection := scope["extensions"].get(CONNECTION):
        connection.abort()
    await _disconnect(receive)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`. If the ASGI client of a request without a body leaves first, `work` is cancelled: None."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Turn(Generic[T]):
    """A function's turn, whose result several may await. It is given up if all of them leave before it begins."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.has_begun = self.is_given_up = False
        self.task: asyncio.Task[T]
        self._awaiting = 0

    async def result(self) -> T:
        """The function's result, after the rest."""
        self._awaiting += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self._awaiting -= 1
            if not self._awaiting and not self.has_begun:
                self.is_given_up = True
                self.task.cancel()


class RestingTurns:
    """Runs functions in threads, one at a time, and rests nine times as long as each took, at most half a second.

    For work that may wait beside an event loop that may not: a thread that computes doubles the time that the loop
    needs for everything, so its queue grows as long as the thread goes on.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._own: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._open = Counter[str]()

    def queue(self, person: str, function: Callable[[], T]) -> Turn[T] | None:
        """A turn for this person; None if too many wait. People alternate, however many turns one of them queues."""
        if self._open.total() >= MOST_TURNS or self._open[person] >= MOST_TURNS // 2:
            return None
        self._open[person] += 1
        turn = Turn(function)
        turn.task = asyncio.ensure_future(self._run(person, turn))
        turn.task.add_done_callback(lambda _: self._open.subtract([person]))
        return turn

    async def _run(self, person: str, turn: Turn[T]) -> T:
        async with self._own[person], self._turn:
            turn.has_begun = True
            began = time.monotonic()
            try:
                return await asyncio.to_thread(turn.function)
            finally:
                await asyncio.sleep(min(RESTS * (time.monotonic() - began), MAX_REST_SECONDS))
