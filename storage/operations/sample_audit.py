"""An audit of some random files, requested by a person at the console."""

from __future__ import annotations

import threading

from storage.archive.audit import Audit, Counts
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable, StoreUnavailable

SAMPLE = 50
SHOWN_FINDINGS = 100
# The rate of reading, low enough to leave the workers' transfers undisturbed.
SAMPLE_BYTES_PER_SECOND = 20e6


class SampleAudit:
    """An audit of some random files beside the web server. Its findings stay until the next one."""

    def __init__(self, database: Database, bucket: Bucket) -> None:
        self._database = database
        self._bucket = bucket
        self._lock = threading.Lock()
        self.is_running = False
        self.counts = Counts()
        self.findings: list[dict[str, object]] = []
        self.problem = ""
        self.by = ""

    def start(self, person: str) -> bool:
        """Start unless one is running. Returns whether it started."""
        with self._lock:
            if self.is_running:
                return False
            self.is_running, self.counts, self.findings, self.problem, self.by = True, Counts(), [], "", person
        try:
            threading.Thread(target=self._run, daemon=True).start()
        except RuntimeError:  # got no thread; a later call tries again
            self.is_running = False
            raise
        return True

    def _run(self) -> None:
        try:
            audit = Audit(
                self._database,
                self._bucket,
                deep=True,
                sample=SAMPLE,
                max_bytes_per_second=SAMPLE_BYTES_PER_SECOND,
            )
            for batch in audit.run():
                self.counts.add(batch.counts)
                room = SHOWN_FINDINGS - len(self.findings)
                self.findings += [finding.as_json() for finding in batch.findings if finding.is_fault][:room]
        except (DatabaseUnavailable, StoreUnavailable, LookupError) as error:
            self.problem = str(error)
        finally:
            self.is_running = False
