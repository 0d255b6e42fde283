"""The create step of a task row: POST once, and read the task back when the answer is unclear.

row (queued: no slots free) ─▶ admitted and claimed by a worker, see `storage.accounts.slots`, then the same
row (claimed, sent_at) ─▶ POST ─┬─ accepted ───────────────▶ submitted
                                ├─ refused for good ───────▶ failed
                                ├─ account refused ────────▶ back to the queue, see `storage.accounts.pauses`
                                ├─ slow down (1302) ───────▶ due again, nothing was made
                                ├─ full (1303) ────────────▶ due again, or with slots of our own: back to the queue
                                └─ unclear ────────────────▶ due: read by external id ─┬─ found ▶ submitted
                                                              (worker, or submitter)   ├─ called back ▶ submitted
                                                                                       └─ twice not found,
                                                                                          10 s apart ▶ POST again

The callback URL is in the request alone, so a callback to it shows that the create arrived: it is not sent again.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import and_, bindparam, exists, or_
from sqlmodel import Session, col, select

from receiver.providers.base import AlreadyExists, Provider, Unavailable
from receiver.providers.task_lookup import is_namesake, read_task
from receiver.tasks.apply_deliveries import decide_again
from receiver.tasks.create_outcome import CreateOutcome
from receiver.tasks.lease_renewal import renewing_lease
from storage.accounts import pauses
from storage.accounts.accepted_creates import ENDED_ITS_WORKER, NO_ANSWER
from storage.accounts.pauses import Trial
from storage.accounts.rate_limit import ReadRateLimit
from storage.accounts.slots import Slots
from storage.database.clock import db_now, db_now_once
from storage.database.prepared import execute
from storage.database.sessions import Database
from storage.errors import (
    AccountRefused,
    LostClaim,
    ModelRefused,
    ProviderFull,
    ProviderRejected,
    ProviderThrottled,
    Retry,
)
from storage.rows import claims, reports, tasks
from storage.rows.models import Callback, Task
from storage.states import Report, TaskState

log = structlog.get_logger()

# A provider's list may lag behind its creates. "Not found" is believed at the second read, this much later.
NOT_FOUND_AGAIN_SECONDS = 10
# Misses that a process remembers. One that it forgets is timed by the database's clock alone.
MAX_MISSES = 1_000
# What the provider's clock and its `Date` may differ by when we decide whose task an existing one is.
CLOCK_TOLERANCE = timedelta(seconds=60)
# After an unclear answer the read waits this long, so that the provider has the task.
LOOK_UP_SECONDS = 1
# The provider says "already exists", but a read does not find the task: either reads lag behind by this much (90 s), or
# the task belongs to another product.
UNREAD_TRIES = 10
# A create without an outcome for an hour is an error in the log at each further try. At least five tries, because a
# task that waited an hour for its slots has only just begun.
OVERDUE_SECONDS, OVERDUE_TRIES = 3_600, 5
# How long a create waits while the disk has no room for its callback. Nothing is asked meanwhile.
NO_ROOM_SECONDS = 5.0
# A new row is sent as it is while this part of its lease is left. The first renewal is due then.
FRESH_SHARE = 2 / 3
# 1302/1303: exponential from 1 s (KLING §6). The limit of 30 s keeps slots from staying idle.
THROTTLE_BASE_SECONDS, THROTTLE_CAP_SECONDS = 1.0, 30.0

# Whether the provider has the task: it was called back, by a signed delivery at the account's URL too, or a delivery
# came to the URL of this request, applied or not. A refused id that is used again has the same URL, and a later
# `created_at`. Where that is in the future, the clock was set back, and any delivery may be of this request.
_IS_AHEAD = col(Task.created_at) > db_now_once()
_DELIVERED = exists().where(
    col(Callback.task_id) == Task.id,
    col(Callback.source) == "push",
    or_(col(Callback.received_at) >= Task.created_at, _IS_AHEAD),
)
_CALLED_BACK = select(Task.id).where(
    Task.id == bindparam("wanted"),
    or_(
        col(Task.called_back_at) >= Task.created_at, and_(col(Task.called_back_at).is_not(None), _IS_AHEAD), _DELIVERED
    ),
)


class CreateStep:
    """Sends the creates of rows. Workers continue the rows of a submitter that died."""

    def __init__(
        self,
        database: Database,
        provider: Provider,
        schedule: reports.Schedule,
        slots: Slots,
        *,
        read_rate_limit: ReadRateLimit,
        lease_seconds: float,
    ) -> None:
        self._database = database
        self._provider = provider
        self._schedule = schedule
        self._slots = slots
        self._read_rate_limit = read_rate_limit
        self._lease_seconds = lease_seconds
        # The last misses that this process noted: the row's time, and monotonic seconds.
        self._misses: dict[uuid.UUID, tuple[datetime, float]] = {}

    def send(self, task: Task, outcome_listener: CreateOutcome | None = None) -> None:
        """Send a row that was just committed as sent, and settle its create.

        `outcome_listener` gets a refusal, which ends the row. The lease is renewed meanwhile. A row whose lease was
        lost before is not sent: its new owner sends it.
        """
        with renewing_lease(self._database, task, lease_seconds=self._lease_seconds):
            if self._is_ready(task):
                self._post(task, Trial(), outcome_listener)
            else:
                self._send_once(task, outcome_listener)

    def _is_ready(self, task: Task) -> bool:
        """Whether the row may be sent as it was committed: its lease is fresh, and no refusal of the account is known.

        It only reads: a second write of the same state cost each create a transaction with an fsync.
        """
        rest = self._lease_seconds * FRESH_SHARE
        is_fresh = (claims.is_held(task, rest), col(Task.sent_at) >= db_now_once(rest - self._lease_seconds))
        is_known = pauses.is_any_known(task.provider, task.model)
        with self._database.autocommit_reader() as connection:
            return connection.execute(select(col(Task.id)).where(*is_fresh, ~is_known)).first() is not None

    def look_up(self, task: Task) -> None:
        """Read a claimed row's task at the provider, and settle its create by what is found."""
        with renewing_lease(self._database, task, lease_seconds=self._lease_seconds):
            self._look_up(task)

    def work(self, task: Task) -> None:
        """Continue a claimed row in step `create`: send it if it was never sent, else find out whether it arrived."""
        if task.losses >= claims.PARK_LOSSES:
            self._fail(task, f"{ENDED_ITS_WORKER} {task.losses} times; `receiver submit --adopt` looks again")
        elif task.sent_at is not None:
            self._look_up(task)
        else:
            self._send_once(task)

    def _send_once(self, task: Task, outcome_listener: CreateOutcome | None = None) -> None:
        """POST the row if its lease is still ours, the account is not paused, the disk has room for its callback,
        and no callback shows that it was sent before. The lease is renewed right before.
        """
        due_at, trial = db_now(self._lease_seconds), None
        try:
            with self._database.write() as session:
                if not _is_called_back(session, task):
                    if shortage := self._database.shortage():
                        self._settle_queued(session, task, shortage, NO_ROOM_SECONDS, **claims.NO_ATTEMPTS)
                        return
                    trial = pauses.begin(session, task)
                    if trial.is_early:
                        self._settle_queued(session, task, "waits for the answers to others", 0, **claims.NO_ATTEMPTS)
                        return
                    if trial.refusal is None:
                        claims.update_claimed(session, task, due_at=due_at, sent_at=db_now(), missed_at=None)
        except LostClaim:
            return
        if trial is None:
            self._accept_unfound(task)
        elif trial.refusal is None:
            self._post(task, trial, outcome_listener)
        else:
            self._wait_for_account(task, trial.refusal, outcome_listener)

    def _post(self, task: Task, trial: Trial, outcome_listener: CreateOutcome | None) -> None:
        try:
            created = self._provider.create(
                task.request, external_task_id=task.external_task_id, callback_url=task.callback_url
            )
        except AccountRefused as error:
            task.model = task.model or self._provider.request_facts(task.request).model
            with self._database.write() as session:
                if isinstance(error, ModelRefused):
                    pauses.learned_nothing(session, trial, of_model=False)
                pauses.pause(session, task.provider, task.model, error)
            self._wait_for_account(task, error, outcome_listener)
        except Unavailable as error:
            self._end_trial(trial, error)
            self._unclear(task, error)
        except (ProviderThrottled, ProviderRejected) as error:
            self._end_trial(trial, error)
            self._settle_refusal(task, error, outcome_listener)
        else:
            self._end_trial(trial, None)
            self._settle(task, created.report)

    def _end_trial(self, trial: Trial, error: Retry | ProviderRejected | None) -> None:
        """Report the answer to the pauses whose trial this create was. `error` None: the create was accepted."""
        if not trial.of or (isinstance(error, Unavailable) and error.sent):
            return
        with self._database.write() as session:
            if isinstance(error, Unavailable):
                pauses.give_back(session, trial)
                return
            if isinstance(error, ProviderRejected):
                pauses.learned_nothing(session, trial)
            else:
                pauses.resume(session, trial, keys_alone=error is not None)
            self._database.wake(session)

    def _wait_for_account(self, task: Task, error: AccountRefused, outcome_listener: CreateOutcome | None) -> None:
        """Put the task back into its paused queue. If a gateway client waits, it gets the refusal and the row ends."""
        if outcome_listener and outcome_listener.refuse(error):
            self._fail(task, str(error), outcome_listener)
            return
        with suppress(LostClaim), self._database.write() as session:
            self._settle_queued(session, task, str(error), 0, model=task.model, **claims.NO_ATTEMPTS)

    def _settle_queued(self, session: Session, task: Task, note: str, wait: float, **values: Any) -> None:
        """Put the task back into its queue, unless it was called back meanwhile: then the next claim ends this step.

        From the queue a task that has ended would be given slots, which no later report gives back.
        """
        tasks.lock_claimed(session, task)
        if _is_called_back(session, task):
            claims.settle(session, task, due_in=0, note=note, sent_at=None)
            return
        again = {"queued_at": db_now(wait), "slots": -abs(task.slots), "sent_at": None, **values}
        claims.settle(session, task, due_in=None, note=note, **again)

    def _settle_refusal(
        self, task: Task, error: ProviderThrottled | ProviderRejected, outcome_listener: CreateOutcome | None
    ) -> None:
        if isinstance(error, ProviderThrottled):
            is_full = isinstance(error, ProviderFull) and self._slots.setting is not None
            if outcome_listener and outcome_listener.refuse(error):
                if is_full:
                    self._lower_limit(task)
                self._fail(task, str(error), outcome_listener)
                return
            wait = claims.backoff(task.attempts, base=THROTTLE_BASE_SECONDS, cap=THROTTLE_CAP_SECONDS)
            wait = max(error.after or 0, wait, THROTTLE_BASE_SECONDS)
            if is_full:
                self._queue_again(task, str(error), wait)
            else:
                self._later(task, str(error), wait, waits_its_turn=True, sent_at=None)
        elif isinstance(error, AlreadyExists):
            self._look_up(task, error, outcome_listener)
        else:
            self._refused(task, str(error), error, outcome_listener)

    def _lower_limit(self, task: Task) -> None:
        with self._database.write() as session:
            self._slots.refused(session, task.slots)

    def _queue_again(self, task: Task, note: str, wait: float) -> None:
        """The provider is full below our limit: lower the limit and put the task back into the queue."""
        try:
            with self._database.write() as session:
                limit = self._slots.refused(session, task.slots)
                self._settle_queued(session, task, note, wait)
        except LostClaim:
            return
        log.warning("slots.refused", **tasks.named(task), limit=limit, note=note, seconds=round(wait, 1))

    def _unclear(self, task: Task, error: Unavailable) -> None:
        if error.sent:
            self._later(task, str(error), max(error.after or 0, LOOK_UP_SECONDS), missed_at=None)
        else:
            self._later(task, str(error), max(error.after or 0, claims.backoff(task.attempts)), sent_at=None)

    def _look_up(
        self, task: Task, already: AlreadyExists | None = None, outcome_listener: CreateOutcome | None = None
    ) -> None:
        """Read the task by our id. `already`: the provider answered that the id exists."""
        try:
            record = read_task(
                self._provider,
                self._read_rate_limit,
                provider_task_id=None,
                external_task_id=task.external_task_id,
                made_at=None if task.adopt else task.created_at,
            )
        except (Retry, ProviderRejected) as error:
            if self._was_called_back(task):
                self._accept_unfound(task)
            else:
                self._unanswered(task, error)
            return
        now = self._database.now()
        ahead = max(now.timestamp() - time.time() + (self._provider.clock_ahead_seconds or 0), 0)
        if record is not None and (task.adopt or _is_ours(task, record.report, already, now, timedelta(seconds=ahead))):
            self._settle(task, record.report)
        elif self._was_called_back(task):
            self._accept_unfound(task)
        elif record is None and not already:
            self._missed(task)
        elif record is None and 1 < task.attempts < UNREAD_TRIES:
            self._later(task, f"cannot be read yet: {already}", NOT_FOUND_AGAIN_SECONDS, missed_at=None)
        else:
            words = f"{task.external_task_id} already exists at the provider and is not ours; "
            self._refused(task, words + "`receiver submit --adopt` takes it over", already, outcome_listener)

    def _unanswered(self, task: Task, error: Retry | ProviderRejected) -> None:
        """Read again later. After a whole result lifetime the provider has nothing left, and the task fails."""
        days = self._age_seconds(task.sent_at or task.created_at) / 86_400
        if days * 86_400 > self._schedule.result_lifetime_seconds:
            self._fail(task, f"sent {days:.1f} days ago, and {NO_ANSWER}: {error}")
            return
        after = error.after if isinstance(error, Retry) else None
        self._later(task, str(error), max(after or 0, claims.backoff(task.attempts)))

    def _age_seconds(self, since: datetime) -> float:
        return (self._database.now() - since).total_seconds()

    def _missed(self, task: Task) -> None:
        now = self._database.now()
        since = self._seconds_since_miss(task, now)
        if since < 0:  # no miss yet, or the clock was set back after it
            wait = max(NOT_FOUND_AGAIN_SECONDS, claims.backoff(task.attempts))  # less often after each lost POST
            if len(self._misses) >= MAX_MISSES:
                self._misses.clear()
            self._misses[task.id] = now, time.monotonic()
            self._later(task, "looking up whether it arrived", wait, missed_at=now)
        elif since < NOT_FOUND_AGAIN_SECONDS:
            self._later(task, "looking up whether it arrived", NOT_FOUND_AGAIN_SECONDS - since)
        else:
            self._send_once(task)

    def _seconds_since_miss(self, task: Task, now: datetime) -> float:
        """How long ago the task was first not found; negative: never. If this process noted it, a clock that was set
        forward since makes it no longer.
        """
        if task.missed_at is None:
            return -1.0
        age = (now - task.missed_at).total_seconds()
        noted_at, began = self._misses.get(task.id, (None, 0.0))
        return min(age, time.monotonic() - began) if noted_at == task.missed_at else age

    def _later(self, task: Task, note: str, due_in: float, *, waits_its_turn: bool = False, **values: Any) -> None:
        """Try again later. `waits_its_turn`: the provider asked for the delay, so it is never logged as an error."""
        try:
            with self._database.write() as session:
                claims.settle(session, task, due_in=due_in, note=note, **values)
                age = tasks.now(session) - task.created_at
        except LostClaim:
            return
        is_old = age.total_seconds() > OVERDUE_SECONDS and task.attempts >= OVERDUE_TRIES
        overdue = is_old and not waits_its_turn
        facts = {**tasks.named(task), "note": note, "seconds": round(due_in, 1)}
        if overdue:
            log.error("task.create_not_confirmed", **facts)
        elif waits_its_turn:
            log.info("task.create_retry_scheduled", **facts)
        else:
            log.warning("task.create_retry_scheduled", **facts)

    def _was_called_back(self, task: Task) -> bool:
        with self._database.read() as session:
            return _is_called_back(session, task)

    def _accept_unfound(self, task: Task) -> None:
        """End the create of a task that was called back and that no query finds: it is read from now on.

        Only the provider's own word gives it an id: a signed delivery, or a read. Without any it ends as silent tasks
        do.
        """
        self._settle(task, Report(None, None, TaskState.SUBMITTED), is_found=False)

    def _refused(
        self, task: Task, message: str, refusal: ProviderRejected | None, outcome_listener: CreateOutcome | None
    ) -> None:
        has_refusal = outcome_listener is not None and refusal is not None and outcome_listener.refuse(refusal)
        self._fail(task, message, outcome_listener if has_refusal else None)

    def _fail(self, task: Task, message: str, listener: CreateOutcome | None = None) -> None:
        """Fail the row. `listener`: the client that already has the answer and gets no callback."""
        report = Report(None, None, TaskState.FAILED, message=message)
        if not self._settle(task, report, listener=listener) and listener:
            listener.take_back()

    def _settle(
        self, task: Task, report: Report, *, listener: CreateOutcome | None = None, is_found: bool = True
    ) -> bool:
        """End the create step. The ranks of states decide, because a callback may have come before this answer.

        `is_found` False: no query finds the task, which was called back. The row keeps that fact, because deliveries
        are pruned. Unless it has an id of the provider, it is read at once, and its note says so. Returns whether the
        lease was still ours and the row took the report's state.
        """
        if report.status is None:
            report = Report(report.provider_task_id, report.external_task_id, TaskState.SUBMITTED)

        def settle(session: Session) -> Task:
            row = tasks.lock_claimed(session, task)
            claims.rest(row)
            row.note, row.step = tasks.request_note(row), None
            row.request = self._provider.redacted(row.request)
            reports.apply(session, row, report, self._schedule, now=tasks.now(session), pushed=False)
            if not is_found:
                row.called_back_at = max(row.called_back_at or row.created_at, row.created_at)
            if not is_found and row.provider_task_id is None:
                row.note = tasks.NOT_FOUND
                reports.reschedule(session, row, self._schedule, read_now=True)
            decide_again(session, row)  # deliveries that came before this answer
            if listener and row.state is report.status:
                row.client_callback_url = None
            self._database.wake(session)
            return row

        try:
            row = self._database.write_in_group(settle, task_id=task.id)
        except LostClaim:
            return False
        log.info("task.create_settled", **tasks.named(task), state=row.state, error=row.error)
        if row.note == tasks.NOT_FOUND:
            log.warning("task.create_not_found", **tasks.named(task), note=row.note)
        return row.state is report.status


def _is_called_back(session: Session, task: Task) -> bool:
    return bool(execute(session, _CALLED_BACK, {"wanted": task.id}).rows)


def _is_ours(task: Task, report: Report, already: AlreadyExists | None, now: datetime, clock_ahead: timedelta) -> bool:
    """Whether the task read back was made by our request, and not earlier by someone else.

    `clock_ahead`: by how much the database's clock is ahead of the provider's.
    A gateway may omit its time, and a row of the future was made before the clock was set back. The task is then ours
    only if our own request was unclear.
    """
    if is_namesake(report, task.external_task_id):
        return False
    made_at = report.created_at
    is_younger = made_at is not None and made_at + clock_ahead >= task.created_at - CLOCK_TOLERANCE
    return is_younger or (already is None and (made_at is None or task.created_at > now))
