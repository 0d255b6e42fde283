"""How much room is left on the disk under the database, looked at by one thread and read by any."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

# The rest belongs to what was accepted already: its rows, its downloads on their way.
MIN_FREE_SHARE = 0.05
FREE_SPACE_INTERVAL_SECONDS = 1.0


class Disk:
    """`is_short`: whether the disk was nearly full when `look` was last called.

    Event loops read it, and a look may hang with the disk: one thread, which writes to that disk anyway, looks.
    `free_share`: its free part, 0..1.
    """

    def __init__(self, free_share: Callable[[], float]) -> None:
        self._free_share = free_share
        self._look_at = float("-inf")
        self.is_short = False

    def look(self) -> None:
        """Look at most once in `FREE_SPACE_INTERVAL_SECONDS`. A disk that cannot be looked at counts as it was."""
        if time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + FREE_SPACE_INTERVAL_SECONDS
            # Commits meet a broken disk too, and say so to their senders. Some file systems name no size: 0.
            with suppress(OSError, ZeroDivisionError):
                self.is_short = self._free_share() < MIN_FREE_SHARE
