"""What a start can leave out: garbage collections where nothing becomes garbage, and imports that are not used."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect nothing during imports, whose objects stay. Repeated collections over them were a seventh of a command's
    start.

    Later collections exclude these objects too. Otherwise the first object after the block caused a collection over all
    of them, which took a tenth of the start of `receiver serve`.
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

    Each collection over the imports delayed every answer by 100 to 400 ms. A collection before this would take 0.12 s,
    free 1,300 of 135,000 objects, and copy every page of a forked process.
    """
    gc.freeze()
    gc.set_threshold(THRESHOLD)


def import_without_rich() -> None:
    """Import structlog and httpx without rich, which both import where it is installed.

    structlog would print tracebacks with it, which we render ourselves, and httpx has a command line. rich and what it
    imports were a twentieth of a start. Later imports find it as usual.
    """
    is_hidden = "rich" not in sys.modules
    if is_hidden:
        sys.modules["rich"] = None  # type: ignore[assignment] # counts as not installed
    try:
        for name in ("structlog", "httpx"):
            import_module(name)
    finally:
        if is_hidden:
            del sys.modules["rich"]
