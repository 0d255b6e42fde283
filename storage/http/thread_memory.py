"""Memory that each thread keeps for its reads."""

from __future__ import annotations

import threading
from collections.abc import Callable


def thread_memory(count: int) -> Callable[[], memoryview]:
    """A function that returns the same `count` bytes at each call of a thread.

    Fresh memory for each read costs page faults.
    """
    of_thread = threading.local()

    def memory() -> memoryview:
        if not hasattr(of_thread, "memory"):
            of_thread.memory = memoryview(bytearray(count))
        found: memoryview = of_thread.memory
        return found

    return memory
