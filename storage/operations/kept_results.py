"""Results that may take long to read, kept in memory. A page waits at most 0.15 s for them, and a thread reads the
rest.
"""

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

# How long a page waits for results that are missing or old.
AT_ONCE_SECONDS = 0.15
FRESH_SECONDS = 3.0
# Results that take long are read less often: they stay fresh for this many times their reading time.
RESTS = 20
# The pause after a reading that no page waits for, so that other pages are hardly slower meanwhile.
PAUSE_SECONDS = 0.02
CLOSE_SECONDS = 2.0


class _Known(NamedTuple):
    """`took`: seconds."""

    at: float
    took: float
    value: object


class KeptResults(Generic[K, V]):
    """What `read` returned for each key. Safe for threads.

    `most`: how many keys are kept. `fresh_seconds`: how long the result of a key is fresh; without it, what the keys of
    a call take to read together decides.
    """

    def __init__(
        self,
        database: Database,
        read: Callable[[Session, K], V],
        most: int,
        fresh_seconds: Callable[[K], float] | None = None,
    ) -> None:
        self._database = database
        self._read = read
        self._most = most
        self._fresh_seconds = fresh_seconds
        self._known: OrderedDict[K, _Known] = OrderedDict()
        self._wanted: dict[K, None] = {}
        self._waiting = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def of(self, keys: Sequence[K]) -> dict[K, V]:
        """The known results of these keys. A missing key is being read, and a later call returns its result."""
        with self._changed:
            due = self._due(keys)
            wanted = dict.fromkeys([*self._wanted, *due])
            self._wanted = dict.fromkeys(sorted(wanted, key=self._read_at))
            if self._wanted and self._thread is None and not self._closing.is_set():
                thread = threading.Thread(target=self._run, daemon=True)
                thread.start()
                self._thread = thread  # started: else a later call tries again
            self._waiting += 1
            self._changed.wait_for(lambda: self._wanted.keys().isdisjoint(due), AT_ONCE_SECONDS)
            self._waiting -= 1
            return {key: self._known[key].value for key in keys if key in self._known}  # type: ignore[misc]

    def _due(self, keys: Sequence[K]) -> list[K]:
        took = sum(self._known[key].took for key in keys if key in self._known)
        fresh_seconds = self._fresh_seconds or (lambda _key: max(FRESH_SECONDS, took * RESTS))
        now = time.monotonic()
        return [key for key in keys if key not in self._known or self._read_at(key) < now - fresh_seconds(key)]

    def _read_at(self, key: K) -> float:
        return self._known[key].at if key in self._known else 0.0

    def forget(self, key: K) -> None:
        """Forget the result of a key that was changed, so that the next call reads it again."""
        with self._changed:
            self._known.pop(key, None)

    def close(self) -> None:
        """Read nothing further. Waits a moment for the reading in progress."""
        with self._changed:
            self._closing.set()
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while (key := self._next()) is not None:
                if not self._keep(key[0]):
                    self._closing.wait(PAUSE_SECONDS)
        except DatabaseUnavailable as error:
            log.info("rollups.paused", error=str(error))
        finally:
            with self._changed:
                self._wanted.clear()
                self._thread = None
                self._changed.notify_all()

    def _next(self) -> tuple[K] | None:
        with self._changed:
            return None if self._closing.is_set() or not self._wanted else (next(iter(self._wanted)),)

    def _keep(self, key: K) -> bool:
        """Read one key. Returns whether a page is waiting."""
        began = time.monotonic()
        with self._database.read() as session:
            value = self._read(session, key)
        with self._changed:
            self._known[key] = _Known(began, time.monotonic() - began, value)
            self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
            self._wanted.pop(key, None)
            self._changed.notify_all()
            return self._waiting > 0
