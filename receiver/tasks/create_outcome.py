"""The outcome of a create, for a client that waits for it for a limited time."""

from __future__ import annotations

import threading

from storage.errors import ProviderRejected, ProviderThrottled

Refusal = ProviderRejected | ProviderThrottled


class CreateOutcome:
    """Either the waiting client gets a refusal and the row ends, or the client has left and the row continues.

    A lock decides this once. Safe for threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_there = True
        self.refusal: Refusal | None = None

    def refuse(self, refusal: Refusal) -> bool:
        """Give the client the refusal. True: the client waits, and the caller ends the row or calls `take_back`."""
        with self._lock:
            if self._is_there:
                self.refusal = refusal
            return self._is_there

    def take_back(self) -> None:
        """Withdraw the refusal, because another owner took over the row before it ended."""
        with self._lock:
            self.refusal = None

    def leave(self) -> bool:
        """Stop waiting. Returns whether the client got a refusal before, which counts once the row has ended."""
        with self._lock:
            self._is_there = False
            return self.refusal is not None
