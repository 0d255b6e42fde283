"""Worker process: lanes of threads that claim due rows and work on them, leases renewed, drained on SIGTERM.

Each lane has one feeder that claims as many rows as its threads are idle, and threads that work on one row each, or
on one batch of rows where a lane can. A step settles its own row; the loop is dumb.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from receiver.app.in_hand import RowsInHand, claims_of
from storage.accounts.slots import Slots
from storage.background import background_thread
from storage.circuit import PAUSE_CAP_SECONDS, Circuit, Grant
from storage.errors import DatabaseUnavailable, LostClaim, StoreUnavailable
from storage.operations import heartbeats
from storage.rows import claims
from storage.rows.database import Database

log = structlog.get_logger()

# The safety net under the wake-up call, and how late a row may be that becomes due by time alone.
IDLE_SECONDS = 0.5
# What is not urgent waits this long for more of its kind: one transaction then serves many.
LINGER_SECONDS = 0.1
# Suspects (see claims.QUARANTINE_AFTER) are rare: looking once a second costs one index look-up.
QUARANTINE_INTERVAL_SECONDS = 1.0
# A bug is retried with this cap: loud in the log, and cured by the next release without anyone's help.
BUG_CAP_SECONDS = 3_600.0
# Frees a worker from a database that is away without spinning.
DATABASE_AWAY_SECONDS = 1.0


NOTHING = Grant(0)


@dataclass(frozen=True)
class Lane:
    """One kind of work: rows of `model` for which `where` holds, `threads` at a time, each handed to `work`.

    `work_many`: takes up to `batch()` rows at once; a row that comes alone goes to `work`. `linger_seconds`: between
    claims, so that one transaction serves many rows where a moment does not matter.
    """

    name: str
    model: Any
    work: Callable[[Any], None]
    threads: int
    where: Sequence[Any] = ()
    circuit: Circuit | None = None  # of the store or provider that the work needs: open = nothing is claimed
    work_many: Callable[[list[Any]], None] | None = None
    batch: Callable[[], int] = lambda: 1
    linger_seconds: float = 0
    slots: Slots | None = None  # what its rows may be queued for: they are admitted where they are claimed


@dataclass(frozen=True)
class PeriodicJob:
    """Something to look after now and then. Every worker process does it: several at once must be harmless.

    `wakes`: also soon after a commit.
    """

    name: str
    every_seconds: float
    run: Callable[[], object]
    wakes: bool = False


class Worker:
    """Runs the lanes until stopped. `run_until_idle` is the same work in the calling thread, for tests and `--once`."""

    def __init__(
        self,
        database: Database,
        lanes: Sequence[Lane],
        *,
        lease_seconds: float,
        grace_seconds: float,
        periodic_jobs: Sequence[PeriodicJob] = (),
    ) -> None:
        self._database = database
        self._lanes = lanes
        self._periodic_jobs = periodic_jobs
        self._lease_seconds = lease_seconds
        self._grace_seconds = grace_seconds
        self._stop = threading.Event()
        self._wake = threading.Condition()
        self._commits = 0
        self._in_hand = RowsInHand()
        self._stranded: list[Any] = []
        self._ended = threading.Event()

    def stop(self) -> None:
        """Take no more rows; finish those in hand within the grace time."""
        self._stop.set()
        self._alert()

    def run(self) -> None:
        """Work until `stop()`. On return no row is held: the unfinished ones were handed back."""
        registered = self._register()
        if registered is None:
            return
        self._id = registered
        background = [self._listen, self._beat, self._look_for_suspects]
        threads = [threading.Thread(target=target, name=target.__name__, daemon=True) for target in background]
        threads += [threading.Thread(target=self._renew, args=(self._ended,), name="renew", daemon=True)]
        threads += [
            threading.Thread(target=self._run_periodic, args=(job,), daemon=True) for job in self._periodic_jobs
        ]
        feeders = [threading.Thread(target=self._feed, args=(lane,), name=f"feed-{lane.name}") for lane in self._lanes]
        for thread in [*threads, *feeders]:
            thread.start()
        for thread in feeders:
            while thread.is_alive():
                thread.join(IDLE_SECONDS)  # wakes by itself: a signal may be taken by another thread than this one
        try:
            self._drain()
        except DatabaseUnavailable as error:
            log.warning("worker.database_away", error=str(error))
        finally:
            self._ended.set()

    def _register(self) -> uuid.UUID | None:
        """Announce this process, whenever the database is there. None: it was stopped before."""
        while not self._stop.is_set():
            try:
                return heartbeats.register(self._database, sum(lane.threads for lane in self._lanes))
            except DatabaseUnavailable as error:
                log.warning("worker.database_away", job="register", error=str(error))
            self._stop.wait(DATABASE_AWAY_SECONDS)
        return None

    def run_until_idle(self) -> int:
        """Work on everything that is due now, one row or batch at a time. Returns how many rows were worked on.

        Suspects are left to `run_suspects`.
        """
        with self._renewing():
            count = 0
            while done := next((done for lane in self._lanes if (done := self._work_once(lane))), 0):
                count += done
            return count

    def run_suspects(self) -> int:
        """Work on a suspect of each lane, a row that has ended three workers, and on nothing else. Returns how many."""
        with self._renewing():
            return self._work_on_suspects()

    def _renewing(self) -> AbstractContextManager[None]:
        """Extend the leases of what is in hand meanwhile, as `run` does."""
        return background_thread("renew", self._renew)

    def _work_once(self, lane: Lane) -> int:
        rows, grant = self._claim_granted(lane, lane.batch())
        if rows:
            self._do(lane, rows, grant)
        return len(rows)

    def _claim_granted(self, lane: Lane, wanted: int) -> tuple[list[Any], Grant]:
        """Due rows, as many as the lane's circuit lets start; the grant ends with the work on them."""
        if not self._is_any_due(lane):
            return [], NOTHING
        with ExitStack() as unless_claimed:
            grant = unless_claimed.enter_context(_grant(lane, wanted))
            rows = self._claim(lane, grant.count, in_turn=grant.is_trial) if grant.count else []
            if rows:
                unless_claimed.pop_all()
            return rows, grant

    def _claim(self, lane: Lane, limit: int, *, alone: bool = False, in_turn: bool = False) -> list[Any]:
        with self._in_hand.claiming(alone=alone) as may:
            if not may:
                return []
            with self._database.write() as session:
                if lane.slots is not None and not alone:
                    lane.slots.admit(session, limit)
                rows: list[Any] = claims.claim(
                    session, lane.model, limit=limit, lease_seconds=self._lease_seconds, alone=alone, in_turn=in_turn,
                    where=lane.where,
                )  # fmt: skip
            self._in_hand.take(rows)
        return rows

    def _is_any_due(self, lane: Lane) -> bool:
        with self._database.autocommit_reader() as connection:
            if claims.is_any_due(connection, lane.model, where=lane.where):
                return True
        if lane.slots is None:
            return False
        with self._database.read() as session:
            return lane.slots.is_any_next(session)

    def _feed(self, lane: Lane) -> None:
        idle = threading.Semaphore(lane.threads)
        pool = ThreadPoolExecutor(lane.threads, thread_name_prefix=lane.name)
        while not self._stop.is_set():
            seen = self._commits
            with _idle_threads(idle, lane.threads) as free:
                batches, grant = self._claim_batches(lane, len(free))
                is_idle = bool(free) and not batches
                for rows in batches:
                    free.pop()
                    pool.submit(self._do, lane, rows, grant).add_done_callback(lambda _: idle.release())
            if is_idle:
                self._sleep(seen)
            if lane.linger_seconds:
                self._stop.wait(lane.linger_seconds)
        pool.shutdown(wait=False)

    def _claim_batches(self, lane: Lane, free: int) -> tuple[list[list[Any]], Grant]:
        """Work for `free` idle threads: a row each, or a batch."""
        if not free or self._stop.is_set():
            return [], NOTHING
        size = lane.batch()
        rows, grant = self._claim_or_wait(lane, free * size)
        return [rows[start : start + size] for start in range(0, len(rows), size)], grant

    def _claim_or_wait(self, lane: Lane, wanted: int) -> tuple[list[Any], Grant]:
        try:
            return self._claim_granted(lane, wanted)
        except DatabaseUnavailable as error:
            log.warning("worker.database_away", lane=lane.name, error=str(error))
        except Exception:
            log.exception("worker.bug", lane=lane.name)
        self._stop.wait(DATABASE_AWAY_SECONDS)
        return [], NOTHING

    def _do(self, lane: Lane, rows: list[Any], grant: Grant) -> None:
        ids, held = [str(row.id) for row in rows], claims_of(rows)
        try:
            if lane.work_many and len(rows) > 1:
                lane.work_many(rows)
            else:
                for row in rows:
                    lane.work(row)
        except DatabaseUnavailable as error:
            log.warning("worker.database_away", lane=lane.name, rows=ids, error=str(error))
            self._stranded.extend(rows)
        except Exception:
            log.exception("worker.bug", lane=lane.name, rows=ids)
            for row in rows:
                self._settle_bug(row)
        finally:
            self._in_hand.put_down(held)
            if grant.give_back():
                self._alert()  # the next trial need not wait for a look

    def _settle_bug(self, row: Any) -> None:
        try:
            with self._database.write() as session:
                claims.settle(session, row, due_in=claims.backoff(row.attempts, cap=BUG_CAP_SECONDS))
        except (LostClaim, DatabaseUnavailable):
            return

    def _sleep(self, seen: int, seconds: float = IDLE_SECONDS) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._commits != seen or self._stop.is_set(), seconds)

    def _alert(self) -> None:
        with self._wake:
            self._commits += 1
            self._wake.notify_all()

    def _listen(self) -> None:
        """Pass on the database's wake-up call. Without it polling goes on."""
        waker = self._database.waker()
        while not self._stop.is_set():
            waker.wait(IDLE_SECONDS)
            self._alert()
        waker.close()

    def _renew(self, ended: threading.Event) -> None:
        """Extend the leases of all rows in hand, also while draining."""
        while not ended.wait(self._lease_seconds / 3):
            self._try("renew", self.renew_held)
            self._try("hand_back", self._hand_back_stranded)

    def _try(self, job: str, do: Callable[[], object]) -> None:
        """Whatever goes wrong is told, and its thread lives to do it the next time."""
        try:
            do()
        except DatabaseUnavailable as error:
            log.warning("worker.database_away", job=job, error=str(error))
        except StoreUnavailable as error:
            log.warning("worker.store_away", job=job, error=str(error))
        except Exception:
            log.exception("worker.bug", job=job)

    def _hand_back_stranded(self) -> None:
        """Rows that could not be settled while the database was away: nobody need wait for their leases to end."""
        rows = list(self._stranded)
        if rows:
            with self._database.write() as session:
                for row in rows:
                    claims.release(session, row)
                self._database.wake(session)
        del self._stranded[: len(rows)]

    def renew_held(self) -> None:
        by_lease: dict[tuple[Any, uuid.UUID], list[Any]] = {}
        for row in self._in_hand.rows:
            by_lease.setdefault((type(row), row.lease), []).append(row.id)
        with self._database.write() as session:
            for (model, lease), ids in by_lease.items():
                claims.renew(session, model, ids, lease, self._lease_seconds)

    def _beat(self) -> None:
        while not self._ended.wait(heartbeats.BEAT_SECONDS):
            self._try("beat", lambda: heartbeats.beat(self._database, self._id))

    def _run_periodic(self, job: PeriodicJob) -> None:
        while not self._stop.is_set():
            seen = self._commits
            self._try(job.name, job.run)
            if job.wakes:
                self._sleep(seen, job.every_seconds)
                self._stop.wait(LINGER_SECONDS)
            else:
                self._stop.wait(job.every_seconds)

    def _look_for_suspects(self) -> None:
        while not self._stop.wait(QUARANTINE_INTERVAL_SECONDS):
            self._try("suspects", self._work_on_suspects)

    def _work_on_suspects(self) -> int:
        """A row that has ended three workers is worked on by a process that does nothing else meanwhile.

        The circuit is asked before anything is stopped. An open one's trial is left to other rows, which stop nothing;
        when none has taken it for a whole pause, there is none.
        """
        with ExitStack() as granted:
            grants = [(lane, granted.enter_context(_grant(lane, 1, PAUSE_CAP_SECONDS))) for lane in self._suspected()]
            lanes = [lane for lane, grant in grants if grant.count]
            if not lanes:
                return 0
            with self._in_hand.quarantine(self._stop):
                done = sum(map(self._work_on_suspect, lanes))
        self._alert()
        return done

    def _suspected(self) -> list[Lane]:
        with self._database.autocommit_reader() as connection:
            return [
                lane for lane in self._lanes if claims.is_any_due(connection, lane.model, alone=True, where=lane.where)
            ]

    def _work_on_suspect(self, lane: Lane) -> int:
        if self._stop.is_set():
            return 0  # what is still in hand goes on meanwhile, and the process ends in the midst of it
        rows = self._claim(lane, 1, alone=True)
        for row in rows:
            log.warning("worker.suspect", lane=lane.name, row=str(row.id), losses=row.losses)
            self._do(lane, [row], NOTHING)
        return len(rows)

    def _drain(self) -> None:
        self._in_hand.wait_until_empty(self._grace_seconds)
        left = self._in_hand.rows + self._stranded
        if left:
            with self._database.write() as session:
                for row in left:
                    claims.release(session, row)
        heartbeats.unregister(self._database, self._id)
        log.info("worker.stopped", handed_back=len(left))


def _grant(lane: Lane, wanted: int, left_for_seconds: float = 0) -> Grant:
    return lane.circuit.grant(wanted, left_for_seconds=left_for_seconds) if lane.circuit else Grant(wanted)


@contextmanager
def _idle_threads(idle: threading.Semaphore, limit: int) -> Iterator[list[None]]:
    """Take every idle slot there is, none if none comes soon; those still in the list at the end are given back."""
    taken: list[None] = [None] if idle.acquire(timeout=IDLE_SECONDS) else []
    while 0 < len(taken) < limit and idle.acquire(blocking=False):
        taken.append(None)
    try:
        yield taken
    finally:
        for _ in taken:
            idle.release()
