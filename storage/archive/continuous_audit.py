"""The continuous audit in the workers: every task is audited and every file hashed once in RECEIVER_AUDIT_DAYS.

    due_at <= now ──claim──▶ lease = fresh token ──▶ tasks up to the target audited ──settle──▶ due_at = the next task's
         ▲                            │ died, hung                                   WHERE lease = mine
         └──── the lease ran out ◀────┘   (another worker continues from `cursor`)

A round visits all task ids in ascending order. Ids are random, so the work is spread evenly: the target position grows
with time from the lowest to the highest id, and a task is due when the target reaches its id. Tasks below the target
are audited without a pause. One row holds the state of the round, so one process audits at a time. Nothing is repaired
here. Objects outside of all tasks' folders are found by `receiver audit` only.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import or_, update
from sqlmodel import Session, col, select

from storage.archive.audit import Audit, Counts, Finding, FindingKind
from storage.archive.delete import objects_of_task
from storage.background import background_thread
from storage.bucket.bucket import Bucket
from storage.database.clock import db_now
from storage.database.sessions import Database, insert_or_ignore, run
from storage.errors import DatabaseUnavailable, LostClaim, StoreUnavailable
from storage.rows import tasks
from storage.rows.claims import backoff
from storage.rows.models import RollingAudit, Task

log = structlog.get_logger()

NAME = "archive"
DAY_SECONDS = 86_400.0
_OURS = col(RollingAudit.name) == NAME
ALL_IDS = 2**128
# The shortest time between two steps of a round that is on time. With a million tasks in a week, 17 become due in it.
STEP_SECONDS = 10.0
# The longest time between two steps, because a new task may be the next one.
STANDING_INTERVAL_SECONDS = 3_600.0
MARGIN_SECONDS = 60.0  # between the computation of a time and its check
# The most tasks of one step, and the hashed bytes after which it begins no further task. A crash loses one step.
STEP_TASKS = 64
STEP_BYTES = 64 * 2**20
# A late round gives its thread back this often, so that a worker can stop.
RUN_SECONDS = 10.0
# After this many failed reads in a row a folder that can be listed is a fault, and the round continues after it.
TRIES = 3
# Faults listed in the row, about 250 bytes each. An operator does not treat more of them one by one.
MAX_FINDINGS = 1_000


@dataclass
class Round:
    """The progress of a round. `looked`: audited tasks. `tries`: failed tries of the next one. `late`: out of time."""

    looked: int = 0
    tries: int = 0
    late: bool = False
    counts: Counts = field(default_factory=Counts)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts.as_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Round:
        return cls(**{**values, "counts": Counts.from_json(values["counts"])})


@dataclass
class StepResult:
    """The result of one step. `cursor`: id of the last audited task. `tasks`: external ids. `failed`: why it stopped.

    `left`: more tasks are below the target. `is_over`: the round has ended.
    """

    cursor: uuid.UUID | None
    tasks: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    faults: list[dict[str, Any]] = field(default_factory=list)
    failed: Exception | None = None
    left: bool = False
    is_over: bool = False

    def add(self, task_id: uuid.UUID, name: str, counts: Counts, found: list[Finding]) -> None:
        self.cursor = task_id
        self.tasks.append(name)
        self.counts.add(counts)
        # Without the detail, which may quote an error's text; `receiver audit` shows it.
        self.faults += [{"kind": each.kind.value, "key": each.key, "task": name} for each in found if each.is_fault]


class ContinuousAudit:
    """Audits the next tasks when they are due. Any number of processes may run it; the lease lets one work at a time.

    `days`: the length of a round. `bytes_per_second`: rate limit of reading files. `lease_seconds`: renewed each third.
    """

    def __init__(
        self, database: Database, bucket: Bucket, *, days: float, bytes_per_second: float, lease_seconds: float
    ) -> None:
        self._database = database
        self._bucket = bucket
        self._audit = Audit(database, bucket, deep=True, max_bytes_per_second=bytes_per_second)
        self._round_seconds = days * DAY_SECONDS
        self._lease_seconds = lease_seconds

    def run(self) -> int:
        """Take due steps for at most about RUN_SECONDS. Returns how many. Raises `DatabaseUnavailable`."""
        steps, until = 0, time.monotonic() + RUN_SECONDS
        while time.monotonic() < until and self.step():
            steps += 1
        return steps

    def step(self) -> bool:
        """Audit the next tasks if they are due. False: not due, or the lease was lost.

        After a crash the lease runs out, and the same tasks are audited again.
        """
        row = self._claim()
        if row is None:
            return False
        try:
            # One large file on a slow line outlasts the lease.
            with background_thread("audit-lease", lambda ended: self._renew(row, ended)):
                result = self._audit_tasks(row)
            self._settle(row, result)
        except LostClaim as error:
            log.warning("audit.lease_lost", error=str(error))
            return False
        return True

    # -- the lease ----------------------------------------------------------------------------------------------------

    def _claim(self) -> RollingAudit | None:
        # A time further ahead than any wait of the audit was set before the clock was set back.
        furthest = max(STANDING_INTERVAL_SECONDS, self._lease_seconds) + MARGIN_SECONDS
        due_at = col(RollingAudit.due_at)
        is_due = or_(due_at <= db_now(), due_at > db_now(furthest))
        with self._database.read() as session:
            if session.exec(select(RollingAudit.name).where(~is_due)).first():
                return None
        with self._database.write() as session:
            insert_or_ignore(session, RollingAudit, {"name": NAME, "due_at": db_now(), "checked": {}, "findings": []})
            claimed = update(RollingAudit).where(is_due).values(lease=uuid.uuid4(), due_at=db_now(self._lease_seconds))
            claimed = claimed.execution_options(synchronize_session=False)
            row = session.scalars(claimed.returning(RollingAudit)).one_or_none()
            if row is not None:
                self._begin_round(row, tasks.now(session))
        return row

    def _begin_round(self, row: RollingAudit, now: datetime) -> None:
        """Begin a round unless one is under way. One of a clock that was ahead goes on as if begun now."""
        if not row.checked:
            row.checked = Round().as_json()
        elif row.round_started_at is not None and row.round_started_at <= now:
            return
        row.round_started_at = now

    def _renew(self, row: RollingAudit, ended: threading.Event) -> None:
        while not ended.wait(self._lease_seconds / 3):
            try:
                with self._database.write() as session:
                    _write_claimed(session, row, due_at=db_now(self._lease_seconds))
            except LostClaim:
                return
            except DatabaseUnavailable as error:
                log.debug("audit.database_not_reached", error=str(error))

    # -- auditing -----------------------------------------------------------------------------------------------------

    def _audit_tasks(self, row: RollingAudit) -> StepResult:
        tries, target = Round.from_json(row.checked).tries, self._target_position(row, self._database.now())
        result, chosen = StepResult(row.cursor), self._tasks_before(row.cursor, target)
        for task_id, name in chosen[:STEP_TASKS]:
            try:
                result.add(task_id, name, *self._audit_task(name, 0 if result.tasks else tries))
            except DatabaseUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 - a bug that one task's objects trigger must not end the round
                result.failed = error
                break
            if result.counts.hashed_bytes >= STEP_BYTES:
                break
        result.left = len(result.tasks) < len(chosen)
        if not result.left:
            result.cursor = max(target, row.cursor or target)  # the target moves back when the days are raised
            result.is_over = target.int == ALL_IDS - 1
        return result

    def _target_position(self, row: RollingAudit, now: datetime) -> uuid.UUID:
        assert row.round_started_at is not None
        share = (now - row.round_started_at).total_seconds() / self._round_seconds
        return uuid.UUID(int=min(int(max(share, 0.0) * ALL_IDS), ALL_IDS - 1))

    def _tasks_before(self, cursor: uuid.UUID | None, target: uuid.UUID) -> list[tuple[uuid.UUID, str]]:
        """The next tasks up to the target, one more than a step audits."""
        statement = select(Task.id, Task.external_task_id).where(col(Task.id) <= target)
        if cursor is not None:
            statement = statement.where(col(Task.id) > cursor)
        with self._database.read() as session:
            return list(session.exec(statement.order_by(col(Task.id)).limit(STEP_TASKS + 1)))

    def _audit_task(self, name: str, tries: int) -> tuple[Counts, list[Finding]]:
        """Audit every folder of one task. `tries`: earlier failures. Raises `StoreUnavailable`, and bugs."""
        counts, found = Counts(), []
        _, _, folders = objects_of_task(self._database, self._bucket, name)
        for folder in sorted(folders):
            try:
                folder_counts, findings = self._audit.check_folder(folder)
            except Exception as error:
                if tries + 1 < TRIES or isinstance(error, DatabaseUnavailable):
                    raise
                # A store that lists the folder is not down, so the object is at fault. A store that is down raises at
                # the listing.
                folder_counts = Counts(folders=1, objects=sum(1 for _ in self._bucket.list(folder)))
                folder_counts.found[FindingKind.UNREADABLE.value] += 1
                findings = [Finding(FindingKind.UNREADABLE, folder, name, "it is listed, but reading it fails")]
            counts.add(folder_counts)
            found += findings
        return counts, found

    # -- settling -----------------------------------------------------------------------------------------------------

    def _settle(self, row: RollingAudit, result: StepResult) -> None:
        """Write the result and when the next step is due, then log each new fault. Raises `LostClaim`."""
        before = Round.from_json(row.checked)
        current = _advanced(before, result)
        with self._database.write() as session:
            now = tasks.now(session)
            current.late = before.late or (result.left and now > self._time_at(row, 1))
            known = session.exec(select(RollingAudit.findings).where(_OURS).with_for_update()).one()
            findings, fresh = _merge(list(known), result, now)
            progress: dict[str, Any] = {"cursor": result.cursor, "checked": current.as_json()}
            if result.is_over:
                progress = {"cursor": None, "checked": {}, "last": current.as_json(), "round_ended_at": now}
            due_at = self._next_due(session, row, result, now, current.tries)
            _write_claimed(session, row, lease=None, due_at=due_at, findings=findings, **progress)
        for fault in fresh:
            log.error("audit.fault_found", kind=fault["kind"], key=fault["key"], task=fault["task"])
        if isinstance(result.failed, StoreUnavailable):
            log.warning("audit.store_not_reached", error=str(result.failed), tries=current.tries)
        elif result.failed:
            log.error("worker.step_failed", job="audit", after=str(result.cursor), exc_info=result.failed)
        if current.late and not before.late:
            log.warning("audit.round_delayed", tasks=current.looked, days=self._round_seconds / DAY_SECONDS)

    def _time_at(self, row: RollingAudit, share: float) -> datetime:
        """When the target reaches this share (0 to 1) of all ids."""
        assert row.round_started_at is not None
        return row.round_started_at + timedelta(seconds=self._round_seconds * share)

    def _next_due(self, session: Session, row: RollingAudit, result: StepResult, now: datetime, tries: int) -> datetime:
        if result.failed:
            return now + timedelta(seconds=backoff(tries))
        if result.left or result.is_over:
            return now
        ahead = select(Task.id).where(col(Task.id) > result.cursor).order_by(col(Task.id)).limit(1)
        found = session.exec(ahead).first()
        planned = self._time_at(row, found.int / ALL_IDS if found else 1)
        least, most = (now + timedelta(seconds=seconds) for seconds in (STEP_SECONDS, STANDING_INTERVAL_SECONDS))
        return min(max(planned, least), most, max(self._time_at(row, 1), now))


def _advanced(before: Round, result: StepResult) -> Round:
    counts = Counts.from_json(before.counts.as_json())
    counts.add(result.counts)
    again = before.tries if not result.tasks else 0
    tries = again + 1 if result.failed else 0
    return replace(before, looked=before.looked + len(result.tasks), counts=counts, tries=tries)


def _merge(
    known: list[dict[str, Any]], result: StepResult, now: datetime
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The current faults, oldest first, and the new ones among them.

    Known faults of an audited task that were not found again are removed.
    """
    since = {(each["kind"], each["key"]): each["at"] for each in known}
    found = {(each["kind"], each["key"]): each for each in result.faults}
    fresh = [each for name, each in found.items() if name not in since]
    names = set(result.tasks)
    merged = [each for each in known if each["task"] not in names]
    merged += [{**each, "at": since.get(name, now.isoformat())} for name, each in found.items()]
    return sorted(merged, key=lambda each: str(each["at"]))[-MAX_FINDINGS:], fresh


def _write_claimed(session: Session, row: RollingAudit, **values: Any) -> None:
    owned = update(RollingAudit).where(_OURS, col(RollingAudit.lease) == row.lease)
    if run(session, owned.values(**values)).rowcount == 0:
        raise LostClaim("another worker has taken over the audit")


def clear_fault(session: Session, kind: FindingKind, key: str) -> None:
    """Remove a fault from the list, because an operator has accepted it. The next check of its task decides again."""
    row = session.exec(select(RollingAudit).where(_OURS).with_for_update()).one_or_none()
    if row is not None:
        row.findings = [each for each in row.findings if (each["kind"], each["key"]) != (kind, key)]
        session.flush()


def forget(database: Database) -> bool:
    """Clear the faults of an audit that is switched off, because no one would notice their repair.

    A row that a worker still holds is left alone. Returns whether there were faults to clear.
    """
    free = or_(col(RollingAudit.lease).is_(None), col(RollingAudit.due_at) <= db_now())
    with database.read() as session:
        row = session.exec(select(RollingAudit).where(free)).first()
    if row is None or not row.findings:
        return False
    with database.write() as session:
        session.execute(update(RollingAudit).where(free).values(findings=[], lease=None, due_at=db_now()))
    return True


# -- status -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """The status of the audit. `faults`: current ones. `hashed`: files of this round, between rounds of the last one.

    `share`: completed part of that round, 0 to 1. `age_seconds`: since the last complete round ended, None = none has.
    `findings`: the newest faults, oldest first.
    """

    faults: int = 0
    hashed: int = 0
    share: float = 0.0
    late: bool = False
    age_seconds: float | None = None
    round_started_at: datetime | None = None
    round_ended_at: datetime | None = None
    last: dict[str, Any] | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        times = {name: getattr(self, name) for name in ("round_started_at", "round_ended_at")}
        return {**asdict(self), **{name: at.isoformat() if at else None for name, at in times.items()}}


def standing(session: Session) -> Standing:
    """The status of the continuous audit; all zero if it has never run."""
    row = session.exec(select(RollingAudit)).first()
    if row is None:
        return Standing()
    rounds = [Round.from_json(values) for values in (row.checked, row.last) if values]
    current = rounds[0] if rounds else Round()
    share = (row.cursor.int / ALL_IDS if row.cursor else 0.0) if row.checked else float(bool(rounds))
    age = (tasks.now(session) - row.round_ended_at).total_seconds() if row.round_ended_at else None
    times = {"round_started_at": row.round_started_at, "round_ended_at": row.round_ended_at}
    # A full list omits faults; the counts of the rounds include them.
    listed = len(row.findings)
    faults = listed if listed < MAX_FINDINGS else max(listed, *(each.counts.faults for each in rounds))
    return Standing(
        faults, current.counts.hashed, share, bool(row.checked) and current.late, age,
        **times, last=row.last, findings=row.findings,
    )  # fmt: skip
