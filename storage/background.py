"""Work beside other work: a thread that ends with its block of code, and turns with rests between them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

# A turn takes at most a tenth of the time while many wait. One that took long, as on a busy machine, rests for this.
RESTS, MAX_REST_SECONDS = 9, 0.5


@contextmanager
def background_thread(name: str, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a daemon thread. When the block ends, its event is set and the thread is joined."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class RestingTurns:
    """Runs functions in threads, one at a time, and rests nine times as long as each took, at most half a second.

    For work that may wait beside an event loop that may not: a thread that computes doubles the time that the loop
    needs for everything, so its queue grows as long as the thread goes on.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def run(self, function: Callable[[], T]) -> T:
        """Return its result, after the rest."""
        async with self._turn:
            began = time.monotonic()
            try:
                return await asyncio.to_thread(function)
            finally:
                await asyncio.sleep(min(RESTS * (time.monotonic() - began), MAX_REST_SECONDS))
