"""Ask for pictures, once: the row is committed before the request leaves, and an unclear answer is looked up.

row (claimed, sent_at) ─▶ POST ─┬─ accepted ───────────────▶ submitted
                                ├─ refused for good ───────▶ failed
                                ├─ slow down (1302, 1303) ─▶ due again, nothing was sent
                                └─ unclear ────────────────▶ due: read by external id ─┬─ there ▶ submitted
                                                              (worker, or us)          └─ twice not there,
                                                                                          10 s apart ▶ POST again
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import structlog

from receiver.lookup import read_task
from receiver.provider import AlreadyExists, Created, Provider, Record, Unavailable
from receiver.providers.kling_request import OmniImageRequest, parse_request
from receiver.tokens import Tokens
from storage import claims, tasks
from storage.database import Database, clock
from storage.errors import LostClaim, ProviderRejected, ProviderThrottled, ProviderUnavailable, Retry
from storage.keys import encode_id
from storage.models import Task
from storage.pace import ReadLimit
from storage.states import Report, Step, TaskState

log = structlog.get_logger()

# A provider's list may lag behind its creates: "not found" is believed from the second read on, this much later.
NOT_FOUND_AGAIN_SECONDS = 10
# Our clock and the provider's may differ by this much when we ask whose task an existing one is.
CLOCK_TOLERANCE = timedelta(seconds=60)
# After an unclear answer the look-up may start at once; a moment gives the provider time to have the task.
LOOK_UP_SECONDS = 1
# "Already exists", yet not to be read: ours if reads lag that far behind, else another product's. About 90 s.
UNREAD_TRIES = 10
# 1302/1303: exponential from 1 s (KLING §6); half a minute's cap keeps slots from idling long.
THROTTLE_BASE_SECONDS, THROTTLE_CAP_SECONDS = 1.0, 30.0

Refused = Literal["conflict", "exists"]


class Conflict(Exception):
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
        read_limit: ReadLimit,
        lease_seconds: float = 60,
    ) -> None:
        self._database = database
        self._provider = provider
        self._tokens = tokens
        self._schedule = schedule
        self._public_url = public_url
        self._read_limit = read_limit
        self._lease_seconds = lease_seconds

    def submit(
        self,
        request: OmniImageRequest | Mapping[str, Any],
        *,
        external_task_id: str | None = None,
        adopt: bool = False,
    ) -> Submitted:
        """Commit a task row, then send its request once.

        A crash half-way leaves the row; a worker finds out whether the request had arrived and never sends it twice.
        `external_task_id`: the caller's, ≤ 200 bytes when percent-encoded; None = a fresh UUID. `adopt`: take over
        a task that already exists at the provider under this id, also when that was the reason it failed here before.
        The same id with the same request returns the task that exists and sends nothing. A task that is not yet
        accepted comes back in state `created`; it goes on from its row. Raises `RequestInvalid` (one line per fault),
        `ValueError` (the id) and `Conflict`.
        """
        wanted = request if isinstance(request, OmniImageRequest) else parse_request(request)
        task = self._row(wanted, external_task_id or str(uuid.uuid4()), adopt)
        with self._database.write() as session:
            task.created_at = tasks.now(session)
            task.sent_at = task.created_at
            task.due_at = task.created_at + timedelta(seconds=self._lease_seconds)
            new = tasks.insert_new(session, task)
        if not new:
            return Submitted(self._existing(task), new=False)
        self._post(task)
        return Submitted(self._again(task.external_task_id), new=True)

    def _row(self, request: OmniImageRequest, external_task_id: str, adopt: bool) -> Task:
        encode_id(external_task_id)
        task = Task(external_task_id=external_task_id, provider=self._provider.name, request=request.wire())
        task.request_hash = request.canonical_hash()
        task.series, task.expected, task.adopt = request.series, request.expected, adopt
        if self._public_url:
            token = self._tokens.sign(self._provider.name, task.id)
            task.callback_url = f"{self._public_url}/callbacks/{self._provider.name}/{token}"
        task.step, task.lease, task.attempts = Step.CREATE, uuid.uuid4(), 1
        return task

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
        with self._database.write() as session:
            task = tasks.lock(session, task_id)
            if task is None or not _can_be_adopted(task):
                return
            task.state, task.error, task.completed_at, task.adopt = TaskState.CREATED, None, None, True
            task.request, task.step, task.lease, task.attempts = request, Step.CREATE, uuid.uuid4(), 1
            task.sent_at, task.missed_at = tasks.now(session), None
            task.due_at = task.sent_at + timedelta(seconds=self._lease_seconds)
        self._look_up(task)

    def _again(self, external_task_id: str) -> Task:
        with self._database.read() as session:
            task = tasks.by_external_id(session, external_task_id)
        if task is None:
            raise LookupError(f"{external_task_id} was removed while it was submitted")
        return task

    def work(self, task: Task) -> None:
        """Go on with a claimed row in step `create`: send it if it never left, else find out whether it arrived."""
        if task.losses >= claims.PARK_LOSSES:
            self._fail(task, f"ended its worker {task.losses} times; `receiver submit --adopt` looks again")
        elif task.sent_at is not None:
            self._look_up(task)
        elif self._mark_sent(task):
            self._post(task)

    def _mark_sent(self, task: Task) -> bool:
        try:
            with self._database.write() as session:
                claims.keep(session, task, sent_at=clock(), missed_at=None)
        except LostClaim:
            return False
        return True

    def _post(self, task: Task) -> None:
        try:
            created = self._provider.create(
                task.request, external_task_id=task.external_task_id, callback_url=task.callback_url
            )
        except ProviderThrottled as error:
            wait = claims.backoff(task.attempts, base=THROTTLE_BASE_SECONDS, cap=THROTTLE_CAP_SECONDS)
            self._later(task, str(error), max(error.after or 0, wait, THROTTLE_BASE_SECONDS), sent_at=None)
        except AlreadyExists as error:
            self._look_up(task, already=str(error))
        except ProviderRejected as error:
            self._fail(task, str(error))
        except Unavailable as error:
            self._unclear(task, error)
        else:
            self._accept(task, created)

    def _unclear(self, task: Task, error: Unavailable) -> None:
        if error.sent:
            self._later(task, str(error), max(error.after or 0, LOOK_UP_SECONDS), missed_at=None)
        else:
            self._later(task, str(error), max(error.after or 0, claims.backoff(task.attempts)), sent_at=None)

    def _look_up(self, task: Task, already: str | None = None) -> None:
        """Read the task by our id. `already`: the provider's words that it exists."""
        try:
            record = read_task(
                self._provider,
                self._read_limit,
                provider_task_id=None,
                external_task_id=task.external_task_id,
                made_at=None if task.adopt else task.created_at,
            )
        except (Retry, ProviderRejected) as error:
            after = error.after if isinstance(error, Retry) else None
            self._later(task, str(error), max(after or 0, claims.backoff(task.attempts)))
            return
        if record is not None and (task.adopt or _is_ours(task, record.report, already)):
            self._accept(task, record)
        elif record is None and not already:
            self._missed(task)
        elif record is None and 1 < task.attempts < UNREAD_TRIES:
            self._later(task, f"cannot be read yet: {already}", NOT_FOUND_AGAIN_SECONDS, missed_at=None)
        else:
            self._fail(task, f"{task.external_task_id} already exists at the provider and is not ours; "
                             "`receiver submit --adopt` takes it over")  # fmt: skip

    def _missed(self, task: Task) -> None:
        with self._database.read() as session:
            moment = tasks.now(session)
        since = (moment - task.missed_at).total_seconds() if task.missed_at else None
        if since is None:
            self._later(task, "looking up whether it arrived", NOT_FOUND_AGAIN_SECONDS, missed_at=clock())
        elif since < NOT_FOUND_AGAIN_SECONDS:
            self._later(task, "looking up whether it arrived", NOT_FOUND_AGAIN_SECONDS - since)
        elif self._mark_sent(task):
            self._post(task)

    def _later(self, task: Task, note: str, due_in: float, **values: Any) -> None:
        try:
            with self._database.write() as session:
                claims.settle(session, task, due_in=due_in, note=note, **values)
        except LostClaim:
            return
        log.info("task.create_later", task=task.external_task_id, note=note, seconds=round(due_in, 1))

    def _accept(self, task: Task, answer: Created | Record) -> None:
        self._settle(task, answer.report)

    def _fail(self, task: Task, message: str) -> None:
        self._settle(task, Report(None, None, TaskState.FAILED, message=message))

    def _settle(self, task: Task, report: Report) -> None:
        """End the create step under the ranks of states: a callback may have come before this answer."""
        if report.status is None:
            report = Report(report.provider_task_id, report.external_task_id, TaskState.SUBMITTED)
        try:
            with self._database.write() as session:
                row = tasks.lock_claimed(session, task)
                row.lease, row.losses, row.note, row.step = None, 0, None, None
                row.request = self._provider.redacted(row.request)
                tasks.apply(session, row, report, self._schedule, now=tasks.now(session), pushed=False)
                self._database.wake(session)
        except LostClaim:
            return
        log.info("task.create_settled", task=task.external_task_id, state=row.state, error=row.error)


def _can_be_adopted(task: Task) -> bool:
    return task.state is TaskState.FAILED and task.provider_task_id is None


def _is_ours(task: Task, report: Report, already: str | None) -> bool:
    """Whether the task read back was made by our row's request and not long before it by someone else."""
    if report.created_ms is None:
        return already is None  # a gateway that hides the time: believed only when our own request was in doubt
    return datetime.fromtimestamp(report.created_ms / 1000, UTC) >= task.created_at - CLOCK_TOLERANCE


__all__ = ["Conflict", "ProviderUnavailable", "Submitted", "Submitter"]
