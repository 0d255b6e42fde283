"""What needs a person now: each with one sentence, its meaning, and a link to its action."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import func, union_all
from sqlmodel import Session, col, select

from receiver.console.installation import Installation
from receiver.console.words import seconds, short
from storage.accounts import pauses
from storage.bucket.availability import NO_ANSWER_YET, BucketAvailability
from storage.operations import heartbeats, outbox
from storage.operations.lists import REFUSED, waiting_files
from storage.operations.measures import Measures, measure
from storage.rows import tasks
from storage.rows.models import Batch, Callback, Task
from storage.states import Step

# Every page needs these numbers. Ten consoles share one query.
FRESH_SECONDS = 3.0
STORE_SECONDS = 0.1  # a page waits so long for the bucket; the next one shows what came later
# A store that has not answered for this long is called slow, also on the first page after the start.
SLOW_SECONDS = 2.0
# A batch of which no task has ended for this long counts as stopped.
STILL = timedelta(minutes=30)
SHOWN_BATCHES = 3
MANY = 10_000


class Need(NamedTuple):
    """`kind`: bad = work is lost or stopped; wait = it goes on by itself later. `values`: for the sentence."""

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
    """Queries the rows, at most every three seconds."""

    def __init__(self, of: Installation) -> None:
        self._of = of
        self._store = BucketAvailability(of.bucket, max_wait_seconds=STORE_SECONDS)
        self._store.state()  # begins to ask
        self._lock = threading.Lock()
        self._seen: tuple[float, Standing] | None = None

    def now(self) -> Standing:
        """The current state. Raises DatabaseUnavailable."""
        with self._lock:
            if self._seen is None or time.monotonic() > self._seen[0] + FRESH_SECONDS:
                self._seen = time.monotonic(), self._look()
            return self._seen[1]

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
        if state not in ("ok", NO_ANSWER_YET):
            yield Need("bad", "store", "/console/archive", {"reason": short(state)})
        elif waited > SLOW_SECONDS:
            yield Need("wait", "slow", "/console/archive", {"time": seconds(waited)})
        if not workers:
            yield Need("bad", "workers", "/console/settings", {"due": found.due})
        if found.deadline_near:
            yield Need("bad", "deadline", "/console/tasks?files=expiring", {"n": found.deadline_near})
        if found.failed_assets:
            yield Need("bad", "failed", "/console/tasks?files=failed", {"n": found.failed_assets})
        if count := session.execute(select(func.count()).select_from(waiting_files().subquery())).scalar_one():
            yield Need("wait", "again", "/console/tasks?files=waiting", {"n": count})
        if found.overdue and workers:
            yield Need("wait", "overdue", "/console/tasks", {"n": found.overdue})
        if found.events_dead:
            yield Need("bad", "dead", "/console/events?state=dead", {"n": found.events_dead})
        for name, reason in outbox.disabled(session).items():
            yield Need("bad", "disabled", "/console/events", {"sink": short(name, 40), "reason": short(reason)})
        if found.unmatched:
            yield Need("wait", "unmatched", "/console/deliveries?state=unmatched", {"n": found.unmatched})
        if count := _rejected(session):
            yield Need("wait", "rejected", "/console/deliveries?state=refused", {"n": count})
        if found.audit_faults:
            yield Need("bad", "audit", "/console/archive", {"n": found.audit_faults})
        for batch_id, name, open_tasks in _still(session):
            yield Need("wait", "batch", f"/console/batches/{batch_id}", {"name": short(name, 60), "n": open_tasks})


def _rejected(session: Session) -> int:
    """Deliveries that were refused within a day."""
    recent = col(Callback.received_at) > tasks.now(session) - timedelta(days=1)
    newest = select(Callback.state).where(recent).order_by(col(Callback.received_at).desc()).limit(MANY).subquery()
    refused = newest.c.state.in_(REFUSED)
    return session.execute(select(func.count()).select_from(newest).where(refused)).scalar_one() or 0


def _still(session: Session) -> Iterator[tuple[uuid.UUID, str, int]]:
    """Batches with waiting tasks of which none has ended lately. Reads the waiting ones, and the last end of a few."""
    waits = (col(Task.step).in_(Step) & col(Task.due_at).is_not(None), col(Task.queued_at).is_not(None))
    found = select(Task.batch_id).where(col(Task.batch_id).is_not(None)).limit(MANY)
    # Apart, because for one condition with "or" SQLite reads the whole table: 0.3 s beside a million tasks.
    parts = [found.where(each).subquery() for each in waits]
    some = union_all(*(select(part.c.batch_id) for part in parts)).subquery()
    counted = select(some.c.batch_id, func.count()).group_by(some.c.batch_id).limit(SHOWN_BATCHES)
    long_ago = tasks.now(session) - STILL
    for batch_id, count in session.execute(counted).all():
        batch = session.get_one(Batch, batch_id)
        last = session.execute(select(func.max(Task.completed_at)).where(Task.batch_id == batch_id)).scalar()
        if max(batch.created_at, last or batch.created_at) < long_ago:
            yield batch.id, batch.name, count
