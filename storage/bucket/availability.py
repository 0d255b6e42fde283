"""Whether the bucket answers, for those who must never wait for it."""

from __future__ import annotations

import threading
import time

from storage.bucket.bucket import PROBE_FOLDER, Bucket
from storage.errors import StoreUnavailable

# One HEAD in five seconds costs nothing; an outage shows in the next look.
REFRESH_SECONDS = 5.0
# A bucket on the same continent answers in a tenth of this; whoever asks for health has little time.
MAX_WAIT_SECONDS = 0.5


class BucketAvailability:
    """Looks when it is asked, in a thread of its own that goes on when the asker has lost patience. Thread-safe."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._looking: threading.Thread | None = None
        self._looked_at = float("-inf")
        self._state = "no answer yet"

    def state(self) -> str:
        """ "ok", or in words what was wrong at the last look, which is 5 s old at most, or is being taken."""
        with self._lock:
            looking = self._looking
            if looking is None and time.monotonic() > self._looked_at + REFRESH_SECONDS:
                looking = self._looking = threading.Thread(target=self._look, name="bucket-watch", daemon=True)
                looking.start()
        if looking is not None:
            looking.join(MAX_WAIT_SECONDS)
        return self._state

    def _look(self) -> None:
        try:
            self._bucket.head(f"{self._bucket.prefix}{PROBE_FOLDER}none")
            state = "ok"
        except StoreUnavailable as error:
            state = str(error)
        except Exception as error:  # noqa: BLE001 - what answers there is no S3 store
            state = f"the store could not be used ({type(error).__name__})"
        with self._lock:
            self._state, self._looked_at, self._looking = state, time.monotonic(), None
