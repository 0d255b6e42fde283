"""Stop hammering what is down: after some failures in a row nothing is tried for a while, then one thing is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# One failure may be that request's own; three in a row are the other side's.
FAILURES = 3
FIRST_PAUSE_SECONDS = 1.0
# An outage's end is noticed within half a minute, at a cost of two tries a minute and process.
PAUSE_CAP_SECONDS = 30.0


class Circuit:
    """Closed: everything passes. Open: nothing does until the pause is over, then one trial decides.

    A failed trial doubles the pause; failures of what was under way when it opened do not.

    Per process, in memory: it only saves work, the rows keep their own due times. Thread-safe.
    `now`: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._failures = 0
        self._pause = 0.0
        self._closed_until = 0.0
        self._on_trial = False

    @property
    def is_open(self) -> bool:
        return self._failures >= FAILURES

    def allowance(self, wanted: int) -> int:
        """How many of `wanted` tries may start now. A trial counts as started."""
        with self._lock:
            if not self.is_open:
                return wanted
            if self._now() < self._closed_until:
                return 0
            self._closed_until = self._now() + self._pause  # the trial's own time: one per pause
            self._on_trial = True
            return min(wanted, 1)

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._pause, self._on_trial = 0, 0.0, False

    def failed(self) -> None:
        with self._lock:
            was_open = self.is_open
            self._failures += 1
            if self.is_open and (self._on_trial or not was_open):
                self._pause = min(max(self._pause * 2, FIRST_PAUSE_SECONDS), PAUSE_CAP_SECONDS)
                self._closed_until, self._on_trial = self._now() + self._pause, False

    @contextmanager
    def watching(self, *outages: type[Exception]) -> Iterator[None]:
        """Count one use of the other side: `outages` are failures, any other error is an answer too."""
        try:
            yield
        except outages:
            self.failed()
            raise
        except Exception:
            self.succeeded()
            raise
        self.succeeded()
