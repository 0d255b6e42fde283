"""Applying deliveries: parse the body, find the task, decide whether to believe it or to read the task, change rows."""

from __future__ import annotations

import unicodedata
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import structlog
from sqlmodel import Session, col, select

from receiver.providers.base import Provider
from receiver.tasks.allowance import Allowance
from storage import states
from storage.accounts.rate_limit import READS_PER_SECOND, ReadRateLimit
from storage.database.clock import db_now
from storage.database.sessions import Database
from storage.errors import LostClaim, ReportUnreadable
from storage.rows import aliases, claims, reports, tasks
from storage.rows.deliveries import AWAITS_READ, NOT_BELIEVED, compare_again
from storage.rows.events import EventName, record
from storage.rows.models import Callback, TaskColumns
from storage.rows.task_conditions import is_dismissed
from storage.states import ArchiveState, AssetName, CallbackState, Next, Report, Step, TaskFacts, TaskState

log = structlog.get_logger()

# An unmatched delivery is checked again after this long (`reconcile.UnmatchedDeliveries`). Its task's row may not have
# been committed yet, or was lost with a database.
RECHECK_SECONDS = 60
MAX_RECHECKS = 3
# Deliveries that one claim takes. Their writes wait together, so that they share commits.
BATCH = 16
# An honest task has one or two deliveries that need a read. The holder of its callback URL can send any number, and all
# tasks share the account's rate limit of reads.
MAX_READS_PER_TASK = 20
# Reads that unsigned deliveries at the account URL cause, a second and at once: half of an account's. Its holder may
# know the ids of many tasks, and their reads came before those that later deliveries asked for. The others wait, for at
# most this long.
ACCOUNT_READS_PER_SECOND, ACCOUNT_READS_AT_ONCE, ACCOUNT_READS_AHEAD_SECONDS = READS_PER_SECOND / 2, 10, 3_600.0
# Events of no task, at once and a minute, in each worker process. A thousand of them, by deliveries at the account URL,
# kept the events of all tasks waiting for minutes at a slow sink.
MAX_NOBODYS_EVENTS = 10
NOW = db_now()  # made once: it takes as long as SQLite takes for a statement
BY_READ = "confirmed by a read of the task"
OTHERWISE = f"{NOT_BELIEVED}: a read of the task found otherwise"
KNOWN = "says what is known of the task already"
NO_NEWS = f"{NOT_BELIEVED}: it says nothing new of the task"
DELETED = f"{NOT_BELIEVED}: the task was deleted"
DISMISSED = f"{NOT_BELIEVED}: the task was dismissed before it was read"
UNKNOWN = "unknown status"
NOT_READ = f"{NOT_BELIEVED}, and {MAX_READS_PER_TASK} deliveries have caused a read of the task already"
DECIDED = f"{NOT_BELIEVED}: the provider itself named another file"


@dataclass(frozen=True)
class Confirmation:
    """When a delivery is believed. `auto`: see `is_believed`. `always`: each terminal delivery causes a read of its
    task. `never`: none does.

    `trusted_hosts`: hosts whose results are believed, each with all of its subdomains.
    """

    mode: Literal["auto", "always", "never"] = "auto"
    trusted_hosts: tuple[str, ...] = ()

    def is_believed(
        self, report: Report, task: TaskColumns, known: Collection[AssetName] = (), *, signed: bool, by_token: bool
    ) -> bool:
        """Whether a report is applied as it is, or its task is read first. `known`: the task's files so far.

        A delivery without a verified signature is believed if it reports nothing final, or if it brings exactly the
        expected pictures, all from trusted hosts, and adds none to an archive that has ended. An unsigned `failed`
        always causes a read, and so does a success of a task that the provider never accepted. Once the task's reads
        are spent, nothing final is believed, and the next poll decides.
        """
        if report.status not in states.TERMINAL or self.mode == "never":
            return by_token or self.mode == "never"
        if self.mode == "always" or not by_token:
            return False
        if signed:
            return True
        if task.callback_reads >= MAX_READS_PER_TASK:
            return False
        named = states.assets_in(report, task.series)
        is_over = task.archive in (ArchiveState.ARCHIVED, ArchiveState.INCOMPLETE)
        if report.status is not TaskState.SUCCEEDED or _is_refused(task) or (is_over and named.keys() - set(known)):
            return False
        is_exact = len(named) == task.expected == len(named.keys() | set(known))
        are_pictures = all(name.is_picture for name in named)
        return is_exact and are_pictures and all(map(self._is_trusted, named.values()))

    def _is_trusted(self, url: str) -> bool:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return False
        return any(host == trusted or host.endswith("." + trusted) for trusted in self.trusted_hosts)


@dataclass(frozen=True)
class Verdict:
    """The final state of a delivery, and the reason."""

    state: CallbackState
    reason: str | None = None
    # Of a delivery whose token names no task of ours: its task, or what it says.
    external_task_id: str | None = None
    provider_task_id: str | None = None


class DeliveryApplier:
    """Applies claimed deliveries. Applying one twice changes nothing."""

    def __init__(
        self,
        database: Database,
        providers: Mapping[str, Provider],
        schedule: reports.Schedule,
        confirmation: Confirmation,
    ) -> None:
        self._database = database
        self._providers = providers
        self._schedule = schedule
        self._confirmation = confirmation
        self._account_reads = ReadRateLimit(
            database, per_second=ACCOUNT_READS_PER_SECOND, patience_seconds=ACCOUNT_READS_AHEAD_SECONDS
        )
        self._nobodys_events = Allowance(MAX_NOBODYS_EVENTS / 60, MAX_NOBODYS_EVENTS)

    def work(self, row: Callback) -> None:
        """Apply one claimed delivery."""
        self.begin(row)()

    def begin(self, row: Callback) -> Callable[[], None]:
        """Begin to apply one claimed delivery. The returned function waits until it is applied.

        Its changes and its settling are one write of a group, because a commit costs as much as applying a delivery.
        """
        apply = partial(self._apply_and_settle, row=row, parsed=self._parse(row))
        committed = self._database.begin_in_group(apply, task_id=row.task_id)

        def end() -> None:
            with suppress(LostClaim):
                verdict = committed()
                ids = {"callback": row.id, "task_id": row.task_id and str(row.task_id)}
                log.info("callback.settled", **ids, state=verdict.state, reason=verdict.reason)

        return end

    def _apply_and_settle(self, session: Session, row: Callback, parsed: Report | str) -> Verdict:
        verdict = self._apply(session, row, parsed)
        values: dict[str, Any] = {"state": verdict.state, "reason": verdict.reason, "applied_at": NOW}
        if (is_unmatched := verdict.state is CallbackState.UNMATCHED) or row.task_id is None:
            values |= {"external_task_id": verdict.external_task_id, "provider_task_id": verdict.provider_task_id}
        due_in = RECHECK_SECONDS if is_unmatched and row.attempts < MAX_RECHECKS else None
        claims.settle(session, row, due_in=due_in, **values)
        self._database.wake(session)
        return verdict

    def _parse(self, row: Callback) -> Report | str:
        if row.losses >= claims.PARK_LOSSES:
            return f"ended its worker {row.losses} times; run `receiver replay` to try again"
        provider = self._providers.get(row.provider)
        if provider is None:
            return f"there is no provider named {row.provider}"
        try:
            return provider.parse(row.body)
        except ReportUnreadable as error:
            return str(error)

    def _apply(self, session: Session, row: Callback, parsed: Report | str) -> Verdict:
        if isinstance(parsed, str):
            return self._unreadable(session, row, parsed)
        external_id, provider_id = parsed.external_task_id, parsed.provider_task_id
        # The task of the token, else the one that the body names (without a token, or if the row was made again).
        task = tasks.lock_unattached(session, row.task_id) if row.task_id else None
        if task is None and (named := find(session, row.provider, external_id, provider_id)):
            task = tasks.lock_unattached(session, named)
        if task is None:
            self._record(session, EventName.CALLBACK_UNMATCHED, row)
            return Verdict(CallbackState.UNMATCHED, "no task of ours has this id", external_id, provider_id)
        owner = aliases.by_provider_id(session, task.provider, provider_id) if provider_id else None
        contradiction = None
        if external_id is not None and _folded(external_id) != _folded(task.external_task_id):
            contradiction = "the body names another external_task_id than the token's task"
        elif owner not in (None, task.id):
            contradiction = "the body's task_id belongs to another task"
        if contradiction:
            # An event of the token's task, because a stranger may name any task at the account's URL.
            self._record(session, EventName.CALLBACK_REJECTED, row, reason=contradiction)
            verdict = Verdict(CallbackState.REJECTED, contradiction)
        else:
            verdict = self._apply_or_request_read(session, row, task, parsed)
            if verdict.reason == AWAITS_READ:  # `decide_again` finds it, also if a poll was due and it caused no read
                task.callback_reads = task.callback_reads or 1
            tasks.save(session, task)
        return verdict if row.task_id else replace(verdict, external_task_id=task.external_task_id)

    def _record(self, session: Session, name: EventName, row: Callback, **facts: Any) -> None:
        """Record an event of the token's task. Those of no task are limited; a repeated write counts again."""
        if row.task_id is None:
            if self._nobodys_events.is_spent:
                return
            self._nobodys_events.spend(1)
        record(session, name, row.task_id, {"callback": row.id, **facts})

    def _unreadable(self, session: Session, row: Callback, reason: str) -> Verdict:
        """Read the task, because a delivery arrived for it that cannot be parsed."""
        task = tasks.lock_unattached(session, row.task_id) if row.task_id else None
        if task is not None and task.state not in states.TERMINAL:
            self._read_now(session, task)
            tasks.save(session, task)
        return Verdict(CallbackState.UNREADABLE, reason)

    def _read_now(self, session: Session, task: TaskColumns, *, is_counted: bool = True) -> bool:
        """Make the locked task due for a read. False: deliveries have caused enough reads of it."""
        if reports.waits_for(session, task, states.READ_NOW):
            return True
        if is_counted and task.callback_reads >= MAX_READS_PER_TASK:
            return False
        task.callback_reads += is_counted
        reports.reschedule(session, task, self._schedule, read_now=True)
        return True

    def _read_in_turn(self, session: Session, task: TaskColumns) -> bool:
        """Make the locked task due for a read at the next moment that is free for the account's URL, or as it is due
        already. A step under way, and the end of an archive, are not put off. Returns the same as `_read_now`.
        """
        if task.lease is not None or task.step not in (None, Step.READ):
            return self._read_now(session, task)
        if task.callback_reads >= MAX_READS_PER_TASK:
            return reports.waits_for(session, task, states.READ_NOW)
        ahead = self._account_reads.reserve(session, f"{task.provider} account URL", unless_by=task.due_at)
        seconds = max(ahead - ACCOUNT_READS_AT_ONCE / ACCOUNT_READS_PER_SECOND, 0)
        if not reports.waits_for(session, task, Next(Step.READ, seconds)):
            task.callback_reads += 1
            reports.reschedule(session, task, self._schedule, read_in=seconds)
        return True

    def _apply_or_request_read(self, session: Session, row: Callback, task: TaskColumns, report: Report) -> Verdict:
        signed, by_token = row.webhook_id is not None, row.task_id == task.id
        confirmed = signed or self._confirmation.mode == "never"  # counts as the provider's own word
        if task.deleted_at is not None:  # It waits for nothing, not even for a read.
            return Verdict(CallbackState.APPLIED, DELETED)
        facts = tasks.facts_now(session, task)
        if row.reason == AWAITS_READ:  # A read has been applied, or a person has dismissed the task.
            if is_dismissed(task):
                return Verdict(CallbackState.APPLIED, DISMISSED)
            return self._decided(task, row, report, BY_READ if states.agrees(facts, report) else OTHERWISE)
        if not (by_token or confirmed):
            return self._decided(task, row, report, self._read_if_new(session, task, facts, report))
        if not confirmed and (other := states.other_files(facts, report)):
            return self._request_read_for_files(session, task, facts, report, other)
        if report.status is None:
            return self._request_read(session, task, report, f"{UNKNOWN} {report.raw_status!r}")
        if report.external_task_id not in (None, task.external_task_id):
            return self._request_read(session, task, report, "the body's external_task_id is written otherwise")
        may_have_arrived = report.status not in states.TERMINAL and _is_refused(task) and not confirmed
        believed = self._confirmation.is_believed(report, task, facts.assets, signed=signed, by_token=by_token)
        if not may_have_arrived and (believed or _is_known(facts, report, confirmed=confirmed)):
            now = tasks.now(session)
            reports.apply(session, task, report, self._schedule, facts, now=now, pushed=True, confirmed=confirmed)
            if task.step is not Step.READ:
                decide_again(session, task)
            return Verdict(CallbackState.APPLIED)
        return self._request_read(session, task, report, AWAITS_READ)

    def _decided(self, task: TaskColumns, row: Callback, report: Report, reason: str) -> Verdict:
        """One at the account's URL counts as the task's callback, since it arrived, once it is known to be true."""
        if row.task_id is None and reason in (BY_READ, KNOWN):
            reports.note_called_back(task, report, row.received_at)
        return Verdict(CallbackState.APPLIED, reason)

    def _read_if_new(self, session: Session, task: TaskColumns, facts: TaskFacts, report: Report) -> str:
        """Read the task if an unsigned delivery at the account's URL says something new of it. Returns the reason.

        Anyone may know that URL, so nothing else of the task changes. While another file of it comes from an unsigned
        delivery, reads follow the poll schedule once the other reads are spent.
        """
        other = states.other_files(facts, report)
        is_doubted = any(facts.assets[name].unconfirmed for name in other)
        if other and not is_doubted:
            return DECIDED
        is_unknown = report.status is None and task.state not in states.TERMINAL
        if not is_unknown and not is_doubted and _is_known(facts, report, confirmed=False):
            return KNOWN if report.status in states.TERMINAL and states.agrees(facts, report) else NO_NEWS
        if not self._read_in_turn(session, task):
            if not is_doubted:
                return NOT_READ
            reports.reschedule(session, task, self._schedule, read_in=self._schedule.poll_after_seconds)
        return AWAITS_READ

    def _request_read_for_files(
        self, session: Session, task: TaskColumns, facts: TaskFacts, report: Report, other: Collection[AssetName]
    ) -> Verdict:
        """Read the task when an unsigned report names other files than the known ones, unless a read named those.

        The first such report has a read of its own that no other delivery can use up. Once the other reads are spent,
        reads follow the poll schedule until the provider has named the files, because a forged report may have come
        before the true one.
        """
        words = reports.other_words(other)
        if is_first := reports.contradict(session, task, task.state, report.status, files=words):
            log.warning("task.contradicted", **tasks.named(task), files=words)
        reports.note_called_back(task, report, tasks.now(session))
        if not any(facts.assets[name].unconfirmed for name in other):
            return Verdict(CallbackState.APPLIED, DECIDED)
        task.note = f"an unsigned delivery names another file for {words}; the task is read at the provider"
        if not self._read_now(session, task, is_counted=not is_first):
            reports.reschedule(session, task, self._schedule, read_in=self._schedule.poll_after_seconds)
        return Verdict(CallbackState.APPLIED, task.note)

    def _request_read(self, session: Session, task: TaskColumns, report: Report, reason: str) -> Verdict:
        reports.note_called_back(task, report, tasks.now(session))
        is_over = report.status is None and task.state in states.TERMINAL
        if not is_over and not self._read_now(session, task):
            return Verdict(CallbackState.APPLIED, NOT_READ)
        if report.status is None and not _was_unknown(session, task):
            log.warning("callback.status_not_recognized", **tasks.named(task), status=report.raw_status)
        return Verdict(CallbackState.APPLIED, reason)


def decide_again(session: Session, task: TaskColumns) -> None:
    """Make the deliveries due that await a read of the locked task, because another report came in its place."""
    if task.callback_reads:  # The usual task needs no statement.
        compare_again(session, task, was_read=False)


def _was_unknown(session: Session, task: TaskColumns) -> bool:
    """Whether a settled delivery of the task had an unknown status. A sender that knows no other status repeats it."""
    known_unknowns = select(Callback.id).where(Callback.task_id == task.id, col(Callback.reason).startswith(UNKNOWN))
    return session.exec(known_unknowns.limit(1)).first() is not None


def find(
    session: Session, provider: str, external_task_id: str | None, provider_task_id: str | None
) -> uuid.UUID | None:
    """Our task with either id. The external id is tried first."""
    if external_task_id and (task := tasks.by_external_id(session, external_task_id)):
        return task.id
    return aliases.by_provider_id(session, provider, provider_task_id) if provider_task_id else None


def _is_refused(task: TaskColumns) -> bool:
    """Whether the task failed and the provider has named no id of it, most often because its create was refused."""
    return task.state is TaskState.FAILED and task.provider_task_id is None


def _is_known(facts: TaskFacts, report: Report, *, confirmed: bool) -> bool:
    """Whether the report would change nothing. A replayed delivery therefore causes no read."""
    decision = states.decide(facts, report, confirmed=confirmed)
    unchanged = decision.state is facts.state and decision.archive is facts.archive
    return unchanged and not (decision.contradicted or decision.add or decision.replace)


def _folded(external_task_id: str) -> str:
    """The id without case, blanks and Unicode form, which proxies and gateways may change."""
    return "".join(unicodedata.normalize("NFKC", external_task_id).casefold().split())


def trusted_hosts(provider_hosts: Sequence[str], base_url: str, extra: Sequence[str]) -> tuple[str, ...]:
    """The hosts of `RECEIVER_CONFIRM=auto`: the provider's, the base URL's, and those in the settings."""
    listed = [*provider_hosts, urlsplit(base_url).hostname or "", *extra]
    return tuple(sorted({host.lower().rstrip(".") for host in listed if host}))
