"""The audit that goes on in the workers: every task is looked at and every file hashed once in so many days.

    due_at <= now ──claim──▶ lease = fresh token ──▶ tasks up to the hand looked at ──settle──▶ due_at = the next one's
         ▲                            │ died, froze                                  WHERE lease = mine
         └──── the lease ran out ◀────┘   (another worker goes on from `cursor`)

A hand goes over all task ids, which are random, from the lowest to the highest in those days, like a clock's: N tasks
come up evenly, days / N apart, each at the same place in every round, however many come meanwhile. What is behind the
hand is done without a pause. One row says where the round stands, so one process audits at a time, whichever it is.
Nothing is repaired here. What lies outside of all tasks' folders only `receiver audit` finds.
"""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import CursorResult, or_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col, select

from storage.archive.audit import Audit, Counts, Finding, FindingKind
from storage.archive.delete import folders_of_task as look_up
from storage.background import background_thread
from storage.bucket.bucket import Bucket
from storage.errors import DatabaseUnavailable, LostClaim, StoreUnavailable
from storage.rows import tasks
from storage.rows.claims import backoff
from storage.rows.database import Database, db_now
from storage.rows.models import RollingAudit, Task

log = structlog.get_logger()

NAME = "archive"
DAY_SECONDS = 86_400.0
ALL_IDS = 2**128
# The least time between two steps of a round that is not behind: 17 tasks come up in it, of a million in a week.
STEP_SECONDS = 10.0
# The most: a task that has just come may be the next one.
STANDING_INTERVAL_SECONDS = 3_600.0
# What a worker that dies loses: so many tasks, and no further task once so many bytes were hashed.
STEP_TASKS = 64
STEP_BYTES = 64 * 2**20
# A round that is behind gives its thread back this often, so that the worker's end is seen.
RUN_SECONDS = 10.0
# A task whose folder is listed but cannot be read so many times in a row is a fault, and the round goes on behind it.
TRIES = 3
# Details of so many faults, some 250 bytes each, are kept in the one row: more are no longer one by one anybody's work.
MAX_FINDINGS = 1_000


@dataclass
class Round:
    """`looked`: at how many tasks so far; `tries`: of the next one, in vain; `late`: its days were over before that."""

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
    """What one step saw: the external ids of its tasks, the last one's id, the faults; `failed`: why it stopped.

    `left`: more tasks are behind the hand. `is_over`: the round is.
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
        # No detail: it may quote an error's words. `receiver audit` tells it.
        self.faults += [{"kind": each.kind.value, "key": each.key, "task": name} for each in found if each.is_fault]


class ContinuousAudit:
    """Audits some tasks whenever that is due. Any number of processes may ask; one at a time does it.

    `days`: in which every file is hashed once. `bytes_per_second`: how fast files are read at most.
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
        """Take steps while one is due, for some seconds. Returns how many. Raises `DatabaseUnavailable`."""
        steps, until = 0, time.monotonic() + RUN_SECONDS
        while time.monotonic() < until and self.step():
            steps += 1
        return steps

    def step(self) -> bool:
        """Look at the next tasks if that is due; False when it was not, or when the lease was lost on the way.

        Whoever dies half-way leaves nothing: once the lease has run out the same tasks are looked at again.
        """
        row = self._claim()
        if row is None:
            return False
        try:
            with self._renewed(row):
                looked = self._look(row)
            self._settle(row, looked)
        except LostClaim as error:
            log.warning("audit.lost", error=str(error))
            return False
        return True

    # -- the lease ----------------------------------------------------------------------------------------------------

    def _claim(self) -> RollingAudit | None:
        is_due = col(RollingAudit.due_at) <= db_now()
        with self._database.read() as session:
            if session.exec(select(RollingAudit.name).where(~is_due)).first():
                return None
        with self._database.write() as session:
            _insert_once(session)
            claimed = update(RollingAudit).where(is_due).values(lease=uuid.uuid4(), due_at=db_now(self._lease_seconds))
            options = {"synchronize_session": False}
            row = session.scalars(claimed.returning(RollingAudit).execution_options(**options)).one_or_none()
            if row and not row.checked:
                row.round_started_at = tasks.now(session)
                row.checked = Round().as_json()
        return row

    def _renewed(self, row: RollingAudit) -> AbstractContextManager[None]:
        """Keep the lease while the block runs: one large file on a slow line outlasts it."""
        return background_thread("audit-lease", lambda ended: self._renew(row, ended))

    def _renew(self, row: RollingAudit, ended: threading.Event) -> None:
        while not ended.wait(self._lease_seconds / 3):
            try:
                with self._database.write() as session:
                    _write(session, row, due_at=db_now(self._lease_seconds))
            except LostClaim:
                return
            except DatabaseUnavailable as error:
                log.warning("audit.database_away", error=str(error))

    # -- looking ------------------------------------------------------------------------------------------------------

    def _look(self, row: RollingAudit) -> StepResult:
        tries, hand = Round.from_json(row.checked).tries, self._target_position(row, self._database.now())
        looked, chosen = StepResult(row.cursor), self._tasks_before(row.cursor, hand)
        for task_id, name in chosen[:STEP_TASKS]:
            try:
                looked.add(task_id, name, *self._look_at(name, 0 if looked.tasks else tries))
            except DatabaseUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 - a bug that one task's objects bring out must not end the round
                looked.failed = error
                break
            if looked.counts.hashed_bytes >= STEP_BYTES:
                break
        looked.left = len(looked.tasks) < len(chosen)
        if not looked.left:
            looked.cursor = max(hand, row.cursor or hand)  # the hand goes back when the days become more
            looked.is_over = hand.int == ALL_IDS - 1
        return looked

    def _target_position(self, row: RollingAudit, now: datetime) -> uuid.UUID:
        assert row.round_started_at is not None
        share = (now - row.round_started_at).total_seconds() / self._round_seconds
        return uuid.UUID(int=min(int(max(share, 0.0) * ALL_IDS), ALL_IDS - 1))

    def _tasks_before(self, cursor: uuid.UUID | None, hand: uuid.UUID) -> list[tuple[uuid.UUID, str]]:
        """The next tasks that the hand has passed, one more than a step looks at."""
        statement = select(Task.id, Task.external_task_id).where(col(Task.id) <= hand)
        if cursor is not None:
            statement = statement.where(col(Task.id) > cursor)
        with self._database.read() as session:
            return list(session.exec(statement.order_by(col(Task.id)).limit(STEP_TASKS + 1)))

    def _look_at(self, name: str, tries: int) -> tuple[Counts, list[Finding]]:
        """Every folder of one task. `tries`: how often that failed before. Raises `StoreUnavailable`, and bugs."""
        counts, found = Counts(), []
        _, folders = look_up(self._database, self._bucket, name)
        for folder in sorted(folders):
            try:
                seen, differing = self._audit.look_at(folder)
            except Exception as error:
                if tries + 1 < TRIES or isinstance(error, DatabaseUnavailable):
                    raise
                seen, differing = self._unreadable(folder, name)
            counts.add(seen)
            found += differing
        return counts, found

    def _unreadable(self, folder: str, name: str) -> tuple[Counts, list[Finding]]:
        """The store that lists the folder is not away: what it cannot read is at fault. Else raises what that says."""
        objects = sum(1 for _ in self._bucket.list(folder))
        counts = Counts(folders=1, objects=objects)
        counts.found[FindingKind.UNREADABLE.value] += 1
        return counts, [Finding(FindingKind.UNREADABLE, folder, name, "it is listed, and not read")]

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def _settle(self, row: RollingAudit, looked: StepResult) -> None:
        """Write what was seen and when to go on; then be loud about each fault that is new. Raises `LostClaim`."""
        before = Round.from_json(row.checked)
        current = _advanced(before, looked)
        with self._database.write() as session:
            now = tasks.now(session)
            current.late = before.late or (looked.left and now > self._at(row, 1))
            findings, fresh = _merge(row.findings, looked, now)
            due_at = self._next_due(session, row, looked, now, current.tries)
            _write(session, row, lease=None, due_at=due_at, findings=findings, **_progress(current, looked, now))
        for fault in fresh:
            log.error("audit.fault", kind=fault["kind"], key=fault["key"], task=fault["task"])
        if isinstance(looked.failed, StoreUnavailable):
            log.warning("audit.store_away", error=str(looked.failed), tries=current.tries)
        elif looked.failed:
            log.error("worker.bug", chore="audit", after=str(looked.cursor), exc_info=looked.failed)
        if current.late and not before.late:
            log.warning("audit.late", looked=current.looked, days=self._round_seconds / DAY_SECONDS)

    def _at(self, row: RollingAudit, share: float) -> datetime:
        """When the hand has gone over so much of the round."""
        assert row.round_started_at is not None
        return row.round_started_at + timedelta(seconds=self._round_seconds * share)

    def _next_due(self, session: Session, row: RollingAudit, looked: StepResult, now: datetime, tries: int) -> datetime:
        if looked.failed:
            return now + timedelta(seconds=backoff(tries))
        if looked.left or looked.is_over:
            return now
        ahead = select(Task.id).where(col(Task.id) > looked.cursor).order_by(col(Task.id)).limit(1)
        found = session.exec(ahead).first()
        planned = self._at(row, found.int / ALL_IDS if found else 1)
        least, most = (now + timedelta(seconds=seconds) for seconds in (STEP_SECONDS, STANDING_INTERVAL_SECONDS))
        return min(max(planned, least), most, max(self._at(row, 1), now))


def _advanced(before: Round, looked: StepResult) -> Round:
    counts = Counts.from_json(before.counts.as_json())
    counts.add(looked.counts)
    again = before.tries if not looked.tasks else 0
    tries = again + 1 if looked.failed else 0
    return replace(before, looked=before.looked + len(looked.tasks), counts=counts, tries=tries)


def _progress(current: Round, looked: StepResult, now: datetime) -> dict[str, Any]:
    if looked.is_over:
        return {"cursor": None, "checked": {}, "last": current.as_json(), "round_ended_at": now}
    return {"cursor": looked.cursor, "checked": current.as_json()}


def _merge(
    known: list[dict[str, Any]], looked: StepResult, now: datetime
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The faults there are now, oldest first, and those among them that were not known.

    Of a task that was looked at, those that were not found again are gone.
    """
    since = {(each["kind"], each["key"]): each["at"] for each in known}
    found = {(each["kind"], each["key"]): each for each in looked.faults}
    fresh = [each for name, each in found.items() if name not in since]
    names = set(looked.tasks)
    merged = [each for each in known if each["task"] not in names]
    merged += [{**each, "at": since.get(name, now.isoformat())} for name, each in found.items()]
    return sorted(merged, key=lambda each: str(each["at"]))[-MAX_FINDINGS:], fresh


def _insert_once(session: Session) -> None:
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    first = dialect.insert(RollingAudit).values(name=NAME, due_at=db_now(), checked={}, findings=[])
    session.execute(first.on_conflict_do_nothing())


def _write(session: Session, row: RollingAudit, **values: Any) -> None:
    owned = update(RollingAudit).where(col(RollingAudit.name) == NAME, col(RollingAudit.lease) == row.lease)
    result = session.execute(owned.values(**values).execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    if result.rowcount == 0:
        raise LostClaim("another worker goes on with the audit")


def forget(database: Database) -> bool:
    """Forget the faults of an audit that is switched off: nobody would see that they were repaired.

    One that some worker still holds is left alone. Returns whether there was something to forget.
    """
    free = or_(col(RollingAudit.lease).is_(None), col(RollingAudit.due_at) <= db_now())
    with database.read() as session:
        row = session.exec(select(RollingAudit).where(free)).first()
    if row is None or not row.findings:
        return False
    with database.write() as session:
        session.execute(update(RollingAudit).where(free).values(findings=[], lease=None, due_at=db_now()))
    return True


# -- how it stands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """`faults`: there now; `hashed`: files of the round under way, or between rounds of the last; `share`: of it done.

    `age_seconds`: since the last whole round ended, None = none has. `findings`: the newest faults, oldest first.
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
    """How the rolling audit stands; all zero where none was ever switched on."""
    row = session.exec(select(RollingAudit)).first()
    if row is None:
        return Standing()
    rounds = [Round.from_json(values) for values in (row.checked, row.last) if values]
    current = rounds[0] if rounds else Round()
    share = (row.cursor.int / ALL_IDS if row.cursor else 0.0) if row.checked else float(bool(rounds))
    age = (tasks.now(session) - row.round_ended_at).total_seconds() if row.round_ended_at else None
    times = {"round_started_at": row.round_started_at, "round_ended_at": row.round_ended_at}
    return Standing(
        _count(row, rounds), current.counts.hashed, share, bool(row.checked) and current.late, age,
        **times, last=row.last, findings=row.findings,
    )  # fmt: skip


def _count(row: RollingAudit, rounds: list[Round]) -> int:
    """A full list says nothing of the faults that had no room in it: the rounds counted them."""
    listed = len(row.findings)
    return listed if listed < MAX_FINDINGS else max(listed, *(each.counts.faults for each in rounds))
