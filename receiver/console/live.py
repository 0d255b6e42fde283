"""`GET /console/live`: server-sent events that announce changes. The page then fetches itself again.

One query a second serves all consoles: the newest event and the newest delivery, by their primary keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

import structlog
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from receiver.console.shares import Shares
from receiver.console.visit import Visit
from storage.database.sessions import Database
from storage.rows.models import Callback, Event

log = structlog.get_logger()

MAX_OPEN = 100
LOOK_SECONDS = 1.0
# (deliveries a second, seconds between announced changes): the first exceeded rate counts. A change takes some 50 ms of
# CPU for ten consoles with five views, and a hundredth of the time raises the p99 of deliveries.
PACES = ((1_000.0, 60.0), (150.0, 30.0), (20.0, 10.0), (-math.inf, 3.0))
# Proxies close silent connections. The browser's script also takes this as a sign of life.
HEARTBEAT_SECONDS = 15.0
# A stream ends after this time, and the browser connects again.
MAX_SECONDS = 600.0
HELLO = b"retry: 3000\n\nevent: hello\ndata: 1\n\n"
STILL, CHANGE = b"event: still\ndata: 1\n\n", b"event: change\ndata: %d\n\n"


class Pace:
    """Decides when live updates are sent to consoles, by the current rate of deliveries."""

    def __init__(self) -> None:
        self.apart_seconds = PACES[-1][1]
        self._newest, self._looked_at, self._told_at, self._per_second = 0, -math.inf, -math.inf, 0.0
        self._told: tuple[int, int] | None = None

    def is_due(self, seen: tuple[int, int], now: float) -> bool:
        """`seen`: newest event and delivery. A first console has just loaded its page and waits like the others."""
        before, self._per_second = self._per_second, (seen[1] - self._newest) / (now - self._looked_at)
        # The higher rate of two: a disk that stalls for a second needs no page beside it.
        self.apart_seconds = next(apart for most, apart in PACES if max(before, self._per_second) > most)
        if is_first := self._looked_at == -math.inf:
            self._told_at = now - PACES[-1][1]  # the first call after a quiet time is due
        self._newest, self._looked_at = seen[1], now
        # Calls are not quite a second apart; the browser's script waits a second longer.
        is_early = now < self._told_at + self.apart_seconds - LOOK_SECONDS / 2
        if is_first or is_early or seen == self._told:
            return False
        self._told, self._told_at = seen, now
        return True


class Live:
    """The endpoint. Its one query loop runs while a console is open. A stream ends within one heartbeat of its session,
    which is checked before each part of an answer.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._open = 0
        self._shares = Shares(MAX_OPEN)
        self._pace = Pace()
        self.tick = 0
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._is_closing = False

    async def serve(self, visit: Visit) -> Response:
        if self._is_closing:
            return Response(status_code=503, headers={"Retry-After": "30"})
        headers = {"X-Accel-Buffering": "no"}
        return self._shares.stream(visit, self._tell(), media_type="text/event-stream", headers=headers)

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
                changed, message = self._changed, STILL
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await changed.wait()
                        message = CHANGE % (self._pace.apart_seconds * 1e3)
                yield message
        finally:
            self._open -= 1
            if self._open == 0 and self._watching is not None:
                self._watching.cancel()
                self._watching = None

    async def _watch(self) -> None:
        self._pace = Pace()
        while not self._is_closing:
            try:
                seen = await run_in_threadpool(self._look)
            except Exception as error:  # noqa: BLE001 - it may get no thread; open pages would be live without updates
                log.info("console.live_updates_paused", error=repr(error))
            else:
                if self._pace.is_due(seen, asyncio.get_running_loop().time()):
                    self._announce()
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> tuple[int, int]:
        with self._database.read() as session:
            event, delivery = (session.execute(select(func.max(key))).scalar() or 0 for key in (Event.id, Callback.id))
            return event, delivery

    def _announce(self) -> None:
        self.tick += 1
        self._changed.set()
        self._changed = asyncio.Event()
