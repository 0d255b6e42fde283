"""The retry schedule of outgoing webhooks, and of all other sinks: the delay from each failed try to the next."""

from __future__ import annotations

import random
from collections.abc import Sequence

# The default of RECEIVER_EVENT_RETRY_SECONDS: 14 delays, 3 days and 5 hours in all. Standard Webhooks' schedule ("Retry
# schedule", specification 1.0.0: 5 s, 5 min, 30 min, 2, 5, 10, 14, 20, 24 h), denser at its start, because later events
# of the task wait as well.
EVENT_RETRY_SECONDS = (1, 5, 30, 120, 300, 900, 1_800, 3_600, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
# Spreads the retries of receivers that failed at the same time.
JITTER = 0.2


def retry_delay(schedule: Sequence[float], tries: int, asked_seconds: float | None) -> float | None:
    """Seconds until the next try after `tries` earlier ones. None: the schedule has ended.

    `asked_seconds`: the receiver's `Retry-After`, already capped. It may only lengthen the delay.
    """
    if tries >= len(schedule):
        return None
    scheduled = schedule[tries] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
    return max(scheduled, asked_seconds or 0)
