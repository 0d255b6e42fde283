"""Readiness as it stood a moment ago: asking for it costs the database the same, however many ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from anyio import to_thread

log = structlog.get_logger()

# Anyone may ask, and each look waits for SQLite's write lock: eight askers took an acknowledgement's p50 from 0.4 to
# 21 ms.
FRESH_SECONDS = 1.0
# Load balancers wait 1 to 5 s for this answer.
PATIENCE_SECONDS = 0.5
# As long as a delivery has from body to commit: the database has failed once it takes longer.
HANG_SECONDS = 5.0


class Readiness:
    """The latest result of `look`, each check by its name: "ok", or in words what is wrong. Used in one event loop.

    Looks when it is asked, at most once a second and one look at a time. The caller that causes a look waits half a
    second for it, the others get the result before it at once; the first callers of all wait. While a look takes more
    than 5 s, the database is not ok.
    """

    def __init__(self, look: Callable[[], dict[str, str]]) -> None:
        self._look = look
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = float("-inf")
        self._found: dict[str, str] = {}

    async def checks(self) -> dict[str, str]:
        """What was found, a second ago where the database answers at once. It is the caller's to change."""
        patience = PATIENCE_SECONDS if self._found else HANG_SECONDS
        if self._looking is None and time.monotonic() >= self._looked_at + FRESH_SECONDS:
            self._looked_at, self._looking = time.monotonic(), asyncio.create_task(self._look_once())
            await asyncio.wait({self._looking}, timeout=patience)
        elif self._looking is not None and not self._found:
            await asyncio.wait({self._looking}, timeout=self._looked_at + patience - time.monotonic())
        is_hanging = self._looking is not None and time.monotonic() >= self._looked_at + HANG_SECONDS
        if is_hanging or not self._found:
            return {"database": f"no answer for {HANG_SECONDS} s", "schema": "unknown"}
        return dict(self._found)

    async def _look_once(self) -> None:
        try:
            self._found = await to_thread.run_sync(self._look)
        except Exception:
            log.exception("ready.bug")
            self._found = {"database": "the look failed, see the log", "schema": "unknown"}
        finally:
            self._looking = None
