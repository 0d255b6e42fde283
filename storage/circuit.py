"""Circuit breaker: after three failures in a row work pauses, then one trial decides (half-open)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from storage.errors import Retry

# One failure may belong to that request; three in a row are an outage.
FAILURES = 3
FIRST_PAUSE_SECONDS = 1.0
# The end of an outage is noticed within 30 s, at a cost of two tries per minute and process.
PAUSE_CAP_SECONDS = 30.0
# A failure that may belong to one request alone does not count if another request succeeded within this time.
DOUBT_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Grant:
    """Permission to start `count` tries, used as a context around them.

    `trial_of`: the open circuit that this is a trial of. A trial that ends without a result never reached the other
    side: an expired link, a lost claim, an empty claim. It is given back, and the next trial may start at once.
    """

    count: int
    trial_of: Circuit | None = None

    def __enter__(self) -> Grant:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> bool:
        """End the grant. Returns whether it was a trial without a result."""
        return self.trial_of is not None and self.trial_of._take_back(self)


class Circuit:
    """Closed: every try is granted. Open: none is until the pause is over, then one trial decides.

    A failed trial doubles the pause. Failures of tries that were running when the circuit opened do not. The state is
    in memory, per process; it only saves work, because rows keep their own due times. Thread-safe. `now`: monotonic
    seconds.
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
        """Grant up to `wanted` tries now. Use the result as a context around them.

        `left_for_seconds`: take a trial only if it has been available for this long.
        """
        with self._lock:
            if not self.is_open or not wanted:
                return Grant(wanted)
            if self._now() < self._next_trial_at + left_for_seconds:
                return Grant(0)
            self._trial, self._trial_was_due_at = Grant(1, self), self._next_trial_at
            self._next_trial_at = self._now() + self._pause  # a trial that hangs does not hold up the next one
            return self._trial

    def _take_back(self, trial: Grant) -> bool:
        with self._lock:
            has_no_result = self._trial is trial
            if has_no_result:
                self._trial, self._next_trial_at = None, self._trial_was_due_at
            return has_no_result

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._pause, self._trial = 0, 0.0, None
            self._went_well_at = self._now()

    def failed(self, *, doubtful: bool = False) -> None:
        """`doubtful`: the failure may belong to one request; it counts only if none succeeded for DOUBT_SECONDS."""
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
        """Report the result of the block to the circuit.

        `outage`: counts as a failure if its `is_outage` is True, as a doubtful one if None. `answers`: refusals by the
        other side, which is therefore reachable. Any other error is no result: the other side was not reached, or it
        is a bug.
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
