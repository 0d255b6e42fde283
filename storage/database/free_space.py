"""Whether the disk under the database is nearly full: checked by one thread, read by any."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

# The rest of the disk is for accepted work: its rows and its downloads.
MIN_FREE_SHARE = 0.05
FREE_SPACE_INTERVAL_SECONDS = 1.0


class Disk:
    """`is_short`: whether the disk was nearly full at the last `check_soon`.

    A check may hang with the disk. So the thread that writes to the disk checks, and event loops only read `is_short`.
    `free_share`: returns the free part of the disk, 0 to 1.
    """

    def __init__(self, free_share: Callable[[], float]) -> None:
        self._free_share = free_share
        self._look_at = float("-inf")
        self.is_short = False

    def check_soon(self) -> None:
        """Check, at most once in `FREE_SPACE_INTERVAL_SECONDS`. After a failed check `is_short` keeps its value."""
        if time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + FREE_SPACE_INTERVAL_SECONDS
            # Commits report a broken disk. Some file systems report a size of 0.
            with suppress(OSError, ZeroDivisionError):
                self.is_short = self._free_share() < MIN_FREE_SHARE
