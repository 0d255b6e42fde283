"""Wake-ups of the threads that wait for work: only threads with work are woken.

When each commit woke every feeder, ten threads took turns at the interpreter lock to find that one of them had a row.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable


class WakeUps:
    """Each thread waits under a name of its own."""

    def __init__(self, names: Iterable[str]) -> None:
        self._woken = {name: threading.Event() for name in names}

    def begin(self, name: str) -> None:
        """From now on a wake-up of this name ends the next wait, even if it comes first."""
        self._woken[name].clear()

    def wait(self, name: str, seconds: float) -> None:
        self._woken[name].wait(seconds)

    def wake(self, names: Collection[str] | None = None) -> None:
        """Wake the threads of these names, None: all."""
        for name in self._woken if names is None else names:
            self._woken[name].set()
