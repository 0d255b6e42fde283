"""Whether the bucket answers, for health checks, which must not wait for it."""

from __future__ import annotations

from storage.background import BackgroundCheck
from storage.bucket.bucket import PROBE_FOLDER, Bucket
from storage.errors import StoreUnavailable

# One HEAD request in five seconds costs nothing, and an outage shows within that time.
REFRESH_SECONDS = 5.0
# A bucket on the same continent answers in a tenth of this. Health checks have short timeouts.
MAX_WAIT_SECONDS = 0.5
NO_ANSWER_YET = "no answer yet"


class BucketAvailability(BackgroundCheck):
    """`state`: "ok", `NO_ANSWER_YET`, or the fault of the last check."""

    def __init__(self, bucket: Bucket, *, max_wait_seconds: float = MAX_WAIT_SECONDS) -> None:
        self._bucket = bucket
        super().__init__(
            "bucket-check", self._ask, NO_ANSWER_YET,
            refresh_seconds=REFRESH_SECONDS, max_wait_seconds=max_wait_seconds,
        )  # fmt: skip

    def _ask(self) -> str:
        try:
            self._bucket.head(f"{self._bucket.prefix}{PROBE_FOLDER}none")
        except StoreUnavailable as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - the endpoint may be no S3 store at all
            return f"the store could not be used ({type(error).__name__})"
        return "ok"
