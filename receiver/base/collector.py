"""Python's garbage collector, out of the way where nothing becomes garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """For imports, which stay. Looking through them again and again was a seventh of a command's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
