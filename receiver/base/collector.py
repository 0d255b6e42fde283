"""Pauses Python's garbage collector where nothing becomes garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """For imports, whose objects stay. Repeated collections over them were a seventh of a command's start.

    They are excluded from the later ones too: the first object after the block caused a collection over all of them,
    which took a tenth of the start of `receiver serve`.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


# Net new objects before a collection. Requests at work have some 30 each and leave no cycles. With Python's own 700, 64
# at once caused collections that found nothing and took a tenth of the event loop's time. With 5,000 they cause none.
# Refused requests leave cycles, which stay below 5 MB until they are collected.
THRESHOLD = 5_000


def spare_imports() -> None:
    """Exclude all present objects from collections, because they stay. Then collect rarely.

    Looking through the imports again and again held every answer up for 100 to 400 ms a time. Collecting first would
    take 0.12 s and free 1,300 of 135,000 objects. In a forked process it would copy every page.
    """
    gc.freeze()
    gc.set_threshold(THRESHOLD)
