"""What a worker does: its lanes, one for each kind of row, and its periodic jobs. `receiver work --once` runs these.

A task's step decides its lane. Threads and intervals are set here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from sqlmodel import col

import receiver
from receiver.events.dispatcher import Dispatcher, Sink
from receiver.gateway import client_callback
from receiver.tasks.apply_deliveries import BATCH, DeliveryApplier
from receiver.tasks.reconcile import Reader, UnmatchedDeliveries
from receiver.workers import clock_steps
from receiver.workers.lanes import Batches, Lane, PeriodicJob, together
from receiver.workers.worker import CLAIM_PAUSE_SECONDS
from storage.accounts import idempotency
from storage.accounts.slots import give_back_silent
from storage.archive import continuous_audit, slow_hosts
from storage.archive.archiver import Archiver
from storage.archive.folders import sweep_uploads
from storage.archive.manifest import Finisher
from storage.circuit import Circuit
from storage.operations import deadlines, outbox
from storage.rows.models import Asset, Callback, Dispatch, Task
from storage.states import CallbackState, Step

if TYPE_CHECKING:
    from receiver.app.wiring import Parts

# Deliveries are short work on one database: two threads keep it busy, because one works while the other commits.
CALLBACK_THREADS = 2
# A create or a read waits up to 20 s for the provider. Four at once stay below its 5 reads a second. Creates have four
# in all processes together, because an account that is refused fails all that are under way.
TASK_THREADS = 4
# Files are claimed ahead for one of this many threads. A claim then serves four of eight threads instead of two, and a
# worker holds back few files from others.
AHEAD_SHARE = 2
# Small files that wait for a commit, or come back from one, for each download. With two instead of one a busy machine
# archived a fifth more small pictures a second, with 3 % less CPU each.
LENT_SHARE = 2
# The most threads of a sink.
SINK_THREADS = 8
# The shortest interval between two checks by the spare archive threads.
SPARE_CLAIM_PAUSE_SECONDS = 1.0
# Threads of a worker beside those of its lanes: a feeder for each of the seven lanes that belong to no sink, eight
# periodic jobs, wake-up call, heartbeat, quarantine, lease renewal, checkpoints, group writer. The rest is reserve.
OTHER_THREADS = 24

# A client's `Idempotency-Key` is kept for a day. Its row is small, so an hour more does not matter.
IDEMPOTENCY_INTERVAL_SECONDS = 3_600.0
# Deadlines are hours away. A check costs one index look-up.
DEADLINE_INTERVAL_SECONDS = 60.0
# Four reads of the due indexes: 28 to 33 ms of CPU where each of four tables has 100,000 waiting rows.
CLOCK_INTERVAL_SECONDS = 60.0
# Unfinished uploads are aborted after a day. A check lists the bucket.
UPLOADS_INTERVAL_SECONDS = 6 * 3_600.0
# A task counts as silent after 24 h. A check costs a look-up in the index of held slots.
SILENT_INTERVAL_SECONDS = 60.0
# The longest time until an event is numbered. A commit that wakes the workers numbers its events at once.
SEQUENCE_INTERVAL_SECONDS = 0.5
# The audit's own row says when its next step is due; a check reads that row.
AUDIT_INTERVAL_SECONDS = 1.0
# While the audit is off, each worker deletes the audit's state at its start and once a day.
AUDIT_OFF_INTERVAL_SECONDS = 86_400.0


# The same objects for each worker: the statement of a claim is built and compiled once for its lane's conditions.
_RECEIVED, _UNMATCHED = (col(Callback.state) == state for state in (CallbackState.RECEIVED, CallbackState.UNMATCHED))
_STEPS = {step: col(Task.step) == step for step in Step}


@cache
def _of_sink(name: str) -> Any:
    return col(Dispatch.sink) == name


def lanes(parts: Parts) -> Sequence[Lane]:
    """The lanes of one worker process. The store's lanes share a circuit, and so do the provider's."""
    applier = DeliveryApplier(parts.database, parts.providers, parts.schedule, parts.confirmation)
    reader = Reader(parts.database, parts.providers, parts.schedule, parts.read_rate_limit)
    finder = UnmatchedDeliveries(parts.database, parts.providers, parts.schedule, parts.read_rate_limit)
    store, provider = Circuit(), parts.provider_circuit
    finisher = Finisher(parts.database, parts.bucket, parts.schedule, version=receiver.__version__, circuit=store)
    return (
        Lane(
            "callbacks", Callback, applier.work, CALLBACK_THREADS, (_RECEIVED,), work_many=together(applier.begin),
            batch=lambda: BATCH,
        ),
        Lane(
            "unmatched", Callback, finder.work, 1, (_UNMATCHED,), circuit=provider, work_many=together(finder.begin),
            batch=lambda: BATCH,
        ),
        Lane(
            "creates", Task, parts.submitter.create_step.work, TASK_THREADS, (_STEPS[Step.CREATE],), circuit=provider,
            slots=parts.slots, is_shared=True,
        ),
        Lane(
            "reads", Task, reader.work, TASK_THREADS, (_STEPS[Step.READ],), circuit=provider,
            work_many=reader.work_many, batch=reader.batch,
        ),
        Lane("finishes", Task, finisher.work, CALLBACK_THREADS, (_STEPS[Step.FINISH],), circuit=store),
        *_asset_lanes(parts, store),
        *(_sink_lane(parts, name, sink) for name, sink in parts.sinks.items()),
    )  # fmt: skip


def _asset_lanes(parts: Parts, circuit: Circuit) -> Sequence[Lane]:
    """The lane of the files, and the spare threads that slow hosts cannot take."""
    threads = parts.settings.worker_threads
    archiver = partial(
        Archiver, parts.database, parts.bucket, parts.fetcher, parts.schedule, spool_dir=parts.settings.spool_dir,
        circuit=circuit,
    )  # fmt: skip
    other_hosts, batches = slow_hosts.OtherHosts(parts.database, threads), Batches(most_lent=LENT_SHARE * threads)
    return (
        Lane(
            "assets", Asset, archiver(waiting=batches.lent).work, threads, circuit=circuit,
            ahead=threads // AHEAD_SHARE, batches=batches,
        ),
        Lane(
            "assets-spare", Asset, partial(other_hosts.work, archiver()), slow_hosts.spare_threads(threads),
            circuit=circuit, claim_pause_seconds=SPARE_CLAIM_PAUSE_SECONDS, beside=other_hosts.conditions,
        ),
    )  # fmt: skip


def _sink_lane(parts: Parts, name: str, sink: Sink) -> Lane:
    """One lane for each sink: a slow or unreachable sink does not delay the others."""
    circuit = None if name == client_callback.NAME else Circuit()
    dispatcher = Dispatcher(
        parts.database, name, sink, parts.envelope, retry_seconds=parts.settings.event_retry_seconds, circuit=circuit
    )
    return Lane(
        f"events-{name}", Dispatch, dispatcher.work, sink.threads, (_of_sink(name),),
        circuit=circuit or Circuit(), work_many=dispatcher.work_many, batch=lambda: sink.batch,
        claim_pause_seconds=CLAIM_PAUSE_SECONDS,
    )  # fmt: skip


def periodic_jobs(parts: Parts) -> Sequence[PeriodicJob]:
    """The jobs that every worker process runs at intervals."""
    database = parts.database
    lead = deadlines.lead_seconds(parts.settings.result_lifetime_seconds)
    return (
        PeriodicJob("idempotency keys", IDEMPOTENCY_INTERVAL_SECONDS, lambda: idempotency.prune_all(database)),
        PeriodicJob("deadlines", DEADLINE_INTERVAL_SECONDS, lambda: deadlines.announce(database, lead)),
        PeriodicJob("uploads", UPLOADS_INTERVAL_SECONDS, lambda: sweep_uploads(parts.bucket)),
        PeriodicJob("silent", SILENT_INTERVAL_SECONDS, lambda: give_back_silent(database)),
        PeriodicJob("sequence", SEQUENCE_INTERVAL_SECONDS, parts.sequence, due_if=outbox.UNSEQUENCED),
        PeriodicJob("clock steps", CLOCK_INTERVAL_SECONDS, lambda: mend_due_times(parts)),
        PeriodicJob("disabled sinks", DEADLINE_INTERVAL_SECONDS, lambda: outbox.end_disabled(database)),
        _audit_job(parts),
    )


def mend_due_times(parts: Parts) -> int:
    """Make the rows due whose times were set by a clock that was ahead. Returns how many."""
    chosen, schedule = parts.settings, parts.schedule
    polls = max(schedule.poll_after_seconds, schedule.poll_max_seconds)
    waits = clock_steps.longest(
        lease_seconds=chosen.lease_seconds, poll_seconds=polls, event_retry_seconds=chosen.event_retry_seconds
    )
    return clock_steps.mend(parts.database, waits, chosen.lease_seconds)


def _audit_job(parts: Parts) -> PeriodicJob:
    chosen = parts.settings
    if chosen.audit_days is None:
        return PeriodicJob("audit", AUDIT_OFF_INTERVAL_SECONDS, lambda: continuous_audit.forget(parts.database))
    audit = continuous_audit.ContinuousAudit(
        parts.database, parts.bucket, days=chosen.audit_days, bytes_per_second=chosen.audit_bytes_per_second,
        lease_seconds=chosen.lease_seconds,
    )  # fmt: skip
    return PeriodicJob("audit", AUDIT_INTERVAL_SECONDS, audit.run)
