"""Pauses Python's garbage collector where nothing becomes garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """For imports, whose objects stay. Repeated collections over them were a seventh of a command's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
