"""An amount a second, in memory: each process has its own."""

from __future__ import annotations

import time


class Allowance:
    """An amount a second. What was not spent may be spent later, up to `most` at once; the last part may exceed it.

    One thread spends, any may ask.
    """

    def __init__(self, per_second: float, most: float) -> None:
        self._per_second = per_second
        self._ahead_seconds = most / per_second
        self._paid_at = float("-inf")  # when all that was spent has come in

    @property
    def is_spent(self) -> bool:
        return self._paid_at - time.monotonic() >= self._ahead_seconds

    def spend(self, amount: float) -> None:
        self._paid_at = max(self._paid_at, time.monotonic()) + amount / self._per_second
