"""Results that may take long to read, kept in memory: a page waits a moment for them, and a thread reads the rest."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import structlog
from sqlmodel import Session

from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable

K = TypeVar("K")
V = TypeVar("V")

log = structlog.get_logger()

# So long a page waits for what is not known yet or is old.
AT_ONCE_SECONDS = 0.15
FRESH_SECONDS = 3.0
# What takes long is read less often: while somebody looks, so many times longer is rested than read.
RESTS = 20
CLOSE_SECONDS = 2.0


class _Known(NamedTuple):
    """`took`: seconds."""

    at: float
    took: float
    value: object


class KeptResults(Generic[K, V]):
    """What `read` returned for each key. `most`: so many keys are kept. Safe for threads."""

    def __init__(self, database: Database, read: Callable[[Session, K], V], most: int) -> None:
        self._database = database
        self._read = read
        self._most = most
        self._known: OrderedDict[K, _Known] = OrderedDict()
        self._wanted: list[K] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def of(self, keys: Sequence[K]) -> dict[K, V]:
        """What is known of these keys. One that is missing is being read, and is there for a later call."""
        with self._changed:
            took = sum(self._known[key].took for key in keys if key in self._known)
            old = time.monotonic() - max(FRESH_SECONDS, took * RESTS)
            due = [key for key in keys if key not in self._known or self._known[key].at < old]
            self._wanted += [key for key in due if key not in self._wanted]
            self._wanted.sort(key=lambda key: self._known[key].at if key in self._known else 0.0)
            if self._wanted and self._thread is None and not self._is_closing:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: not set(due) & set(self._wanted), AT_ONCE_SECONDS)
            return {key: self._known[key].value for key in keys if key in self._known}  # type: ignore[misc]

    def forget(self, key: K) -> None:
        """Read it again for the next call, because it was changed."""
        with self._changed:
            self._known.pop(key, None)

    def close(self) -> None:
        """Read nothing further. Waits a moment for what is being read."""
        with self._changed:
            self._is_closing = True
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while (key := self._next()) is not None:
                self._keep(key[0])
        except DatabaseUnavailable as error:
            log.info("rollups.paused", error=str(error))
        finally:
            with self._changed:
                self._wanted.clear()
                self._thread = None
                self._changed.notify_all()

    def _next(self) -> tuple[K] | None:
        with self._changed:
            return None if self._is_closing or not self._wanted else (self._wanted[0],)

    def _keep(self, key: K) -> None:
        began = time.monotonic()
        with self._database.read() as session:
            value = self._read(session, key)
        with self._changed:
            self._known[key] = _Known(began, time.monotonic() - began, value)
            self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
            self._wanted.remove(key)
            self._changed.notify_all()
