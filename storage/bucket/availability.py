"""Whether the bucket answers, for health checks, which must not wait for it."""

from __future__ import annotations

import threading
import time

from storage.bucket.bucket import PROBE_FOLDER, Bucket
from storage.errors import StoreUnavailable

# One HEAD request in five seconds costs nothing, and an outage shows within that time.
REFRESH_SECONDS = 5.0
# A bucket on the same continent answers in a tenth of this. Health checks have short timeouts.
MAX_WAIT_SECONDS = 0.5
NO_ANSWER_YET = "no answer yet"


class BucketAvailability:
    """Checks the bucket in a background thread. Callers wait for a limited time and otherwise get the previous result.

    Thread-safe.
    """

    def __init__(self, bucket: Bucket, *, max_wait_seconds: float = MAX_WAIT_SECONDS) -> None:
        self._bucket = bucket
        self._max_wait_seconds = max_wait_seconds
        self._lock = threading.Lock()
        self._checking: threading.Thread | None = None
        self._checked_at = float("-inf")
        self._began_at = 0.0
        self._state = NO_ANSWER_YET

    def state(self) -> str:
        """Return "ok", `NO_ANSWER_YET`, or the fault of the last check. A result older than 5 s starts a new check."""
        with self._lock:
            checking = self._checking
            if checking is None and time.monotonic() > self._checked_at + REFRESH_SECONDS:
                checking = self._checking = threading.Thread(target=self._check, name="bucket-check", daemon=True)
                self._began_at = time.monotonic()
                checking.start()
        if checking is not None:
            checking.join(self._max_wait_seconds)
        return self._state

    def unanswered_seconds(self) -> float:
        """How long the check under way has waited for the bucket's answer; 0.0 = none is under way."""
        with self._lock:
            return time.monotonic() - self._began_at if self._checking is not None else 0.0

    def _check(self) -> None:
        try:
            self._bucket.head(f"{self._bucket.prefix}{PROBE_FOLDER}none")
            state = "ok"
        except StoreUnavailable as error:
            state = str(error)
        except Exception as error:  # noqa: BLE001 - the endpoint may be no S3 store at all
            state = f"the store could not be used ({type(error).__name__})"
        with self._lock:
            self._state, self._checked_at, self._checking = state, time.monotonic(), None
