"""`GET /console/live`: server-sent events that announce changes. The page then fetches itself again.

One query a second serves all consoles: the newest event and the newest delivery, by their primary keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from receiver.console.shares import Shares
from receiver.console.visit import Visit
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable, StoreUnavailable
from storage.rows.models import Callback, Event

log = structlog.get_logger()

MAX_OPEN = 100
LOOK_SECONDS = 1.0
# The shortest time between two announced changes. All consoles hear of a change at once, so that they share its
# rendering.
APART_SECONDS = 3.0
# Above this rate of deliveries the time is longer, because nobody can follow each change, and the fetches of the
# consoles would take more than a hundredth of the server's time, which raises the p99 of callbacks.
BUSY_PER_SECOND, BUSY_APART_SECONDS = 20, 10.0
# Proxies close silent connections. The browser's script also takes this as a sign of life.
HEARTBEAT_SECONDS = 15.0
# How often an open page's session is checked again.
MAX_SECONDS = 600.0
HELLO = b"retry: 3000\n\nevent: hello\ndata: 1\n\n"


class Live:
    """The endpoint. Its one query loop runs while a console is open."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._open = 0
        self._shares = Shares(MAX_OPEN)
        self._seen = (0, 0)
        self._looked_at = 0.0
        self._apart_seconds = APART_SECONDS
        self.tick = 0
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._is_closing = False

    async def serve(self, visit: Visit) -> Response:
        if self._is_closing:
            return Response(status_code=503, headers={"Retry-After": "30"})
        headers = {"X-Accel-Buffering": "no"}
        return self._shares.stream(visit.session.name, self._tell(), media_type="text/event-stream", headers=headers)

    def close(self) -> None:
        """End every stream, so that the server can end. Called in its event loop."""
        self._is_closing = True
        self._announce()

    async def _tell(self) -> AsyncIterator[bytes]:
        self._open += 1
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        try:
            ends = asyncio.get_running_loop().time() + MAX_SECONDS
            yield HELLO
            while not self._is_closing and asyncio.get_running_loop().time() < ends:
                changed = self._changed
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await changed.wait()
                except TimeoutError:
                    yield b"event: still\ndata: 1\n\n"
                else:
                    yield b"event: change\ndata: %d\n\n" % (self._apart_seconds * 1e3)
        finally:
            self._open -= 1
            if self._open == 0 and self._watching is not None:
                self._watching.cancel()
                self._watching = None

    async def _watch(self) -> None:
        while not self._is_closing:
            try:
                seen = await run_in_threadpool(self._look)
            except (DatabaseUnavailable, StoreUnavailable) as error:
                log.info("console.live_updates_paused", error=str(error))
            else:
                if seen != self._seen:
                    self._apart_seconds = self._pace(seen[1])
                    self._seen = seen
                    self._announce()
                    await asyncio.sleep(self._apart_seconds - LOOK_SECONDS)
            await asyncio.sleep(LOOK_SECONDS)

    def _pace(self, newest: int) -> float:
        """The time until the next announcement, by the number of deliveries since the last query."""
        now, before = asyncio.get_running_loop().time(), self._looked_at
        self._looked_at = now
        is_busy = before and newest - self._seen[1] > BUSY_PER_SECOND * (now - before)
        return BUSY_APART_SECONDS if is_busy else APART_SECONDS

    def _look(self) -> tuple[int, int]:
        with self._database.read() as session:
            newest = (session.execute(select(func.max(key))).scalar() or 0 for key in (Event.id, Callback.id))
            event, delivery = newest
            return event, delivery

    def _announce(self) -> None:
        self.tick += 1
        self._changed.set()
        self._changed = asyncio.Event()
