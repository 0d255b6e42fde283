"""Reads tasks at the provider whose callback is late, lost or not believed, and applies the answer.

due reads ─▶ up to 20 at once by the batch call, if there is one ─┬─ answered ─────▶ applied
                                                                  └─ not answered ─▶ one by one, or from the list
unmatched delivery ─▶ checked again: has the task a row by now? does the provider know the task of our token?
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial

import structlog
from sqlalchemy import and_
from sqlmodel import Session, col, select

from receiver.providers.base import Provider, Record
from receiver.providers.task_lookup import is_namesake, read_task
from receiver.tasks import apply_deliveries
from storage import states
from storage.accounts.accepted_creates import NEVER_REPORTED
from storage.accounts.rate_limit import ReadRateLimit, TooManyReads
from storage.database.sessions import Database
from storage.errors import GiveUp, LostClaim, ReportUnreadable, Retry
from storage.keys import encode_id
from storage.operations import maintenance
from storage.rows import claims, reports, tasks
from storage.rows.deliveries import Delivery, compare_again, store_poll
from storage.rows.models import Callback, Task
from storage.rows.task_conditions import is_dismissed
from storage.rows.tasks import clear_other_notes, note_after_others
from storage.states import CallbackState, Report, Step, TaskState

log = structlog.get_logger()

# The longest wait between two calls to a provider that is down, whatever the task's own poll delay is.
READ_RETRY_CAP_SECONDS = 300
# The newest deliveries whose ids are read. An honest task's all name the same one.
DELIVERED_IDS = 3
# The limit of a batch call (KLING §3).
BATCH = 20
# A base URL without a batch call is tried again after this long, because gateways are updated.
NO_BATCH_SECONDS = 3_600.0


class Reader:
    """Works on claimed task rows in step `read`. `now`: monotonic seconds."""

    def __init__(
        self,
        database: Database,
        providers: Mapping[str, Provider],
        schedule: reports.Schedule,
        limit: ReadRateLimit,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._providers = providers
        self._schedule = schedule
        self._limit = limit
        self._now = now
        self._no_batch_until: dict[str, float] = {}

    def batch(self) -> int:
        """How many tasks to read at once: more than one while some provider may have a batch call."""
        return BATCH if any(self._may_have_batch(name) for name in self._providers) else 1

    def work(self, task: Task) -> None:
        """Read one task, and apply the answer in one transaction."""
        self._read_each([task])

    def work_many(self, rows: Sequence[Task]) -> None:
        """Read these tasks, at most `BATCH`, with as few calls as possible. Each is settled by itself."""
        for name in {row.provider for row in rows}:
            mine = [row for row in rows if row.provider == name]
            if len(mine) > 1 and self._may_have_batch(name):
                left = self._read_batch(name, mine)
                if self._read_each(left) and len(left) == len(mine):
                    self._forget_batch(name)  # The provider answered and knew none of the tasks, which exist.
            else:
                self._read_each(mine)

    def _may_have_batch(self, provider: str) -> bool:
        return self._now() >= self._no_batch_until.get(provider, float("-inf"))

    def _read_batch(self, name: str, rows: list[Task]) -> list[Task]:
        """Settle the tasks that one batch call answers by our own ids. Returns the rows without an answer."""
        try:
            self._limit.wait(name)
            found = self._providers[name].read_many([row.external_task_id for row in rows])
        except (Retry, GiveUp) as error:
            for row in rows:
                self._unanswered(row, error)
            return []
        if found is None:
            self._forget_batch(name)
            return rows
        for row in rows:
            if row.external_task_id in found:
                self._settle(row, found[row.external_task_id])
        return [row for row in rows if row.external_task_id not in found]

    def _forget_batch(self, provider: str) -> None:
        self._no_batch_until[provider] = self._now() + NO_BATCH_SECONDS
        log.info("provider.batch_reads_not_supported", provider=provider)

    def _read_each(self, rows: Sequence[Task]) -> int:
        """Read one task after the other until the provider is down. Returns how many it knows."""
        known, away = 0, None
        for row in rows:
            try:
                if row.losses >= claims.PARK_LOSSES:
                    self._park(row)
                    continue
                if away is not None:
                    raise away
                record = self._read(row)
            except (Retry, GiveUp) as error:
                away = error if isinstance(error, Retry) else None
                self._unanswered(row, error)
            else:
                known += record is not None
                self._settle(row, record)
        return known

    def _park(self, row: Task) -> None:
        note = f"reading it ended its worker {row.losses} times; `receiver retry` tries again"
        with contextlib.suppress(LostClaim), self._database.write() as session:
            claims.settle(session, row, due_in=None, note=note_after_others(tasks.lock_claimed(session, row), note))
        log.error("task.parked", **tasks.named(row), note=note)

    def _read(self, row: Task) -> Record | None:
        record = read_task(
            self._providers[row.provider],
            self._limit,
            provider_task_id=row.provider_task_id,
            external_task_id=row.external_task_id,
            made_at=row.created_at,
        )
        if row.provider_task_id is not None:
            return record
        is_ours = record is not None and not is_namesake(record.report, row.external_task_id)
        return record if is_ours else self._read_delivered(row)

    def _read_delivered(self, row: Task) -> Record | None:
        """Read a task that has no id of the provider under those that its deliveries name.

        Their sender chose these ids, so only a record that names our task counts.
        """
        provider = self._providers[row.provider]
        with self._database.read() as session:
            bodies = newest_bodies(session, row)
        for name in _ids_in(bodies, provider):
            record = read_task(provider, self._limit, provider_task_id=name, external_task_id=name)
            if record is not None and record.report.external_task_id == row.external_task_id:
                return record
        return None

    def _settle(self, task: Task, record: Record | None) -> None:
        try:
            with self._database.write() as session:
                row = tasks.lock_claimed(session, task)
                moment = tasks.now(session)
                claims.rest(row)
                row.step = None
                clear_other_notes(row, is_found=record is not None)
                row.polls += 1
                if record is not None:
                    delivery = Delivery(task.provider, "poll", task.id, record.body)
                    store_poll(session, delivery)
                report = self._report(row, record, moment)
                reports.apply(session, row, report, self._schedule, now=moment, pushed=False)
                if unknown := _unknown_status(row, record):
                    row.note = note_after_others(row, unknown)
                if record is not None and self._is_failed_too_early(row, record, moment):
                    row.step = Step.READ
                    claims.make_due(row, self._schedule.poll_delay(row.polls))
                compare_again(session, row)
                self._database.wake(session)
        except LostClaim:
            return
        log.info("task.read", **tasks.named(task), state=row.state, found=record is not None)
        if record is not None and unknown and unknown not in (task.note or ""):
            log.warning("callback.status_not_recognized", **tasks.named(task), status=record.report.raw_status)

    def _report(self, task: Task, record: Record | None, moment: datetime) -> Report:
        if record is not None and record.report.status in states.TERMINAL:
            return record.report
        if task.state not in states.TERMINAL and self._is_past_its_lifetime(task, moment):
            return Report(None, None, TaskState.FAILED, message=NEVER_REPORTED)
        return record.report if record else Report(None, None, None)

    def _is_failed_too_early(self, task: Task, record: Record, moment: datetime) -> bool:
        """Whether the task failed here and the provider still works on it: a create that was refused and arrived."""
        is_done = record.report.status in states.TERMINAL or self._is_past_its_lifetime(task, moment)
        return task.state is TaskState.FAILED and not is_done and not is_dismissed(task)

    def _is_past_its_lifetime(self, task: Task, moment: datetime) -> bool:
        since = task.submitted_at or task.created_at
        return moment > since + timedelta(seconds=self._schedule.result_lifetime_seconds)

    def _unanswered(self, task: Task, error: Retry | GiveUp) -> None:
        """Change the time of the next read only. Fail the task if the reads of a whole lifetime were refused."""
        if isinstance(error, GiveUp) and self._is_past_its_lifetime(task, self._database.now()):
            self._settle(task, None)
            return
        waits_its_turn = isinstance(error, TooManyReads)  # The task did not cause this, so no attempt is counted.
        after = error.after if isinstance(error, Retry) else None
        due_in = max(after or 0, claims.backoff(task.attempts, cap=READ_RETRY_CAP_SECONDS))
        try:
            with self._database.write() as session:
                row = tasks.lock_claimed(session, task)
                note = row.note if waits_its_turn else note_after_others(row, str(error))
                claims.settle(session, task, due_in=due_in, counts=not waits_its_turn, note=note)
        except LostClaim:
            return
        if not waits_its_turn:
            log.warning("task.read_failed", **tasks.named(task), error=str(error), seconds=round(due_in, 1))


class UnmatchedDeliveries:
    """Checks unmatched deliveries again. Their task may have a row by now, or its row was lost with a database."""

    def __init__(
        self, database: Database, providers: Mapping[str, Provider], schedule: reports.Schedule, limit: ReadRateLimit
    ) -> None:
        self._database = database
        self._providers = providers
        self._schedule = schedule
        self._limit = limit

    def work(self, row: Callback) -> None:
        """Apply the delivery if its task is known by now. If its token is ours, read the task and adopt it."""
        self.begin(row)()

    def begin(self, row: Callback) -> Callable[[], None]:
        """Read the task if the token is ours. The returned function waits until the rest is done.

        The rest is a write of a group. With a transaction for each, 20,000 deliveries took nine minutes.
        """
        record, due_in = None, None
        try:
            record = self._read(row)
        except Retry as error:
            due_in = max(error.after or 0, claims.backoff(row.attempts))
        except GiveUp as error:
            log.warning("callback.lookup_refused", callback=row.id, error=str(error))
        committed = self._database.begin_in_group(partial(self._recheck, row=row, record=record, due_in=due_in))

        def end() -> None:
            with contextlib.suppress(LostClaim):
                log.info("callback.rechecked", callback=row.id, found=committed())

        return end

    def _recheck(self, session: Session, row: Callback, record: Record | None, due_in: float | None) -> bool:
        """Settle it. Returns whether it has a task now. Raises `LostClaim`."""
        found = self._find_or_adopt(session, row, record)
        if not found:
            claims.settle(session, row, due_in=due_in)
        self._database.wake(session)
        return found

    def _find_or_adopt(self, session: Session, row: Callback, record: Record | None) -> bool:
        """Whether the delivery has a task by now. If so, the delivery is due."""
        known = apply_deliveries.find(session, row.provider, row.external_task_id, row.provider_task_id)
        if known is None and record is None:
            return False
        if known is not None or record is None or not self._adopt(session, row, record):  # adopting makes it due
            claims.settle(session, row, due_in=0, state=CallbackState.RECEIVED, reason=None)
        return True

    def _read(self, row: Callback) -> Record | None:
        """What the provider has under the ids of the delivery. None also if the token proves nothing."""
        if not _may_be_read(row):
            return None
        provider, name = self._providers[row.provider], row.external_task_id or row.provider_task_id or ""
        return read_task(provider, self._limit, provider_task_id=row.provider_task_id, external_task_id=name)

    def _adopt(self, session: Session, row: Callback, record: Record) -> bool:
        """The task's row under the id in our token, so that later callbacks find it too."""
        names = (record.report.external_task_id, row.external_task_id, row.provider_task_id)
        external_task_id = next(name for name in names if name and _is_usable(name))
        assert row.task_id is not None
        task = Task(id=row.task_id, external_task_id=external_task_id, provider=row.provider, adopt=True)
        return maintenance.adopt(session, task, record.report, self._schedule)


def _unknown_status(task: Task, record: Record | None) -> str | None:
    """The note of a task that has not ended, whose status at the provider has no meaning here."""
    if record is None or record.report.status is not None or task.state in states.TERMINAL:
        return None
    return f"the provider answers the {apply_deliveries.UNKNOWN} {record.report.raw_status!r}; the task is read again"


def newest_bodies(session: Session, task: Task) -> Sequence[bytes]:
    """The bodies of the task's newest deliveries: those at its own URL, and signed ones at the account's.

    Their ids are sorted here, because a statement with an order and a limit could be planned as a walk through all
    deliveries. A task has some 200 at most.
    """
    by_token = and_(col(Callback.task_id) == task.id, col(Callback.source) == "push")
    at_account = and_(col(Callback.task_id).is_(None), col(Callback.external_task_id) == task.external_task_id)
    of_task = (by_token, and_(at_account, col(Callback.webhook_id).is_not(None)))
    ids = [each or 0 for where in of_task for each in session.exec(select(Callback.id).where(where))]
    newest = select(Callback.body).where(col(Callback.id).in_(sorted(ids)[-DELIVERED_IDS:]))
    return session.exec(newest).all()


def _ids_in(bodies: Sequence[bytes], provider: Provider) -> set[str]:
    """The provider's ids in these bodies."""
    found = set[str]()
    for body in bodies:
        with contextlib.suppress(ReportUnreadable):
            found.add(provider.ids(body)[1] or "")
    return {name for name in found if name and _is_usable(name)}


def _may_be_read(row: Callback) -> bool:
    """Whether the delivery's token and ids justify a read at the provider."""
    name = row.external_task_id or row.provider_task_id
    return row.losses < claims.PARK_LOSSES and row.task_id is not None and name is not None and _is_usable(name)


def _is_usable(external_task_id: str) -> bool:
    try:
        encode_id(external_task_id)
    except ValueError:
        return False
    return True
