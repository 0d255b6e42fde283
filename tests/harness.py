"""Helpers of all tests, and the list of the only doubles.

Each double is an honest second implementation that speaks over real sockets:
- `receiver.sandbox`: the provider (task endpoints, callbacks, result files) with its knobs for failures;
- `tests.webhook_receiver`: a receiver of webhooks that can fail, be slow and be down;
- `tests.fault_proxy`: a proxy in front of SeaweedFS that swallows, changes or ignores requests;
- `tests.moving_address`: an address that leads to one port, and later to another.
Everything else is real: SeaweedFS is the S3 server, SQLite and PostgreSQL are the databases, child processes are killed
with real signals. Our own code is never replaced.

A test may assert on rows, on objects in the bucket and on answers (HTTP, exit codes, return values), never on which of
our functions were called, and never on how long something took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
PAYLOADS = ROOT / "tests" / "payloads"

T = TypeVar("T")

CALLBACK_SECRET = "a-secret-of-more-than-thirty-two-characters"


def wait_until(condition: Callable[[], T], *, seconds: float = 20, every: float = 0.02) -> T:
    """Call `condition` until it returns true, and return that value; AssertionError after `seconds`.

    An AssertionError inside the condition counts as "not yet", and is the one shown at the end.
    """
    deadline = time.monotonic() + seconds
    while True:
        failure: AssertionError | None = None
        try:
            if answer := condition():
                return answer
        except AssertionError as error:
            failure = error
        if time.monotonic() > deadline:
            raise failure or AssertionError(f"still not true after {seconds} s")
        time.sleep(every)
