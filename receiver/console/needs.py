"""What needs a person now, each with one sentence, its meaning, and a link to its action."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlmodel import Session

from receiver.base.visible import short
from receiver.console.installation import Installation
from receiver.console.words import seconds
from storage.accounts import pauses
from storage.bucket.availability import NO_ANSWER_YET, BucketAvailability
from storage.operations import attention, heartbeats, outbox
from storage.operations.measures import Measures, at_most, measure

FRESH_SECONDS = 3.0  # Every page needs these numbers. Ten consoles share one query.
STORE_SECONDS = 0.1  # The longest that a page waits for the bucket, or for a write. The next page shows a later result.
SLOW_SECONDS = 2.0  # A store that has not answered for this long is called slow, also just after the start.
CHECK = "/console/settings#check"


class Need(NamedTuple):
    """`kind`: bad = work is lost or stopped; wait = it continues by itself later. `values`: for the sentence."""

    kind: str
    key: str
    link: str
    values: dict[str, Any]


class Standing(NamedTuple):
    """The state of the installation. `workers`: alive ones. `oldest`: seconds that the oldest due row has waited."""

    needs: list[Need]
    measures: Measures
    workers: int


class Needs:
    """Queries the rows, at most every three seconds and after each act of a person at this process."""

    def __init__(self, of: Installation) -> None:
        self._of = of
        self._store = BucketAvailability(of.bucket, max_wait_seconds=STORE_SECONDS)
        self._store.state()  # starts its background check
        self._writes = heartbeats.WriteCheck(of.database, max_wait_seconds=STORE_SECONDS)
        self._lock = threading.Lock()
        self._seen: tuple[float, int, Standing] | None = None
        self._acts = 0

    def now(self) -> Standing:
        """The current state. Raises DatabaseUnavailable."""
        with self._lock:
            now, acts = time.monotonic(), self._acts
            if self._seen is None or self._seen[1] != acts or now > self._seen[0] + FRESH_SECONDS:
                self._seen = now, acts, self._look()
            return self._seen[-1]

    def forget(self) -> None:
        """Query the rows again from now on, because a person acts. Waits for no query, whose result is too old now."""
        self._acts += 1

    def counts(self) -> dict[str, int]:
        """The numbers beside the names of pages."""
        stands = self.now()
        found = {each.key: each.values.get("n", 1) for each in stands.needs}
        return {
            "overview": len(stands.needs),
            "deliveries": found.get("unmatched", 0) + found.get("rejected", 0),
            "events": found.get("dead", 0),
            "archive": found.get("audit", 0),
        }

    def _look(self) -> Standing:
        workers = heartbeats.count_alive(self._of.database)
        with self._of.database.read() as session:
            found = measure(session, deadline_seconds=self._of.deadline_seconds, slots=self._of.slots, day=False)
            needs = list(self._needs(session, found, workers))
        return Standing(sorted(needs, key=lambda need: need.kind != "bad"), found, workers)

    def _needs(self, session: Session, found: Measures, workers: int) -> Iterator[Need]:
        for pause in pauses.every(session):
            values = {"account": pause.provider, "model": short(pause.model, 60), "said": short(pause.said)}
            yield Need("bad", "model" if pause.model else "account", "/console/tasks?state=created", values)
        state, waited = self._store.state(), self._store.unanswered_seconds()
        faults = {
            "store": "" if state in ("ok", NO_ANSWER_YET) else state,
            "room": self._of.database.shortage(),
            "database": "" if workers else self._writes.state(),
        }
        yield from (Need("bad", key, CHECK, {"reason": short(fault)}) for key, fault in faults.items() if fault)
        if waited > SLOW_SECONDS and not faults["store"]:
            yield Need("wait", "slow", "/console/archive", {"time": seconds(waited, "en")})
        held = {} if faults["store"] else found.store_waits
        for key, waits in (("provider", found.provider_waits), ("held", held)):
            for cause in list(waits)[:1]:
                yield Need("wait", key, CHECK, {"n": sum(waits.values()), "reason": short(cause)})
        if not workers and not faults["database"]:
            yield Need("bad", "workers", "/console/settings", {"due": at_most(found.due)})
        counts = (
            ("bad", "deadline", "tasks?files=expiring", found.deadline_near),
            ("bad", "failed", "tasks?files=failed", found.failed_assets),
            ("wait", "again", "tasks?files=waiting", max(0, attention.waiting_files(session) - sum(held.values()))),
            ("wait", "overdue", "tasks", at_most(found.overdue) if workers else 0),
            ("bad", "dead", "events?state=dead", found.events_dead),
            ("wait", "unmatched", "deliveries?state=unmatched", found.unmatched),
            ("wait", "rejected", "deliveries?state=refused", attention.refused_lately(session)),
            ("bad", "audit", "archive", found.audit_faults),
        )
        yield from (Need(kind, key, f"/console/{link}", {"n": n}) for kind, key, link, n in counts if n)
        for name, reason in ((sink, why) for sink, why in outbox.disabled(session).items() if sink in self._of.sinks):
            yield Need("bad", "disabled", "/console/events", {"sink": short(name, 40), "reason": short(reason)})
        for batch_id, name, open_tasks in attention.still_batches(session):
            yield Need("wait", "batch", f"/console/batches/{batch_id}", {"name": short(name, 60), "n": open_tasks})
