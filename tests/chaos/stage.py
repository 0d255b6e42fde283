"""Everything that runs in a campaign: the product's processes, the provider, the store, the database."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from receiver.sandbox import Knobs
from tests.chaos.plan import LEASE_SECONDS, Plan
from tests.chaos.store import ChaosStore
from tests.running_product import Scene

PICTURE_BYTES = 20_000
CALLBACK_TRIES = 4


class Stage(Scene):
    """All servers of a campaign, with faults between worker and store."""

    def __init__(self, plan: Plan, folder: Path, postgres_data: Path | None = None) -> None:
        super().__init__(folder, postgres_data)
        self.plan = plan

    def _build(self) -> None:
        self.start_servers(self.plan.database, knobs(self.plan.seed))
        self.store = self.stack.enter_context(ChaosStore(self.seaweed, self.plan.seed))
        self.start_processes(
            self.plan.workers,
            store_url=self.store.endpoint_url,
            RECEIVER_WORKER_THREADS="4",
            RECEIVER_LEASE_SECONDS=str(LEASE_SECONDS),
            RECEIVER_GRACE_SECONDS="5",
            RECEIVER_POLL_AFTER_SECONDS="1",
            RECEIVER_POLL_MAX_SECONDS="8",
        )

    def calm(self) -> None:
        """Start no fault from now on."""
        self.store.is_calm = True
        still = {name: value for name, value in Knobs().model_dump().items() if name.startswith(("cdn_", "query_"))}
        self.sandbox.set(**still, create_faults=[], create_fault_rate=0, balance=None)

    def counts(self) -> Counter[str]:
        """How often each random fault of store and provider happened."""
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
            "callback without its body": sum(not callback.body for callback in ends),
            "callback that offers HTTP/2": len(ends),
            "download 503": counts["fault:cdn:503"],
            "download an error page": counts["fault:cdn:html"],
            "download empty": counts["fault:cdn:empty"],
            "download redirected to itself": counts["fault:cdn:self_redirect"],
            "download truncated": sum(counts[f"fault:cdn:{kind}"] for kind in truncated),
            "create in doubt": sum(count for name, count in counts.items() if name.startswith("fault:create:")),
            "read refused": counts["fault:query:5001"],
        })  # fmt: skip


def knobs(seed: int) -> Knobs:
    """A provider with every fault that the protocol allows: each at least once, then by chance."""
    return Knobs(
        seed=seed,
        picture_bytes=PICTURE_BYTES,
        submitted_seconds=0.4,
        processing_seconds=0.8,
        delay_jitter=0.5,
        callback_drop_rate=0.3,
        callback_duplicates=5,
        callback_reorder=True,
        callback_empty_rate=0.1,
        callback_offers_http2=True,
        callback_tries=CALLBACK_TRIES,
        callback_backoff_seconds=0.3,
        create_faults=["5000:created", "5002"],
        create_fault_rate=0.1,
        query_faults=["5001"],
        query_503_rate=0.1,
        cdn_faults=["503", "truncated", "truncated_chunked", "truncated_silent", "html", "empty", "self_redirect"],
        cdn_503_rate=0.1,
        cdn_truncated_rate=0.05,
        cdn_truncated_chunked_rate=0.05,
        cdn_truncated_silent_rate=0.03,
        cdn_html_rate=0.03,
        cdn_empty_rate=0.02,
        cdn_self_redirect_rate=0.02,
    )
