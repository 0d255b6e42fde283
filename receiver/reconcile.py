"""Ask again: read tasks whose callback is late, doubted or lost, and apply the answer like any delivery."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

import structlog

from receiver.provider import Provider, Record
from storage import claims, states, tasks
from storage.database import Database
from storage.errors import GiveUp, LostClaim, Retry
from storage.inbox import Delivery, store_poll
from storage.models import Task
from storage.states import CallbackState, Report, TaskState

log = structlog.get_logger()

NEVER_REPORTED = "never_reported"
# A provider that is away is asked again at this pace at the latest, whatever the task's own poll delay is.
READ_RETRY_CAP_SECONDS = 300


class Reader:
    """Works on claimed task rows in step `read`."""

    def __init__(self, database: Database, providers: Mapping[str, Provider], schedule: tasks.Schedule) -> None:
        self._database = database
        self._providers = providers
        self._schedule = schedule

    def work(self, task: Task) -> None:
        """Read one task and settle what the answer says, in one transaction."""
        provider = self._providers[task.provider]
        try:
            record = provider.read(provider_task_id=task.provider_task_id, external_task_id=task.external_task_id)
        except (Retry, GiveUp) as error:
            self._unanswered(task, error)
            return
        try:
            with self._database.write() as session:
                row = tasks.lock_claimed(session, task)
                moment = tasks.now(session)
                row.lease, row.losses, row.note = None, 0, None
                row.polls += 1
                report = self._report(row, record, moment)
                if record is not None:
                    delivery = Delivery(task.provider, "poll", task.id, record.body)
                    store_poll(session, delivery, CallbackState.APPLIED, None)
                tasks.apply(session, row, report, self._schedule, now=moment, pushed=False)
                self._database.wake(session)
        except LostClaim:
            return
        log.info("task.read", task=task.external_task_id, state=row.state, found=record is not None)

    def _report(self, task: Task, record: Record | None, moment: datetime) -> Report:
        if record is not None and record.report.status in states.TERMINAL:
            return record.report
        silent_until = (task.submitted_at or task.created_at) + timedelta(
            seconds=self._schedule.result_lifetime_seconds
        )
        if task.state not in states.TERMINAL and moment > silent_until:
            return Report(None, None, TaskState.FAILED, message=NEVER_REPORTED)
        return record.report if record else Report(None, None, None)

    def _unanswered(self, task: Task, error: Retry | GiveUp) -> None:
        """The provider is away or refuses us: nothing is known, so nothing changes but the time of the next read."""
        after = error.after if isinstance(error, Retry) else None
        due_in = max(after or 0, claims.backoff(task.attempts, cap=READ_RETRY_CAP_SECONDS))
        try:
            with self._database.write() as session:
                claims.settle(session, task, due_in=due_in, note=str(error))
        except LostClaim:
            return
        log.warning("task.unread", task=task.external_task_id, error=str(error), seconds=round(due_in, 1))
