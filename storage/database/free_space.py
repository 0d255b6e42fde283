"""Whether the disk under the database is nearly full: checked by one thread, read by any."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import structlog

log = structlog.get_logger()

# The rest of the disk is for accepted work: its rows and its downloads.
MIN_FREE_SHARE = 0.05
FREE_SPACE_INTERVAL_SECONDS = 1.0
# A disk about the limit is above it in one second and below it in the next. `intake.resumed` is logged after this time.
STEADY_SECONDS = 5.0


def shortage(free_share: float) -> str:
    """Why no delivery is accepted while this part of the disk (0..1) is free; empty if there is room."""
    if free_share >= MIN_FREE_SHARE:
        return ""
    free = int(free_share * 1_000) / 10  # rounded down: never the 5 % that are enough
    return f"the disk of the database has {free:g} % free, and deliveries need {MIN_FREE_SHARE * 100:g} %"


class Disk:
    """`shortage`: why the disk had no room for a delivery at the last `check_soon`, empty if it had.

    A check may hang with the disk. So the thread that writes to the disk checks, and event loops only read `shortage`.
    `free_share`: returns the free part of the disk, 0 to 1. Logs when deliveries begin to be refused and when that
    ends.
    """

    def __init__(self, free_share: Callable[[], float]) -> None:
        self._free_share = free_share
        self._look_at = self._short_at = float("-inf")
        self._is_logged = False
        self.shortage = ""

    def check_soon(self) -> None:
        """Check, at most once in `FREE_SPACE_INTERVAL_SECONDS`. After a failed check `shortage` keeps its value."""
        now = time.monotonic()
        if now <= self._look_at:
            return
        self._look_at = now + FREE_SPACE_INTERVAL_SECONDS
        with suppress(OSError):  # commits report a broken disk
            self.shortage = shortage(self._free_share())
        if self.shortage or self._is_logged:
            self._log_change(now)

    def _log_change(self, now: float) -> None:
        if self.shortage:
            self._short_at = now
            if not self._is_logged:
                log.error("intake.paused", reason=self.shortage)
        elif now > self._short_at + STEADY_SECONDS:
            log.info("intake.resumed")
        else:
            return
        self._is_logged = bool(self.shortage)
