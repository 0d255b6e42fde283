"""Why a delivery is not taken, and the answer to it."""

from __future__ import annotations

from collections.abc import Mapping

# The header of an answer to a delivery that can be stored in a moment.
RETRY_AFTER_SECONDS = 5
RETRY_SOON = {"Retry-After": str(RETRY_AFTER_SECONDS)}
AT_ONCE = "too many deliveries to this address at once"
LATE = "could not be stored in time, try again"


class Refused(Exception):
    """The delivery is answered with `status`, `words` and `headers`, and counted as `outcome`."""

    def __init__(self, status: int, words: str, outcome: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(words)
        self.status, self.outcome, self.headers = status, outcome, headers or {}
