"""One delivery -> the rows it speaks of: parse it, find its task, believe it or ask, apply it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import structlog
from sqlmodel import Session

from receiver.provider import Provider
from storage import claims, states, tasks
from storage.database import Database, clock
from storage.errors import LostClaim, ReportUnreadable
from storage.events import EventName, record
from storage.models import Callback, Task
from storage.states import CallbackState, Report, TaskState

log = structlog.get_logger()


@dataclass(frozen=True)
class Confirmation:
    """When a delivery is believed. `auto`: see `is_believed`; `always`: every terminal one is read; `never`: none.

    `trusted_hosts`: hosts that results may come from without asking; each stands for what is below it too.
    """

    mode: Literal["auto", "always", "never"] = "auto"
    trusted_hosts: tuple[str, ...] = ()

    def is_believed(self, report: Report, task: Task, *, signed: bool, by_token: bool) -> bool:
        """Whether a report is applied as it came, or its task is read first.

        A delivery without a verified signature is believed when it says nothing final, or when it brings at least
        the expected pictures, all from trusted hosts. An unsigned `failed` never is: one read settles it.
        """
        if report.status not in states.TERMINAL or self.mode == "never":
            return by_token or self.mode == "never"
        if self.mode == "always" or not by_token:
            return False
        if signed:
            return True
        named = states.assets_in(report, task.series)
        enough = task.expected is not None and len(named) >= task.expected
        return report.status is TaskState.SUCCEEDED and enough and all(map(self._is_trusted, named.values()))

    def _is_trusted(self, url: str) -> bool:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return False
        return any(host == trusted or host.endswith("." + trusted) for trusted in self.trusted_hosts)


@dataclass(frozen=True)
class Verdict:
    """How a delivery ended and why."""

    state: CallbackState
    reason: str | None = None
    event: EventName | None = None


class Matcher:
    """Applies claimed deliveries. Applying one twice is harmless."""

    def __init__(
        self,
        database: Database,
        providers: Mapping[str, Provider],
        schedule: tasks.Schedule,
        confirmation: Confirmation,
    ) -> None:
        self._database = database
        self._providers = providers
        self._schedule = schedule
        self._confirmation = confirmation

    def work(self, row: Callback) -> None:
        """Apply one claimed delivery: its rows, its facts and its own end in one transaction."""
        try:
            parsed = self._parse(row)
            with self._database.write() as session:
                verdict = self._apply(session, row, parsed)
                reason = verdict.reason
                claims.settle(session, row, due_in=None, state=verdict.state, reason=reason, applied_at=clock())
                self._database.wake(session)
        except LostClaim:
            return
        log.info("callback.settled", callback=row.id, task=str(row.task_id), state=verdict.state, reason=reason)

    def _parse(self, row: Callback) -> Report | str:
        if row.losses >= claims.PARK_LOSSES:
            return f"ended its worker {row.losses} times; `receiver replay` tries again"
        provider = self._providers.get(row.provider)
        if provider is None:
            return f"no provider named {row.provider}"
        try:
            return provider.parse(row.body)
        except ReportUnreadable as error:
            return str(error)

    def _apply(self, session: Session, row: Callback, parsed: Report | str) -> Verdict:
        if isinstance(parsed, str):
            return self._unreadable(session, row, parsed)
        task_id = row.task_id or self._find(session, row.provider, parsed)
        task = tasks.lock(session, task_id) if task_id else None
        if task is None:
            record(session, EventName.CALLBACK_UNMATCHED, task_id, {"callback": row.id})
            return Verdict(CallbackState.UNMATCHED, "no task of ours has this id")
        if contradiction := _contradiction(session, task, parsed):
            record(session, EventName.CALLBACK_REJECTED, task.id, {"callback": row.id, "reason": contradiction})
            return Verdict(CallbackState.REJECTED, contradiction)
        return self._believe_or_ask(session, row, task, parsed)

    def _unreadable(self, session: Session, row: Callback, reason: str) -> Verdict:
        """Something happened to the task that we cannot read: ask."""
        task = tasks.lock(session, row.task_id) if row.task_id else None
        if task is not None and task.state not in states.TERMINAL:
            tasks.reschedule(session, task, self._schedule, read_now=True)
        return Verdict(CallbackState.UNREADABLE, reason)

    def _find(self, session: Session, provider: str, report: Report) -> uuid.UUID | None:
        if report.external_task_id and (task := tasks.by_external_id(session, report.external_task_id)):
            return task.id
        return tasks.by_provider_id(session, provider, report.provider_task_id) if report.provider_task_id else None

    def _believe_or_ask(self, session: Session, row: Callback, task: Task, report: Report) -> Verdict:
        signed, by_token = row.webhook_id is not None, row.task_id is not None
        if self._confirmation.is_believed(report, task, signed=signed, by_token=by_token) or _is_known(
            session, task, report
        ):
            tasks.apply(session, task, report, self._schedule, now=tasks.now(session), pushed=True)
            note = None if report.status else f"unknown status {report.raw_status!r}"
            return Verdict(CallbackState.APPLIED, note)
        task.called_back_at = tasks.now(session)
        tasks.reschedule(session, task, self._schedule, read_now=True)
        return Verdict(CallbackState.APPLIED, "confirmed by a read of the task")


def _is_known(session: Session, task: Task, report: Report) -> bool:
    """Whether the report would change nothing, so that a replayed delivery causes no reads."""
    facts = tasks.facts(task, tasks.assets_of(session, task.id))
    decision = states.decide(facts, report)
    unchanged = decision.state is facts.state and decision.archive is facts.archive
    return unchanged and not (decision.contradicted or decision.add or decision.replace)


def _contradiction(session: Session, task: Task, report: Report) -> str | None:
    """A body contradicts its token only by naming another task of ours, or another external id."""
    if report.external_task_id is not None and report.external_task_id != task.external_task_id:
        return "the body names another external_task_id than the token's task"
    owner = tasks.by_provider_id(session, task.provider, report.provider_task_id) if report.provider_task_id else None
    if owner not in (None, task.id):
        return "the body's task_id belongs to another task"
    return None


def trusted_hosts(provider_hosts: Sequence[str], base_url: str, extra: Sequence[str]) -> tuple[str, ...]:
    """The hosts of `RECEIVER_CONFIRM=auto`: the provider's own, its base URL's, and what the settings list."""
    listed: list[Any] = [*provider_hosts, urlsplit(base_url).hostname or ""]
    listed += [entry.rpartition(":")[0].strip("[]") if ":" in entry else entry for entry in extra]
    return tuple(sorted({host.lower().rstrip(".") for host in listed if host}))
