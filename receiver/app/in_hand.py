"""What a worker process has in hand: the claims under way and the rows it holds, and the quarantine of a suspect.

The lock guards memory alone. It is never held across a claim: one that waits in the database stops no other lane.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# How late a stop is noticed while a suspect waits for what is in hand.
STOP_POLL_INTERVAL_SECONDS = 0.05

Claim = tuple[Any, Any, uuid.UUID]


class RowsInHand:
    """Thread-safe. What is held is a claim (model, id, lease), not a row: a report may take a row from the thread that
    reads it, and the next thread claims it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._claiming = 0
        self._quarantined = False
        self._rows: dict[Claim, Any] = {}

    @property
    def is_quarantined(self) -> bool:
        return self._quarantined

    @property
    def is_empty(self) -> bool:
        return not self._claiming and not self._rows

    @property
    def rows(self) -> list[Any]:
        with self._changed:
            return list(self._rows.values())

    @contextmanager
    def claiming(self, *, alone: bool) -> Iterator[bool]:
        """Around one claim. False: none may be made now, because a suspect has the process to itself.

        `alone`: the claim is the suspect's own.
        """
        with self._changed:
            if may := alone or not self._quarantined:
                self._claiming += 1
        try:
            yield may
        finally:
            with self._changed:
                self._claiming -= may
                self._changed.notify_all()

    def take(self, rows: Sequence[Any]) -> None:
        with self._changed:
            self._rows.update({_claim_of(row): row for row in rows})

    def put_down(self, claims: Sequence[Claim]) -> None:
        with self._changed:
            for claim in claims:
                self._rows.pop(claim, None)
            self._changed.notify_all()

    def wait_until_empty(self, seconds: float) -> bool:
        """Whether nothing is in hand, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_empty, seconds)

    @contextmanager
    def quarantine(self, stop: threading.Event) -> Iterator[None]:
        """No other claim begins during the block, and what was in hand has ended before it, unless `stop` is set."""
        with self._changed:
            self._quarantined = True
        try:
            while not stop.is_set() and not self.wait_until_empty(STOP_POLL_INTERVAL_SECONDS):
                pass
            yield
        finally:
            with self._changed:
                self._quarantined = False


def claims_of(rows: Sequence[Any]) -> list[Claim]:
    """What `put_down` takes. To be asked before the work: it may change a row's lease."""
    return [_claim_of(row) for row in rows]


def _claim_of(row: Any) -> Claim:
    return type(row), row.id, row.lease
