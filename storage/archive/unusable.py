"""The retry schedule of a file whose host answers with something unusable. Pure: no clock, no rows.

The answer may be a passing state of the CDN (an error page with status 200, a file cut without a length) or permanent.
Nobody can tell, so the file is tried less and less often while the provider has it:

    try    after the one before    after the first    for
      2                     2 s                2 s    one bad answer of many edges
      3                     8 s               10 s
      4                    20 s               30 s    an edge that restarts
      5                    30 s              1 min
      6                    1 min             2 min    a deployment
      7                    3 min             5 min
      8                   10 min            15 min    still unusable: its task is reported as incomplete
      9                   15 min            30 min    an incident at the CDN
     10                   30 min               1 h
     11                      2 h               3 h
     12                      5 h               8 h    a working day
     13                     16 h               1 d
     14                      2 d               3 d    a weekend
     15                      5 d               8 d
     16                     13 d              21 d
     17                      9 d              30 d    the last, `MARGIN_SECONDS` before the provider deletes it

So a file that is really broken costs its host 17 requests in 30 days and 13 in 24 hours.
"""

from __future__ import annotations

import math
import random
from datetime import datetime

from storage.states import SAID_AFTER_TRIES

DELAYS_SECONDS = (2, 8, 20, 30, 60, 180, 600, 900, 1_800, 7_200, 18_000, 57_600, 172_800, 432_000, 1_123_200)
# Links that expire within hours and are fresh at each read add a try before their ends, at most this many.
MAX_TRIES = 20
# Time before the provider deletes the file, for a busy worker to begin and for a large file to pass.
MARGIN_SECONDS = 600
# An end within this share of the delay gets no try of its own, because the one before was just made.
WORTH = 1 / 8
# Jitter, upwards only, because the first 15 minutes are a promise. It separates files of one task and one moment.
JITTER = 0.1


def next_try(tries: int, *, now: datetime, link_ends: datetime | None, life_ends: datetime | None) -> float | None:
    """Seconds until the next try of a file that was unusable `tries` times (at least 1) in a row; None = never.

    `link_ends`: when the newest link expires; it counts while it is in the future. `life_ends`: when the provider is
    expected to delete the file; it counts afterwards, because a link with a life of minutes says nothing about its
    file.
    """
    delay = DELAYS_SECONDS[min(tries, len(DELAYS_SECONDS)) - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311 - no secret
    if tries < SAID_AFTER_TRIES:
        return delay
    ends = [(end - now).total_seconds() - MARGIN_SECONDS for end in (link_ends, life_ends) if end]
    left = next((each for each in ends if each > 0), 0.0 if ends else math.inf)
    if tries >= MAX_TRIES or left == 0:
        return None
    return min(delay, left) if left >= delay * WORTH else delay
