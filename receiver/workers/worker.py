"""One worker process: lanes of threads that claim due rows and work on them, until SIGTERM.

Each lane has a feeder thread that claims a row for each idle thread, or a few more (`Lane.ahead`). While it waits, the
transaction of this process that makes rows due claims them for it (`group_claims.py`). A thread works on
one row, or on one batch if the lane has batches. The work settles its own rows; the worker renews the leases of all
claimed rows (`leases.py`).

A worker without rows for a while is at rest: it checks for due rows less often, and keeps one idle connection. A commit
still wakes it at once.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import structlog

from receiver.workers.due_checks import QUEUED, DueChecks
from receiver.workers.group_claims import GroupClaims
from receiver.workers.in_hand import RowsInHand
from receiver.workers.lanes import Lane, PeriodicJob
from receiver.workers.leases import Leases
from receiver.workers.wake_ups import WakeUps
from storage.background import background_thread
from storage.circuit import PAUSE_CAP_SECONDS, Grant
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable, LostClaim, StoreUnavailable, UserError
from storage.operations import heartbeats
from storage.rows import claims

log = structlog.get_logger()

# The longest delay of work whose commit woke no worker, or that becomes due by time alone.
IDLE_SECONDS = 0.5
# The same at rest, which begins this long after the last row, so that a row that is due again soon is still found at
# once. Eight workers on PostgreSQL: 20 transactions a second and 49 connections without a rest, 8 and 17 with it.
REST_SECONDS, REST_AFTER_SECONDS = 2.0, 10.0
# Intervals until a waiting thread looks for itself, should no wake-up come. Two took a tenth of an idle worker's CPU.
MISSED_INTERVALS = 5
# Work that is not urgent waits this long for more of its kind, so that one transaction serves many rows.
CLAIM_PAUSE_SECONDS = 0.1
# Pictures take less. If files last longer, the spare threads look for others (see Lane.beside).
LASTING_SECONDS = 2.0
# Rows in quarantine (see claims.QUARANTINE_AFTER) are rare. The feeders' check has found any by then.
QUARANTINE_INTERVAL_SECONDS = 0.5
# The longest pause between two tries of a row that meets a bug. The next release may fix the bug.
BUG_CAP_SECONDS = 3_600.0
# The pause after an attempt that could not reach the database.
DATABASE_AWAY_SECONDS = 1.0
NOTHING = Grant(0)
QUARANTINE = "quarantine"  # the name of its thread's wait
RAISE_THE_LIMIT = "{}: raise the limit of processes or threads (pids_limit, TasksMax)"


class TooFewThreads(UserError):
    """The system refused a thread. The process is to end, since its other threads would wait for ever."""


class Worker:
    """Runs the lanes until it is stopped.

    `receiver work --once` calls `run_until_idle` and `run_quarantined`, which do the same work in the calling thread.
    """

    def __init__(
        self,
        database: Database,
        lanes: Sequence[Lane],
        *,
        lease_seconds: float,
        grace_seconds: float,
        periodic_jobs: Sequence[PeriodicJob] = (),
    ) -> None:
        database.outages.is_on = True
        self._database = database
        self._lanes = lanes
        self._periodic_jobs = periodic_jobs
        self._lease_seconds = lease_seconds
        self._grace_seconds = grace_seconds
        self._stop = threading.Event()
        self._wake_ups = WakeUps([lane.name for lane in lanes] + [job.name for job in periodic_jobs] + [QUARANTINE])
        self._unchecked = {QUARANTINE, *(lane.name for lane in lanes if lane.beside is not None)}
        self._interval = IDLE_SECONDS  # until the next wake-up, if no commit causes one
        looked_for = {job.name: job.due_if for job in periodic_jobs if job.due_if is not None}
        self._due_checks = DueChecks(database, [lane for lane in lanes if lane.beside is None], looked_for)
        self._in_hand = RowsInHand()
        self._leases = Leases(database, self._in_hand, lease_seconds)
        self._group_claims = GroupClaims(
            database, lanes, self._in_hand, self._wake_ups, self._leases.give_back, lease_seconds=lease_seconds
        )
        # By lane: how many consecutive claims were full. After one, the next claim is made without a check.
        self._full_claims = Counter[str]()
        self._alive = 1  # processes, this one included, at the last heartbeat
        self._ended = threading.Event()
        self._failure: Exception | None = None  # that ends this process

    def stop(self) -> None:
        """Claim no more rows. Those in hand may finish within the grace time."""
        self._stop.set()
        self._wake_ups.wake()

    def run(self) -> None:
        """Work until `stop()`. On return, unfinished rows are released, unless the database is down.

        Raises `TooFewThreads`, and a bug in the feeding of a lane.
        """
        if (registered := self._register()) is None:
            return
        self._id = registered
        self._run_logged("beat", self._beat_once)  # before the lanes start: some share their threads with others
        background = [self._wait_for_commits, self._beat, self._run_quarantine]
        threads = [threading.Thread(target=target, name=target.__name__, daemon=True) for target in background]
        threads += [threading.Thread(target=self._renew, args=(self._ended,), name="renew", daemon=True)]
        threads += [
            threading.Thread(target=self._run_periodic, args=(job,), daemon=True) for job in self._periodic_jobs
        ]
        feeders = [
            threading.Thread(target=self._feed_or_end, args=(lane,), name=f"feed-{lane.name}") for lane in self._lanes
        ]
        at_group_end = self._database.at_group_end
        self._database.at_group_end = lambda session: at_group_end(session) or self._group_claims.claim(session)
        try:
            for thread in [*threads, *feeders]:
                thread.start()
        except RuntimeError as error:
            self._failure = error
            self.stop()  # what the others have claimed is released below
        for thread in feeders:
            if thread.ident is not None:
                thread.join()
        try:
            self._drain()
        except DatabaseUnavailable as error:
            log.debug("worker.database_not_reached", error=str(error))
        finally:
            self._database.at_group_end = at_group_end
            self._ended.set()
        if isinstance(self._failure, RuntimeError):
            raise TooFewThreads(RAISE_THE_LIMIT.format(self._failure)) from self._failure
        if self._failure is not None:
            raise self._failure

    def _register(self, own: uuid.UUID | None = None) -> uuid.UUID | None:
        """Register this process as soon as the database answers. None: the worker was stopped before."""
        while not self._stop.is_set():
            try:
                return heartbeats.register(self._database, sum(lane.threads for lane in self._lanes), own)
            except DatabaseUnavailable as error:
                log.debug("worker.database_not_reached", job="register", error=str(error))
            self._stop.wait(DATABASE_AWAY_SECONDS)
        return None

    def run_until_idle(self) -> int:
        """Work on everything that is due now, one row or batch at a time. Returns the number of rows.

        Rows in quarantine are left to `run_quarantined`.
        """
        with background_thread("renew", self._renew):
            return sum(iter(self._work_on_next, 0))

    def _work_on_next(self) -> int:
        """Work on one row or batch that is due. Returns the number of rows."""
        self._due_checks.check()
        for lane in self._due_checks.lanes:  # no other row is in hand, so no lane beside slow files has work
            rows, grant = self._claim_granted(lane, 1)
            if rows:
                self._work(lane, rows, grant)
                return len(rows)
        return 0

    def run_quarantined(self) -> int:
        """Work on one row in quarantine of each lane, and on nothing else meanwhile. Returns the number of rows."""
        with background_thread("renew", self._renew):
            return self._work_on_quarantined()

    def _claim_granted(self, lane: Lane, batches: int) -> tuple[list[Any], Grant]:
        """Claim the due rows of that many batches if the circuit permits. The grant ends with the work on them."""
        if lane.beside is not None:
            conditions = lane.beside(self._in_hand.lasting(lane.model, LASTING_SECONDS))
            if conditions is None:
                return [], NOTHING
            lane = replace(lane, where=(*lane.where, *conditions))
        elif not self._full_claims[lane.name] and not self._due_checks.is_any(lane.name):
            if lane.slots is None or not self._due_checks.is_any(lane.name + QUEUED):
                return [], NOTHING
            with self._database.read() as session:
                if not lane.slots.is_any_next(session):
                    return [], NOTHING
        grant, rows = lane.circuit.grant(batches * lane.batch()), list[Any]()
        try:
            rows = self._claim(lane, grant.count) if grant.count else rows
        finally:
            if not rows:
                grant.give_back()
        self._full_claims[lane.name] = self._full_claims[lane.name] + 1 if rows and len(rows) == grant.count else 0
        return rows, grant

    def _claim(self, lane: Lane, limit: int, *, alone: bool = False) -> list[Any]:
        with self._in_hand.claiming(alone=alone) as is_permitted:
            if not is_permitted:
                return []
            claim = partial(
                claims.claim, model=lane.model, limit=limit, lease_seconds=self._lease_seconds, alone=alone,
                in_turn=lane.circuit.is_open, where=lane.where,
            )  # fmt: skip
            if lane.slots is None or alone:
                rows = self._database.write_in_group(claim)
            else:  # may wait for the account's row
                with self._database.write() as session:
                    lane.slots.admit(session, limit)
                    rows = claim(session)
            self._in_hand.add(rows)
        return rows

    def _feed_or_end(self, lane: Lane) -> None:
        """Feed the lane, or end this process: without its feeder the lane would hold its rows and claim no more."""
        try:
            self._feed(lane)
        except Exception as error:  # noqa: BLE001 - `run` raises it
            self._failure = error
            self.stop()
            self._leases.give_back(self._in_hand.not_begun)

    def _feed(self, lane: Lane) -> None:
        batches = lane.batches
        pool = ThreadPoolExecutor(lane.threads + batches.most_lent, thread_name_prefix=lane.name)
        while not self._stop.is_set():
            self._wake_ups.begin(lane.name)
            room = batches.wait_for_room(lane.threads_of(self._alive), self._ahead(lane), IDLE_SECONDS)
            if rows := self._group_claims.take(lane):
                claimed, grant = lane.batches_of(rows), NOTHING
            else:
                claimed, grant = self._claim_batches(lane, room)
            for rows in claimed:
                batches.add(rows, partial(pool.submit, self._work_in_place, lane, rows, grant))
            self._leases.give_back(batches.take_back(LASTING_SECONDS))
            if room > len(claimed):
                self._group_claims.want(lane, (room - len(claimed)) * lane.batch())
            if room and not claimed:
                self._wait_for_work(lane.name)
            self._stop.wait(lane.claim_pause_seconds)
        self._leases.give_back(batches.take_back())
        self._group_claims.end(lane)
        pool.shutdown(wait=False)

    def _ahead(self, lane: Lane) -> int:
        """How many rows beyond its threads the lane may hold now.

        None until two consecutive claims were full (idle workers come first) or for a trial, fewer behind slow files.
        """
        if not lane.ahead or self._full_claims[lane.name] < 2 or lane.circuit.is_open:
            return 0
        return max(lane.ahead - len(self._in_hand.lasting(lane.model, LASTING_SECONDS)), 0)

    def _work_in_place(self, lane: Lane, rows: list[Any], grant: Grant) -> None:
        """Work on these rows, or release them if the worker stops, and give back the place of their batch."""
        try:
            if self._stop.is_set():
                self._leases.give_back(rows)
            else:
                self._work(lane, rows, grant)
        finally:
            lane.batches.end()

    def _claim_batches(self, lane: Lane, room: int) -> tuple[list[list[Any]], Grant]:
        """Claim at most this many batches, of one row or of several each."""
        if not room or self._stop.is_set():
            return [], NOTHING
        try:
            rows, grant = self._claim_granted(lane, room)
            return lane.batches_of(rows), grant
        except DatabaseUnavailable as error:
            log.debug("worker.database_not_reached", lane=lane.name, error=str(error))
        except Exception:
            log.exception("worker.step_failed", lane=lane.name)
        self._stop.wait(DATABASE_AWAY_SECONDS)
        return [], NOTHING

    def _work(self, lane: Lane, rows: list[Any], grant: Grant) -> None:
        """Call the lane's work."""
        self._in_hand.add(rows, begun_at=time.monotonic())
        try:
            if lane.work_many and len(rows) > 1:
                lane.work_many(rows)
            else:
                lane.work(*rows)
        except Exception as error:  # noqa: BLE001 - logged there
            self._put_off(lane, rows, error)
        finally:
            self._in_hand.remove(rows)
            if grant.give_back():
                self._wake_ups.wake()  # the next trial may start at once

    def _put_off(self, lane: Lane, rows: list[Any], error: Exception) -> None:
        """Settle rows that met a bug, and keep those that could not reach the database. Lost ones are left alone."""
        ids = [str(row.id) for row in rows]
        try:
            if isinstance(error, DatabaseUnavailable):
                raise error
            log.error("worker.step_failed", lane=lane.name, rows=ids, exc_info=error)
            for row in rows:
                with suppress(LostClaim), self._database.write() as session:
                    claims.settle(session, row, due_in=claims.backoff(row.attempts, cap=BUG_CAP_SECONDS))
        except DatabaseUnavailable as away:
            log.debug("worker.database_not_reached", lane=lane.name, rows=ids, error=str(away))
            self._leases.note_unsettled(rows)

    def _wait_for_work(self, name: str) -> None:
        if not self._stop.is_set():
            self._wake_ups.wait(name, MISSED_INTERVALS * self._interval)

    def _wake_those_with_rows(self) -> None:
        """Make one check for all lanes. Wake the lanes with rows, and those that the check does not cover."""
        with self._database.sessions.untested():  # a check that fails is soon made again
            due = self._due_checks.check()
        # At rest no row is in hand, so no lane beside slow files has work.
        self._wake_ups.wake(due | ({QUARANTINE} if self._interval == REST_SECONDS else self._unchecked))

    def _wait_for_commits(self) -> None:
        """Wake feeders that have rows after each commit, and at intervals. Without it they only poll."""
        waker = self._database.waker()
        while not self._stop.is_set():
            has_heard = waker.wait(self._interval)
            is_at_rest = not has_heard and self._in_hand.empty_for() > REST_AFTER_SECONDS
            self._interval = REST_SECONDS if is_at_rest else IDLE_SECONDS
            self._run_logged("check", self._wake_those_with_rows)
            if is_at_rest:
                self._database.close_idle()
        waker.close()

    def _renew(self, ended: threading.Event) -> None:
        """Renew the leases of all rows in hand, also while draining, and release rows that could not be settled."""
        while not ended.wait(self._lease_seconds / 3):
            self._run_logged("renew", self._leases.renew)
            self._run_logged("hand_back", self._leases.release_unsettled)

    def _run_logged(self, job: str, run: Callable[[], object]) -> None:
        """Run a job and log any error, so that its thread continues."""
        try:
            run()
        except DatabaseUnavailable as error:
            log.debug("worker.database_not_reached", job=job, error=str(error))
        except StoreUnavailable as error:
            log.warning("worker.store_not_reached", job=job, error=str(error))
        except Exception:
            log.exception("worker.step_failed", job=job)

    def _beat(self) -> None:
        while not self._ended.wait(heartbeats.BEAT_SECONDS):
            self._run_logged("beat", self._beat_once)

    def _beat_once(self) -> None:
        self._alive = heartbeats.beat(self._database, self._id)
        if not self._alive:  # a failover or a restore lost the row, or another worker removed it after a day
            self._register(self._id)

    def _run_periodic(self, job: PeriodicJob) -> None:
        while not self._stop.is_set():
            self._wake_ups.begin(job.name)
            if job.due_if is None:
                self._run_logged(job.name, job.run)
                self._stop.wait(job.every_seconds)
                continue
            self._run_logged(job.name, lambda: self._due_checks.is_any(job.name) and job.run())
            self._wait_for_work(job.name)
            self._stop.wait(CLAIM_PAUSE_SECONDS)

    def _run_quarantine(self) -> None:
        while not self._stop.is_set():
            self._wake_ups.begin(QUARANTINE)
            if self._interval == REST_SECONDS:
                self._wait_for_work(QUARANTINE)
            else:
                self._stop.wait(QUARANTINE_INTERVAL_SECONDS)
            if not self._stop.is_set():
                self._run_logged("quarantine", self._work_on_quarantined)

    def _work_on_quarantined(self) -> int:
        """Work on one row in quarantine of each lane while this process does nothing else.

        The circuits are checked before anything is stopped. The trial of an open circuit is left to other rows, which
        stop nothing, unless none has taken it for the longest pause.
        """
        waiting = self._due_checks.quarantined_lanes()
        with ExitStack() as granted:
            trials = [lane.circuit.grant(1, left_for_seconds=PAUSE_CAP_SECONDS) for lane in waiting]
            lanes = [lane for lane, grant in zip(waiting, trials, strict=True) if granted.enter_context(grant).count]
            if not lanes:
                return 0
            with self._in_hand.quarantine(self._stop):
                done = sum(map(self._work_on_one_quarantined, lanes))
        self._wake_ups.wake()
        return done

    def _work_on_one_quarantined(self, lane: Lane) -> int:
        if self._stop.is_set():
            return 0  # other rows are still in hand, and this row may end the process
        rows = self._claim(lane, 1, alone=True)
        for row in rows:
            log.warning("worker.row_quarantined", lane=lane.name, row=str(row.id), losses=row.losses)
            self._work(lane, [row], NOTHING)
        return len(rows)

    def _drain(self) -> None:
        self._in_hand.wait_until_empty(self._grace_seconds)
        released = self._leases.release_all()
        heartbeats.unregister(self._database, self._id)
        log.info("worker.stopped", handed_back=released)
