"""The outcome of a create, for a client that waits for it for a while."""

from __future__ import annotations

import threading

from storage.errors import ProviderRejected, ProviderThrottled

Refusal = ProviderRejected | ProviderThrottled


class CreateOutcome:
    """Either a refusal is told to the waiting client and the row ends, or the client has left and the row goes on.

    A lock decides this once. Safe for threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_there = True
        self.refusal: Refusal | None = None

    def tell(self, refusal: Refusal) -> bool:
        """Whether a client still waits and now has the refusal. Then the caller ends the row, or calls `take_back`."""
        with self._lock:
            if self._is_there:
                self.refusal = refusal
            return self._is_there

    def take_back(self) -> None:
        """Withdraw the refusal: the row did not end with it, because it has another owner by now."""
        with self._lock:
            self.refusal = None

    def leave(self) -> bool:
        """Stop waiting. Returns whether a refusal was told before; it counts once the row has ended."""
        with self._lock:
            self._is_there = False
            return self.refusal is not None
