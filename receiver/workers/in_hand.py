"""The rows that a worker process holds: claims under way, rows in hand, and the quarantine of one row.

The lock protects memory alone. It is never held while a claim waits in the database, which would stop every lane.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# The delay with which a stop is noticed while a row in quarantine waits for the rows in hand.
STOP_POLL_INTERVAL_SECONDS = 0.05


class RowsInHand:
    """Thread-safe. Counts the objects of claims, not rows: a report may take a row from one thread, and the next thread
    claims it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._claiming = 0
        self.is_quarantined = False
        self._rows: dict[int, tuple[Any, float]] = {}  # by the object's id, with the time when its work began
        self._removed_at = time.monotonic()

    @property
    def rows(self) -> list[Any]:
        with self._changed:
            return [row for row, _ in self._rows.values()]

    @property
    def not_begun(self) -> list[Any]:
        """The rows that no thread works on yet."""
        with self._changed:
            return [row for row, begun_at in self._rows.values() if begun_at == math.inf]

    def empty_for(self) -> float:
        """For how many seconds nothing has been in hand."""
        with self._changed:
            return 0.0 if self._rows else time.monotonic() - self._removed_at

    def lasting(self, model: Any, seconds: float) -> list[Any]:
        """The rows of this model that have been worked on for at least this long."""
        before = time.monotonic() - seconds
        with self._changed:
            return [row for row, begun_at in self._rows.values() if type(row) is model and begun_at < before]

    @contextmanager
    def claiming(self, *, alone: bool) -> Iterator[bool]:
        """Enclose one claim. Yields False during a quarantine: the claim must not be made.

        `alone`: the claim is of the row in quarantine itself.
        """
        with self._changed:
            if is_permitted := alone or not self.is_quarantined:
                self._claiming += 1
        try:
            yield is_permitted
        finally:
            with self._changed:
                self._claiming -= is_permitted
                self._changed.notify_all()

    def add(self, rows: Sequence[Any], *, begun_at: float = math.inf) -> None:
        """Note that these rows are claimed, and once more when the work on them begins."""
        with self._changed:
            self._rows.update({id(row): (row, begun_at) for row in rows})

    def remove(self, rows: Sequence[Any]) -> None:
        with self._changed:
            for row in rows:
                self._rows.pop(id(row), None)
            self._removed_at = time.monotonic()
            self._changed.notify_all()

    def wait_until_empty(self, seconds: float) -> bool:
        """Wait at most this long. Returns whether nothing is in hand."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._claiming and not self._rows, seconds)

    @contextmanager
    def quarantine(self, stop: threading.Event) -> Iterator[None]:
        """Wait until nothing is in hand, or `stop` is set. During the block no other claim starts."""
        with self._changed:
            self.is_quarantined = True
        try:
            while not stop.is_set() and not self.wait_until_empty(STOP_POLL_INTERVAL_SECONDS):
                pass
            yield
        finally:
            with self._changed:
                self.is_quarantined = False
