"""`receiver reconcile --wait`: do the reads that were made due, in this process, and report the result of each."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from datetime import datetime

from sqlmodel import col, select

from receiver.tasks.changes import Tally
from receiver.tasks.operate import Reads
from receiver.workers.lanes import Lane
from receiver.workers.worker import Worker
from storage.database.sessions import Database
from storage.operations import maintenance
from storage.rows.models import Task
from storage.states import Step

# The wait ends when no read has ended for this long. One read takes up to 60 s.
STUCK_SECONDS = 120.0
POLL_INTERVAL_SECONDS = 0.1
# A task counts as not read after this many tries without an answer.
TRIES = 3


def read_now(database: Database, lane: Lane, reads: Reads, *, lease_seconds: float) -> Tally:
    """Do these reads until each one has been answered or has failed. Other workers may do some of them.

    `lane`: the worker's lane of reads. Returns the number of answered reads; `left` has the reason for each other task.
    """
    tally = Tally()
    worker = Worker(database, [lane], lease_seconds=lease_seconds, grace_seconds=0)
    waiting, progress_at = reads.ids, time.monotonic()
    while waiting and time.monotonic() < progress_at + STUCK_SECONDS:
        before = len(waiting)
        if not worker.run_until_idle():
            time.sleep(POLL_INTERVAL_SECONDS)
        waiting = _count_ended(database, tally, waiting, reads.since)
        progress_at = time.monotonic() if len(waiting) < before else progress_at
    for task_id in waiting:
        tally.left[str(task_id)] = f"no answer within {STUCK_SECONDS:g} s; run the command again"
    return tally


def _count_ended(database: Database, tally: Tally, ids: Sequence[uuid.UUID], since: datetime) -> list[uuid.UUID]:
    """Count the tasks whose read has ended. Returns the others."""
    waiting = []
    for start in range(0, len(ids), maintenance.BATCH):
        with database.read() as session:
            found = session.exec(select(Task).where(col(Task.id).in_(ids[start : start + maintenance.BATCH])))
            for task in found:
                if task.step is not Step.READ or (task.reported_at and task.reported_at >= since):
                    tally.counts["read"] += 1
                elif task.lease is None and task.attempts >= TRIES:
                    tally.left[task.external_task_id] = task.note or "it could not be read"
                else:
                    waiting.append(task.id)
    return waiting
