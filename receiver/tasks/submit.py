"""Ask for pictures, once: the row is committed before the request leaves, and an unclear answer is looked up.

row (queued: no slots free) ─▶ admitted and claimed by a worker, see `storage.accounts.slots`, then the same
row (claimed, sent_at) ─▶ POST ─┬─ accepted ───────────────▶ submitted
                                ├─ refused for good ───────▶ failed
                                ├─ account refused ────────▶ back to the queue, see `storage.accounts.pauses`
                                ├─ slow down (1302) ───────▶ due again, nothing was made
                                ├─ full (1303) ────────────▶ due again, or with slots of our own: back to the queue
                                └─ unclear ────────────────▶ due: read by external id ─┬─ there ▶ submitted
                                                              (worker, or us)          └─ twice not there,
                                                                                          10 s apart ▶ POST again
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import structlog
from sqlmodel import Session

from receiver.base.tokens import Tokens
from receiver.providers.base import (
    AlreadyExists,
    Created,
    Provider,
    ProviderRequest,
    Record,
    RequestInvalid,
    Unavailable,
)
from receiver.providers.lookup import read_task
from receiver.tasks.create_outcome import CreateOutcome
from storage.accounts import pauses, slots
from storage.accounts.pauses import Trial
from storage.accounts.rate_limit import ReadRateLimit
from storage.accounts.slots import Slots
from storage.database.clock import db_now
from storage.database.sessions import Database
from storage.errors import (
    AccountRefused,
    LostClaim,
    NoSlots,
    NoSuchTask,
    ProviderFull,
    ProviderRejected,
    ProviderThrottled,
    ProviderUnavailable,
    Retry,
    UserError,
)
from storage.keys import check_new_id
from storage.rows import claims, tasks
from storage.rows.events import EventName, record
from storage.rows.lease_renewal import renewing_lease
from storage.rows.models import Task
from storage.states import ArchiveState, Report, Step, TaskState

log = structlog.get_logger()

# A provider's list may lag behind its creates: "not found" is believed from the second read on, this much later.
NOT_FOUND_AGAIN_SECONDS = 10
# Our clock and the provider's may differ by this much when we ask whose task an existing one is.
CLOCK_TOLERANCE = timedelta(seconds=60)
# After an unclear answer the look-up may start at once; a moment gives the provider time to have the task.
LOOK_UP_SECONDS = 1
# "Already exists", yet not to be read: ours if reads lag that far behind, else another product's. About 90 s.
UNREAD_TRIES = 10
# A create that nobody could tell us about for an hour is no hiccup any more: each further try is an error in the log.
# Five tries, because a task that waited an hour for its slots has only just begun.
OVERDUE_SECONDS, OVERDUE_TRIES = 3_600, 5
# 1302/1303: exponential from 1 s (KLING §6); half a minute's cap keeps slots from idling long.
THROTTLE_BASE_SECONDS, THROTTLE_CAP_SECONDS = 1.0, 30.0

ALL_HELD = "all slots of the account are held"

Refused = Literal["conflict", "exists"]


class Conflict(UserError):
    """The external id is taken by another request. Nothing was sent."""


@dataclass(frozen=True)
class Submitted:
    """The task row after the create was tried. `new` False: the same request was submitted before."""

    task: Task
    new: bool


class Submitter:
    """Sends requests. Workers take over what a dead or unlucky submitter left behind."""

    def __init__(
        self,
        database: Database,
        provider: Provider,
        tokens: Tokens,
        schedule: tasks.Schedule,
        *,
        public_url: str | None,
        read_rate_limit: ReadRateLimit,
        lease_seconds: float = 60,
        slots: Slots | None = None,
    ) -> None:
        self._database = database
        self._provider = provider
        self._tokens = tokens
        self._schedule = schedule
        self._public_url = public_url
        self._read_rate_limit = read_rate_limit
        self._lease_seconds = lease_seconds
        self._slots = slots or Slots(provider.name)

    def submit(
        self,
        request: ProviderRequest | Mapping[str, Any],
        *,
        external_task_id: str | None = None,
        adopt: bool = False,
    ) -> Submitted:
        """Commit a task row, then send its request once.

        A crash half-way leaves the row; a worker finds out whether the request had arrived and never sends it twice.
        `external_task_id`: the caller's, ≤ 200 bytes when percent-encoded; None = a fresh UUID. `adopt`: take over
        a task that already exists at the provider under this id, also when that was the reason it failed here before.
        The same id with the same request returns the task that exists and sends nothing. A task that is not yet
        accepted, or for which no slots are free, comes back in state `created`; it goes on from its row. Raises
        `RequestInvalid` (one line per fault), `IdInvalid` and `Conflict`.
        """
        wanted = self.parse(request) if isinstance(request, Mapping) else request
        task = self.row(wanted, external_task_id or str(uuid.uuid4()), adopt=adopt)
        with self._database.write() as session:
            new = self.insert(session, task, queue=True)
        if not new:
            return Submitted(self._existing(task), new=False)
        if task.queued_at is None:
            self.send(task)
        return Submitted(self._again(task.external_task_id), new=True)

    def parse(self, fields: Mapping[str, Any]) -> ProviderRequest:
        """Check a caller's fields. Raises `RequestInvalid` with every fault found."""
        return self._provider.parse_request(fields)

    def row(self, request: ProviderRequest, external_task_id: str | None, *, adopt: bool = False) -> Task:
        """A row for `request`, in no database yet. Without a caller's id its external id is its own.

        Raises `IdInvalid`, and `RequestInvalid` when it asks for more pictures at once than the account may have.
        """
        if self._slots.setting is not None and request.slots > self._slots.setting and not adopt:
            allowed = f"the account has {self._slots.setting} slots (RECEIVER_KLING_SLOTS)"
            raise RequestInvalid([f"asks for up to {request.slots} pictures at once, {allowed}"])
        own_id = uuid.uuid4()
        external_task_id = str(own_id) if external_task_id is None else external_task_id
        check_new_id(external_task_id)
        task = Task(id=own_id, external_task_id=external_task_id, provider=self._provider.name, request=request.wire())
        task.request_hash = request.canonical_hash()
        task.series, task.expected, task.adopt, task.model = request.series, request.expected, adopt, request.model
        if self._public_url:
            token = self._tokens.sign(self._provider.name, task.id)
            task.callback_url = f"{self._public_url}/callbacks/{self._provider.name}/{token}"
        task.step, task.slots = Step.CREATE, request.slots
        return task

    def insert(self, session: Session, task: Task, *, queue: bool = False) -> bool:
        """Insert a row, claimed and sent just now, unless its external id is taken. Returns whether it was.

        Then `send` it. `queue`: while its slots are not free, or the account is paused, it waits in the queue instead
        (`queued_at` is set: do not send it). Without, raises `NoSlots` or `AccountRefused` then, and the caller's
        transaction must come to nothing.
        """
        refusal = pauses.refusal(session, task.provider, task.model)
        if refusal and not queue:
            raise refusal
        free = self._slots.reserve(session, task.slots) and refusal is None
        task.created_at = task.sent_at = tasks.now(session)
        claims.take(task, task.created_at, self._lease_seconds)
        if not free:
            slots.wait(task, task.created_at)
        new = tasks.insert_new(session, task)
        if new and not free and not queue:
            raise NoSlots(ALL_HELD)
        return new

    def insert_again(self, session: Session, wanted: Task) -> Task | None:
        """Put `wanted` in the place of a row of the same external id that the provider refused to make.

        The row keeps its id and its facts. Returns it claimed, to be `send`-ed; None: the id is taken.
        Raises `NoSlots` and `AccountRefused`.
        """
        if refusal := pauses.refusal(session, wanted.provider, wanted.model):
            raise refusal
        free = self._slots.reserve(session, wanted.slots)
        found = tasks.by_external_id(session, wanted.external_task_id)
        row = tasks.lock(session, found.id) if found else None
        if row is None or not _can_be_adopted(row) or row.lease is not None or row.deleted_at is not None:
            return None
        if not free:
            raise NoSlots(ALL_HELD)
        row.slots = wanted.slots
        row.request, row.request_hash = wanted.request, wanted.request_hash
        row.client, row.client_callback_url = wanted.client, wanted.client_callback_url
        row.series, row.expected, row.adopt, row.model = wanted.series, wanted.expected, False, wanted.model
        row.state, row.archive = TaskState.CREATED, ArchiveState.NONE
        row.error = row.note = row.completed_at = None
        row.submitted_at = row.reported_at = row.missed_at = None
        row.step, row.polls = Step.CREATE, 0
        row.created_at = row.sent_at = tasks.now(session)
        claims.take(row, row.created_at, self._lease_seconds)
        record(session, EventName.TASK_CREATED, row.id, {"external_task_id": row.external_task_id, "again": True})
        session.flush()
        return row

    def send(self, task: Task, outcome_listener: CreateOutcome | None = None) -> None:
        """Send a row that was inserted, and settle its create. `outcome_listener`: hears of a refusal, which ends it.

        Its claim is renewed meanwhile. One that was lost before (it waited too long) sends nothing: who has it does.
        """
        with self._renewing_lease(task):
            self._send_once(task, outcome_listener)

    def _renewing_lease(self, task: Task) -> AbstractContextManager[None]:
        return renewing_lease(self._database, task, lease_seconds=self._lease_seconds)

    def _existing(self, wanted: Task) -> Task:
        task = self._again(wanted.external_task_id)
        if task.request_hash != wanted.request_hash:
            raise Conflict(f"{task.external_task_id} was submitted before with another request; choose another id")
        if wanted.adopt and _can_be_adopted(task):
            self._adopt(task.id, wanted.request)
            return self._again(task.external_task_id)
        return task

    def _adopt(self, task_id: uuid.UUID, request: dict[str, Any]) -> None:
        """Claim a row whose create failed here and look again for what the provider has under its id."""
        wanted = self._provider.request_facts(request).slots
        with self._database.write() as session:
            free = self._slots.reserve(session, wanted)
            task = tasks.lock(session, task_id)
            if task is None or not _can_be_adopted(task):
                return
            task.state, task.archive, task.adopt = TaskState.CREATED, ArchiveState.NONE, True
            task.error = task.note = task.completed_at = None
            task.request, task.step, task.slots = request, Step.CREATE, wanted
            task.sent_at, task.missed_at = tasks.now(session), None
            claims.take(task, task.sent_at, self._lease_seconds)
            if not free:  # when its turn comes, `sent_at` makes a worker look before it sends
                task.sent_at = slots.wait(task, task.sent_at)
        if free:
            with self._renewing_lease(task):
                self._look_up(task)

    def _again(self, external_task_id: str) -> Task:
        with self._database.read() as session:
            task = tasks.by_external_id(session, external_task_id)
        if task is None:
            raise NoSuchTask(external_task_id)  # removed while it was submitted
        return task

    def work(self, task: Task) -> None:
        """Go on with a claimed row in step `create`: send it if it never left, else find out whether it arrived."""
        if task.losses >= claims.PARK_LOSSES:
            self._fail(task, f"ended its worker {task.losses} times; `receiver submit --adopt` looks again")
        elif task.sent_at is not None:
            self._look_up(task)
        else:
            self._send_once(task)

    def _send_once(self, task: Task, outcome_listener: CreateOutcome | None = None) -> None:
        """POST it, if the claim is still ours and the account is not paused. The lease begins anew right before."""
        due_at = db_now(self._lease_seconds)
        try:
            with self._database.write() as session:
                trial = pauses.begin(session, task.provider, task.model)
                if trial.refusal is None:
                    claims.update_claimed(session, task, due_at=due_at, sent_at=db_now(), missed_at=None)
        except LostClaim:
            return
        if trial.refusal is None:
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
            self._accept(task, created)

    def _end_trial(self, trial: Trial, error: Retry | ProviderRejected | None) -> None:
        """Say what the answer means for the pauses that the create was a trial of. `error` None: it was accepted."""
        if not trial.of or (isinstance(error, Unavailable) and error.sent):
            return
        with self._database.write() as session:
            if isinstance(error, Unavailable):
                pauses.give_back(session, trial)
            else:
                pauses.resume(session, trial, keys_alone=error is not None)
                self._database.wake(session)

    def _wait_for_account(self, task: Task, error: AccountRefused, outcome_listener: CreateOutcome | None) -> None:
        """Put the task back into its queue, which stands still; a client that waits is told, which ends its row."""
        if outcome_listener and outcome_listener.tell(error):
            self._fail(task, str(error), outcome_listener)
            return
        with suppress(LostClaim), self._database.write() as session:
            self._settle_queued(session, task, str(error), 0, model=task.model, **claims.NO_ATTEMPTS)

    def _settle_queued(self, session: Session, task: Task, note: str, wait: float, **values: Any) -> None:
        again = {"queued_at": db_now(wait), "slots": -abs(task.slots), "sent_at": None, **values}
        claims.settle(session, task, due_in=None, note=note, **again)

    def _settle_refusal(
        self, task: Task, error: ProviderThrottled | ProviderRejected, outcome_listener: CreateOutcome | None
    ) -> None:
        if isinstance(error, ProviderThrottled):
            is_full = isinstance(error, ProviderFull) and self._slots.setting is not None
            if outcome_listener and outcome_listener.tell(error):
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
        """The account is fuller than we thought: fewer slots from now on, and this task waits for its own anew."""
        try:
            with self._database.write() as session:
                limit = self._slots.refused(session, task.slots)
                self._settle_queued(session, task, note, wait)
        except LostClaim:
            return
        log.warning("slots.refused", task=task.external_task_id, limit=limit, note=note, seconds=round(wait, 1))

    def _unclear(self, task: Task, error: Unavailable) -> None:
        if error.sent:
            self._later(task, str(error), max(error.after or 0, LOOK_UP_SECONDS), missed_at=None)
        else:
            self._later(task, str(error), max(error.after or 0, claims.backoff(task.attempts)), sent_at=None)

    def _look_up(
        self, task: Task, already: AlreadyExists | None = None, outcome_listener: CreateOutcome | None = None
    ) -> None:
        """Read the task by our id. `already`: the provider's words that it exists."""
        try:
            record = read_task(
                self._provider,
                self._read_rate_limit,
                provider_task_id=None,
                external_task_id=task.external_task_id,
                made_at=None if task.adopt else task.created_at,
            )
        except (Retry, ProviderRejected) as error:
            self._unanswered(task, error)
            return
        if record is not None and (task.adopt or _is_ours(task, record.report, already)):
            self._accept(task, record)
        elif record is None and not already:
            self._missed(task)
        elif record is None and 1 < task.attempts < UNREAD_TRIES:
            self._later(task, f"cannot be read yet: {already}", NOT_FOUND_AGAIN_SECONDS, missed_at=None)
        else:
            words = f"{task.external_task_id} already exists at the provider and is not ours; "
            self._refused(task, words + "`receiver submit --adopt` takes it over", already, outcome_listener)

    def _unanswered(self, task: Task, error: Retry | ProviderRejected) -> None:
        """Ask again later; after a whole result lifetime there is nothing left to be found, and the task ends."""
        days = self._age_seconds(task.sent_at or task.created_at) / 86_400
        if days * 86_400 > self._schedule.result_lifetime_seconds:
            self._fail(task, f"sent, and for {days:.1f} days no answer whether it arrived: {error}")
            return
        after = error.after if isinstance(error, Retry) else None
        self._later(task, str(error), max(after or 0, claims.backoff(task.attempts)))

    def _age_seconds(self, since: datetime) -> float:
        return (self._database.now() - since).total_seconds()

    def _missed(self, task: Task) -> None:
        since = self._age_seconds(task.missed_at) if task.missed_at else None
        if since is None:
            wait = max(NOT_FOUND_AGAIN_SECONDS, claims.backoff(task.attempts))  # sent in vain again and again: rarer
            self._later(task, "looking up whether it arrived", wait, missed_at=db_now())
        elif since < NOT_FOUND_AGAIN_SECONDS:
            self._later(task, "looking up whether it arrived", NOT_FOUND_AGAIN_SECONDS - since)
        else:
            self._send_once(task)

    def _later(self, task: Task, note: str, due_in: float, *, waits_its_turn: bool = False, **values: Any) -> None:
        """Try again. `waits_its_turn`: the provider said so clearly, which is no reason for an alarm."""
        try:
            with self._database.write() as session:
                claims.settle(session, task, due_in=due_in, note=note, **values)
                age = tasks.now(session) - task.created_at
        except LostClaim:
            return
        is_old = age.total_seconds() > OVERDUE_SECONDS and task.attempts >= OVERDUE_TRIES
        overdue = is_old and not waits_its_turn
        facts = {"task": task.external_task_id, "note": note, "seconds": round(due_in, 1)}
        log.error("task.create_overdue", **facts) if overdue else log.info("task.create_later", **facts)

    def _accept(self, task: Task, answer: Created | Record) -> None:
        self._settle(task, answer.report)

    def _refused(
        self, task: Task, message: str, refusal: ProviderRejected | None, outcome_listener: CreateOutcome | None
    ) -> None:
        told = outcome_listener is not None and refusal is not None and outcome_listener.tell(refusal)
        self._fail(task, message, outcome_listener if told else None)

    def _fail(self, task: Task, message: str, told: CreateOutcome | None = None) -> None:
        """`told`: who knows of it already, and wants no callback."""
        if not self._settle(task, Report(None, None, TaskState.FAILED, message=message), told=told) and told:
            told.take_back()

    def _settle(self, task: Task, report: Report, *, told: CreateOutcome | None = None) -> bool:
        """End the create step under the ranks of states: a callback may have come before this answer.

        Returns whether the claim was still ours and the row took the report's state.
        """
        if report.status is None:
            report = Report(report.provider_task_id, report.external_task_id, TaskState.SUBMITTED)
        try:
            with self._database.write() as session:
                row = tasks.lock_claimed(session, task)
                claims.rest(row)
                row.note = row.step = None
                row.request = self._provider.redacted(row.request)
                tasks.apply(session, row, report, self._schedule, now=tasks.now(session), pushed=False)
                if told and row.state is report.status:
                    row.client_callback_url = None
                self._database.wake(session)
        except LostClaim:
            return False
        log.info("task.create_settled", task=task.external_task_id, state=row.state, error=row.error)
        return row.state is report.status


def _can_be_adopted(task: Task) -> bool:
    return task.state is TaskState.FAILED and task.provider_task_id is None


def _is_ours(task: Task, report: Report, already: AlreadyExists | None) -> bool:
    """Whether the task read back was made by our row's request and not long before it by someone else."""
    if report.created_ms is None:
        return already is None  # a gateway that hides the time: believed only when our own request was in doubt
    return datetime.fromtimestamp(report.created_ms / 1000, UTC) >= task.created_at - CLOCK_TOLERANCE


__all__ = ["Conflict", "ProviderUnavailable", "Submitted", "Submitter"]
