"""Somebody who waits, for a while, to hear how a create ended."""

from __future__ import annotations

import threading

from storage.errors import ProviderRejected, ProviderThrottled

Refusal = ProviderRejected | ProviderThrottled


class CreateOutcome:
    """A refusal is told to whoever waits, and then the row ends; or nobody waits any more, and the row goes on.

    Never both: which of the two it is, is decided once, under a lock. Safe for threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_there = True
        self.refusal: Refusal | None = None

    def tell(self, refusal: Refusal) -> bool:
        """Whether somebody still waits, who now knows. The caller ends the row, or takes its words back."""
        with self._lock:
            if self._is_there:
                self.refusal = refusal
            return self._is_there

    def take_back(self) -> None:
        """What was told did not come to be: the row is somebody else's now."""
        with self._lock:
            self.refusal = None

    def leave(self) -> bool:
        """Wait no more. Whether a refusal was told before; it stands once the row has ended."""
        with self._lock:
            self._is_there = False
            return self.refusal is not None
