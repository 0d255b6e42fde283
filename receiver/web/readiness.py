"""The results of the readiness checks, at most a second old: callers add no load to the database or the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import structlog
from anyio import CapacityLimiter, to_thread

log = structlog.get_logger()

# `/readyz` needs no key, and each check waits for SQLite's write lock: eight callers without this limit raised the p50
# of an acknowledgement from 0.4 to 21 ms.
FRESH_SECONDS = 1.0
# Load balancers wait 1 to 5 s for this answer.
PATIENCE_SECONDS = 0.5
# As long as a delivery has from its body to its commit. A database that takes longer has failed.
HANG_SECONDS = 5.0
# Load balancers ask every 30 s or more often. A monitor that asks once in some minutes must not get the result of then.
RECENT_SECONDS = 45.0


class Readiness:
    """The latest result of `check`: "ok" or the fault, by the name of the check. Used in one event loop.

    `check` runs in a thread, only on demand, at most once a second and never twice at a time. The caller that starts a
    check waits up to 0.5 s for it, others get the previous result. Callers wait for the first result, and for one after
    a pause of 45 s. A check that takes more than 5 s hangs, and `if_hanging` is its result.
    """

    def __init__(self, check: Callable[[], dict[str, str]], if_hanging: Mapping[str, str]) -> None:
        self._check = check
        self._if_hanging = if_hanging
        self._checking: asyncio.Task[None] | None = None
        # separate from pages and readers, which must never make a load balancer drop this receiver
        self._thread = CapacityLimiter(1)
        self._started_at = float("-inf")
        self._result: dict[str, str] = {}
        self._ended_at = float("-inf")

    async def checks(self) -> dict[str, str]:
        """A copy of the latest result."""
        is_recent = time.monotonic() < self._ended_at + RECENT_SECONDS
        patience = PATIENCE_SECONDS if is_recent else HANG_SECONDS
        has_begun, checking = self._begin(), self._checking  # another one may be under way after the wait
        if checking is not None and (has_begun or not is_recent):
            await asyncio.wait({checking}, timeout=self._started_at + patience - time.monotonic())
        has_hung = not is_recent or time.monotonic() >= self._started_at + HANG_SECONDS  # a wait may end a little early
        is_hanging = checking is not None and not checking.done() and has_hung
        return dict(self._if_hanging if is_hanging or not self._result else self._result)

    def latest(self) -> dict[str, str]:
        """A copy of the latest result, empty before the first. Waits for nothing, and starts a check that is due."""
        self._begin()
        return dict(self._result)

    def _begin(self) -> bool:
        """Start a check if the latest began a second ago and none is under way."""
        if self._checking is not None or time.monotonic() < self._started_at + FRESH_SECONDS:
            return False
        self._started_at, self._checking = time.monotonic(), asyncio.create_task(self._run())
        return True

    async def _run(self) -> None:
        try:
            self._result = await to_thread.run_sync(self._check, limiter=self._thread)
        except Exception:
            log.exception("readiness.check_failed")
            self._result = dict.fromkeys(self._if_hanging, "the check failed, see the log")
        finally:
            self._checking, self._ended_at = None, time.monotonic()
