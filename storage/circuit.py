"""Stop hammering what is down: after some failures in a row nothing is tried for a while, then one thing is."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage.errors import Retry

# One failure may be that request's own; three in a row are the other side's.
FAILURES = 3
FIRST_PAUSE_SECONDS = 1.0
# An outage's end is noticed within half a minute, at a cost of two tries a minute and process.
PAUSE_CAP_SECONDS = 30.0
# A failure that may be one request's own is taken for that while others go well.
DOUBT_SECONDS = 10.0


class Grant:
    """Leave to start `count` tries, as a context around them.

    The trial of an open circuit counts only once the circuit is told how it went. One that ends untold never reached
    the other side (an expired link, a lost claim, an empty claim): it is given back, and the next may start at once.
    """

    def __init__(self, count: int, circuit: Circuit | None = None) -> None:
        self.count = count
        self._circuit = circuit

    @property
    def is_trial(self) -> bool:
        return self._circuit is not None

    def __enter__(self) -> Grant:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> bool:
        """End it. Whether it was a trial of which nothing had been told."""
        return self._circuit is not None and self._circuit._take_back(self)


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
        self._next_trial_at = 0.0
        self._trial: Grant | None = None
        self._trial_was_due_at = 0.0
        self._went_well_at = -math.inf

    @property
    def is_open(self) -> bool:
        return self._failures >= FAILURES

    def grant(self, wanted: int, *, left_for_seconds: float = 0) -> Grant:
        """How many of `wanted` tries may start now; use it as a context around them.

        `left_for_seconds`: a trial is taken only if nobody else has taken it for so long.
        """
        with self._lock:
            if not self.is_open or not wanted:
                return Grant(wanted)
            if self._now() < self._next_trial_at + left_for_seconds:
                return Grant(0)
            self._trial, self._trial_was_due_at = Grant(1, self), self._next_trial_at
            self._next_trial_at = self._now() + self._pause  # the trial's own time: a hanging one holds up no other
            return self._trial

    def _take_back(self, trial: Grant) -> bool:
        with self._lock:
            untold = self._trial is trial
            if untold:
                self._trial, self._next_trial_at = None, self._trial_was_due_at
            return untold

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._pause, self._trial = 0, 0.0, None
            self._went_well_at = self._now()

    def failed(self, *, doubtful: bool = False) -> None:
        """`doubtful`: it may be that request's own, and counts only when nothing went well for a while."""
        with self._lock:
            if doubtful and self._now() - self._went_well_at < DOUBT_SECONDS:
                return
            was_open = self.is_open
            self._failures += 1
            if self.is_open and (self._trial or not was_open):
                self._pause = min(max(self._pause * 2, FIRST_PAUSE_SECONDS), PAUSE_CAP_SECONDS)
                self._next_trial_at, self._trial = self._now() + self._pause, None

    @contextmanager
    def watching(self, outage: type[Retry], *answers: type[Exception]) -> Iterator[None]:
        """Tell the circuit how one use of the other side went.

        `outage`: a failure, as far as its `is_outage` says so. `answers`: refusals that the other side itself gave, so
        it is there. Any other error says nothing: it was raised before the other side was reached, or is a bug.
        """
        try:
            yield
        except answers:
            self.succeeded()
            raise
        except outage as error:
            if error.is_outage is not False:
                self.failed(doubtful=error.is_outage is None)
            raise
        self.succeeded()
