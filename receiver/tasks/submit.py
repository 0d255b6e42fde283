"""Submitting: a task row is committed before its request is sent, so a crash never loses or doubles a task.

`create_step.py` sends the request and settles the answer.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from sqlmodel import Session

from receiver.base.config import SettingsInvalid
from receiver.base.tokens import Tokens
from receiver.providers.base import (
    Provider,
    ProviderRequest,
    RequestInvalid,
)
from receiver.tasks.create_step import CreateStep
from storage.accounts import pauses, slots
from storage.accounts.accepted_creates import may_prove_accepted, was_accepted
from storage.accounts.slots import Slots
from storage.database.sessions import Database, again_on_new_session
from storage.errors import (
    AccountRefused,
    DatabaseUnavailable,
    NoRoom,
    NoSlots,
    NoSuchTask,
    UserError,
)
from storage.keys import check_new_id
from storage.operations.counted import counted
from storage.rows import claims, tasks
from storage.rows.events import EventName, record
from storage.rows.models import Task
from storage.states import ArchiveState, Step, TaskState

log = structlog.get_logger()

ALL_HELD = "all slots of the account are held"
NO_CREDENTIALS = "no provider credentials are set, nothing was sent: set RECEIVER_KLING_API_KEY"


class Conflict(UserError):
    """The external id is taken by another request. Nothing was sent."""


@dataclass(frozen=True)
class Submitted:
    """The task row after the create was tried. `new` False: the same request was submitted before."""

    task: Task
    new: bool


class Submitter:
    """Makes the rows of requests, and has `create_step` send them."""

    def __init__(
        self,
        database: Database,
        provider: Provider,
        tokens: Tokens,
        slots: Slots,
        create_step: CreateStep,
        *,
        public_url: str | None,
        lease_seconds: float,
        has_credentials: bool,
    ) -> None:
        self._database = database
        self._provider = provider
        self._tokens = tokens
        self._slots = slots
        self.create_step = create_step
        self._public_url = public_url
        self._lease_seconds = lease_seconds
        self._has_credentials = has_credentials

    def submit(
        self,
        request: ProviderRequest | Mapping[str, Any],
        *,
        external_task_id: str | None = None,
        adopt: bool = False,
    ) -> Submitted:
        """Commit a task row, then send its request once.

        A crash half-way leaves the row. A worker then reads whether the request arrived, and never sends it twice.
        `external_task_id`: the caller's, at most 200 bytes when percent-encoded; None = a new UUID. `adopt`: take over
        a task that exists at the provider under this id, also if the row failed here because of it, or was adopted
        without its request. The same id with the same request returns the task that exists and sends nothing. A task
        that is not yet accepted, or for which no slots or no disk space are free, is returned in state `created`, and a
        worker continues it. Raises `RequestInvalid` (one line per fault), `IdInvalid`, `Conflict`, and without
        credentials `SettingsInvalid`.
        """
        if not self._has_credentials:  # the create would pause the account, also for workers that have a key
            raise SettingsInvalid(NO_CREDENTIALS)
        wanted = self.parse(request) if isinstance(request, Mapping) else request
        external_task_id = str(uuid.uuid4()) if external_task_id is None else external_task_id

        def commit() -> tuple[Task, bool]:
            task = self.row(wanted, external_task_id, adopt=adopt)
            with self._database.write() as session:
                return task, self.insert(session, task, queue=True)

        task, new = again_on_new_session(commit)
        if not new:
            return Submitted(self._existing(task), new=False)
        try:
            if task.queued_at is None:
                self.create_step.send(task)
            return Submitted(self._again(task.external_task_id), new=True)
        except DatabaseUnavailable as error:
            again = (
                f"the task {task.external_task_id} may be paid, and the same request with its id sends nothing twice"
            )
            raise DatabaseUnavailable(f"{error}; {again}") from error

    def parse(self, fields: Mapping[str, Any]) -> ProviderRequest:
        """Check a caller's fields. Raises `RequestInvalid`; see `Provider.parse_request`."""
        return self._provider.parse_request(fields)

    def check_slots(self, request: ProviderRequest) -> None:
        """Raises `RequestInvalid` when it asks for more pictures at once than the account has slots."""
        if self._slots.setting is not None and (wanted := request.slots) > self._slots.setting:
            allowed = f"the account has {counted(self._slots.setting, 'slot')} (RECEIVER_KLING_SLOTS)"
            raise RequestInvalid([f"asks for up to {wanted} pictures at once, {allowed}"])

    def row(self, request: ProviderRequest, external_task_id: str | None, *, adopt: bool = False) -> Task:
        """A row for `request`, not yet inserted. Without a caller's id the external id is the row's own id.

        Raises `IdInvalid`, and `RequestInvalid` when it asks for more pictures at once than the account has slots.
        """
        if not adopt:
            self.check_slots(request)
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
        """Insert a row as claimed and sent, unless its external id is taken. Returns whether it was inserted.

        The caller then sends it (`create_step.send`). `queue`: while its slots are not free, the account is paused or
        the disk has no room for its callback, the row waits in the queue instead (`queued_at` is set), and the caller
        does not send it. Without `queue` that raises `NoSlots`, `AccountRefused` or `NoRoom`, and the caller rolls its
        transaction back. A row of an account that was refused lately may wait in both cases. The call may be repeated
        with the same row after a rollback.
        """
        if not (queue or self._has_credentials):  # the caller would send it, see `submit`
            raise AccountRefused(NO_CREDENTIALS)
        task.queued_at, task.slots = None, abs(task.slots)
        refusal = pauses.refusal(session, task.provider, task.model)
        if refusal and not queue:
            raise refusal
        is_late = self._slots.is_late(session, task)
        has_slots = self._slots.reserve(session, task.slots)
        shortage = self._database.shortage()
        free = has_slots and not is_late and refusal is None and not shortage
        task.created_at = task.sent_at = tasks.now(session)
        claims.take(task, task.created_at, self._lease_seconds)
        if not free:
            slots.wait(task, task.created_at)
        new = tasks.insert_new(session, task)
        if new and shortage and not queue:
            raise NoRoom(shortage)
        if new and not has_slots and not is_late and not queue:
            raise NoSlots(ALL_HELD)
        return new

    def insert_again(self, session: Session, wanted: Task, *, of_client: str | None = None) -> Task | None:
        """Send the request again with the row of the same external id, whose create the provider refused.

        The row keeps its id and takes the request of `wanted`. Returns the claimed row, which the caller sends; None if
        the id is taken: also by a create that may have been accepted, one that was called back and is to be read, and
        another request of a batch. `of_client`: only a row that this client asked for; None: any. Raises `NoSlots`,
        `AccountRefused` and `NoRoom`.
        """
        wanted.queued_at, wanted.slots = None, abs(wanted.slots)  # `insert` may have put it into the queue
        if refusal := pauses.refusal(session, wanted.provider, wanted.model):
            raise refusal
        is_late = self._slots.is_late(session, wanted)
        free = self._slots.reserve(session, wanted.slots)
        found = tasks.by_external_id(session, wanted.external_task_id)
        row = tasks.lock(session, found.id) if found else None
        if row is None or row.state is not TaskState.FAILED or was_accepted(row):
            return None
        if of_client not in (None, row.client):
            return None  # its events are another client's
        if row.lease is not None or row.deleted_at is not None or may_prove_accepted(session, row):
            return None
        if row.batch_id is not None and row.request_hash != wanted.request_hash:
            return None  # the batch would lose this line's order
        if shortage := self._database.shortage():
            raise NoRoom(shortage)
        if not free and not is_late:
            raise NoSlots(ALL_HELD)
        begin_again(row)
        row.slots, row.note = wanted.slots, wanted.note
        row.request, row.request_hash = wanted.request, wanted.request_hash
        row.client, row.client_callback_url = wanted.client, wanted.client_callback_url
        row.series, row.expected, row.adopt, row.model = wanted.series, wanted.expected, False, wanted.model
        row.created_at = row.sent_at = tasks.now(session)
        claims.take(row, row.created_at, self._lease_seconds)
        if is_late:
            slots.wait(row, row.created_at)
        record(session, EventName.TASK_CREATED, row.id, {"external_task_id": row.external_task_id, "again": True})
        session.flush()
        return row

    def _existing(self, wanted: Task) -> Task:
        task = self._again(wanted.external_task_id)
        if task.deleted_at is not None:
            raise Conflict(f"{task.external_task_id} was deleted on {task.deleted_at:%Y-%m-%d}; choose another id")
        if not task.request_hash and not wanted.adopt:
            raise Conflict(
                f"{task.external_task_id} was adopted without its request: "
                "`receiver submit --adopt` takes it for this one"
            )
        if task.request_hash not in ("", wanted.request_hash):
            raise Conflict(f"{task.external_task_id} was submitted before with another request; choose another id")
        if wanted.adopt and _can_be_adopted(task):
            self._adopt(task.id, wanted.request)
            return self._again(task.external_task_id)
        return task

    def _adopt(self, task_id: uuid.UUID, request: dict[str, Any]) -> None:
        """Claim a row whose create failed here, and read the task that the provider has under its id."""
        wanted = self._provider.request_facts(request).slots
        with self._database.write() as session:
            free = self._slots.reserve(session, wanted)
            task = tasks.lock_existing(session, task_id)
            if not _can_be_adopted(task):
                return
            task.state, task.archive, task.adopt = TaskState.CREATED, ArchiveState.NONE, True
            task.error = task.note = task.completed_at = None
            task.request, task.step, task.slots = request, Step.CREATE, wanted
            task.sent_at, task.missed_at = tasks.now(session), None
            claims.take(task, task.sent_at, self._lease_seconds)
            if not free:  # `sent_at` makes a worker read the task, not send it, when its turn comes
                task.sent_at = slots.wait(task, task.sent_at)
        if free:
            self.create_step.look_up(task)

    def _again(self, external_task_id: str) -> Task:
        with self._database.read() as session:
            task = tasks.by_external_id(session, external_task_id)
        if task is None:
            raise NoSuchTask(external_task_id)  # The row was removed while it was submitted.
        return task


def begin_again(row: Task) -> None:
    """Let a task whose create was refused wait for it again, as a new one does."""
    row.state, row.archive, row.step = TaskState.CREATED, ArchiveState.NONE, Step.CREATE
    row.error = row.note = row.completed_at = row.submitted_at = row.reported_at = row.missed_at = None
    row.polls = 0


def _can_be_adopted(task: Task) -> bool:
    return task.state is TaskState.FAILED and task.provider_task_id is None
