"""Everything that runs in a campaign: the product's processes, the provider, the store, the database."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from receiver import config
from receiver.sandbox import Knobs, Sandbox
from receiver.sandbox.seaweed import Mortal, Seaweed, is_free, random_port
from receiver.wiring import Parts
from storage import migrations
from tests.chaos.plan import LEASE_SECONDS, WEB_KILLED, WORKER_KILLED, Plan
from tests.chaos.processes import ROOT, Kept
from tests.chaos.store import ChaosStore
from tests.postgres import Postgres

BUCKET = "pictures"
PICTURE_BYTES = 20_000
CALLBACK_TRIES = 4


class Stage:
    """All servers, as a context manager: whatever happens inside, nothing of it runs afterwards.

    All of it listens on loopback alone, and dies with this process (Linux) even when that is killed.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Stage:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.seaweed = self._stack.enter_context(Seaweed(self.folder / "seaweed", BUCKET))
        self.store = self._stack.enter_context(ChaosStore(self.seaweed, self.plan.seed))
        self.sandbox = self._stack.enter_context(Sandbox(knobs=knobs(self.plan.seed)))
        self.postgres = None
        if self.plan.database == "postgresql":
            self.postgres = self._stack.enter_context(Postgres())
        self.environment = self._environment()
        self.parts = Parts(settings_in(self.environment))
        self._stack.callback(self.parts.close)
        migrations.upgrade(self.parts.database)
        mortal = Mortal()
        self.web = Kept(WEB_KILLED, ["serve"], self.environment, self.folder, mortal)
        self.workers = [
            Kept(WORKER_KILLED, ["work"], self.environment, self.folder, mortal) for _ in range(self.plan.workers)
        ]
        for each in (self.web, *self.workers):
            self._stack.callback(each.stop)
            each.start()
        for each in (self.web, *self.workers):
            if not each.wait_until_ready():
                raise RuntimeError(f"a process did not start:\n{each.log.read_text()[-3_000:]}")

    def _environment(self) -> dict[str, str]:
        """The whole environment of the processes: nothing of the caller's reaches them but the path of Python."""
        port = next(port for port in iter(random_port, None) if is_free(port))
        url = self.postgres.url() if self.postgres else f"sqlite:///{self.folder / 'receiver.db'}"
        return {
            "PATH": os.defpath,
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            **self.seaweed.environment,
            "RECEIVER_DATABASE_URL": url,
            "RECEIVER_PORT": str(port),
            "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "RECEIVER_CALLBACK_SECRETS": "a-secret-of-more-than-thirty-two-characters",
            "RECEIVER_KLING_BASE_URL": self.sandbox.url,
            "RECEIVER_KLING_API_KEY": self.sandbox.api_key,
            "RECEIVER_PRIVATE_RESULT_HOSTS": self.sandbox.url.removeprefix("http://"),
            "RECEIVER_S3_BUCKET": BUCKET,
            "RECEIVER_S3_ENDPOINT_URL": self.store.endpoint_url,
            "RECEIVER_SPOOL_DIR": str(self.folder),
            "RECEIVER_WORKERS": "0",
            "RECEIVER_WORKER_THREADS": "4",
            "RECEIVER_LEASE_SECONDS": str(LEASE_SECONDS),
            "RECEIVER_GRACE_SECONDS": "5",
            "RECEIVER_POLL_AFTER_SECONDS": "1",
            "RECEIVER_POLL_MAX_SECONDS": "8",
            "RECEIVER_LOG_FORMAT": "json",
        }

    def calm(self) -> None:
        """No fault begins from now on."""
        self.store.is_calm = True
        still = {name: value for name, value in Knobs().model_dump().items() if name.startswith(("cdn_", "query_"))}
        self.sandbox.set(**still, create_faults=[], create_fault_rate=0)

    def counts(self) -> Counter[str]:
        """How often each of the faults happened that store and provider make by themselves."""
        ledger = self.sandbox.ledger()
        counts, ends = ledger.counts, [callback for callback in ledger.callbacks if callback.delivered]
        copies = Counter(callback.webhook_id for callback in ends)
        first_at: dict[str, dict[str, int]] = {}
        for callback in ends:
            at = next(each.at_ms for each in callback.attempts if each.http_status == 200)
            times = first_at.setdefault(callback.task_id, {})
            times[callback.status] = min(at, times.get(callback.status, at))
        reordered = [times for times in first_at.values() if times.get("succeed", 2**63) < times.get("submitted", 0)]
        truncated = ("truncated", "truncated_chunked", "truncated_silent")
        return self.store.counts + Counter({
            "callback dropped": counts["fault:callback:dropped"],
            "callback duplicated": sum(count > 1 for count in copies.values()),
            "callback reordered": len(reordered),
            "download 503": counts["fault:cdn:503"],
            "download truncated": sum(counts[f"fault:cdn:{kind}"] for kind in truncated),
            "create in doubt": sum(count for name, count in counts.items() if name.startswith("fault:create:")),
            "read refused": counts["fault:query:5001"],
        })  # fmt: skip


def settings_in(environment: dict[str, str]) -> config.Settings:
    """The settings that the processes have, for the part of the work that is done in this one."""
    prefix = config.PREFIX
    mine = {name.removeprefix(prefix).lower(): value for name, value in environment.items() if name.startswith(prefix)}
    return config.load(**mine)


def knobs(seed: int) -> Knobs:
    """A provider that gets everything wrong that the protocol lets it: each at least once, then by chance."""
    return Knobs(
        seed=seed,
        picture_bytes=PICTURE_BYTES,
        submitted_seconds=0.4,
        processing_seconds=0.8,
        delay_jitter=0.5,
        callback_drop_rate=0.3,
        callback_duplicates=5,
        callback_reorder=True,
        callback_tries=CALLBACK_TRIES,
        callback_backoff_seconds=0.3,
        create_faults=["5000:created", "5002"],
        create_fault_rate=0.1,
        query_faults=["5001"],
        query_503_rate=0.1,
        cdn_faults=["503", "truncated", "truncated_chunked", "truncated_silent"],
        cdn_503_rate=0.1,
        cdn_truncated_rate=0.05,
        cdn_truncated_chunked_rate=0.05,
        cdn_truncated_silent_rate=0.03,
    )
