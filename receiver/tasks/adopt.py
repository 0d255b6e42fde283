"""Take over tasks that were made elsewhere, found by id or in the provider's list.

This also restores rows after an old backup: what the provider still has gets its row and its pictures again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from sqlmodel import Session

from receiver.providers.base import Provider, Record
from receiver.providers.task_lookup import read_task
from receiver.tasks import apply_deliveries
from receiver.tasks.changes import Tally, change
from storage.accounts.rate_limit import ReadRateLimit, TooManyReads
from storage.database.sessions import Database
from storage.errors import GiveUp, Retry
from storage.keys import IdInvalid, encode_id
from storage.operations import maintenance
from storage.rows import claims, events, reports, tasks
from storage.rows.deliveries import Delivery, store_poll
from storage.rows.models import Task
from storage.states import Report, Step, TaskState

T = TypeVar("T")

# An id or a page is given up after this many tries in a row without an answer.
TRIES = 3
MAX_WAIT_SECONDS = 30.0
# While workers use the whole rate limit of reads, a read waits some 5 s for its turn.
MAX_TURNS = 60
# The provider gives at most 1,000 pages of 500 (KLING §3). An answer with 100 tasks and all their URLs is below 2 MB.
PAGE_SIZE = 100
MAX_PAGES = 1_000


class Adopter:
    """Makes rows for tasks that the provider has. `dry_run`: everything is counted, and only the rate limit of reads is
    kept.
    """

    def __init__(
        self,
        database: Database,
        providers: Mapping[str, Provider],
        schedule: reports.Schedule,
        limit: ReadRateLimit,
        *,
        dry_run: bool = False,
    ) -> None:
        self._database = database
        self._providers = providers
        self._schedule = schedule
        self._limit = limit
        self._dry_run = dry_run

    def take(self, names: Sequence[str]) -> Tally:
        """Take over tasks made elsewhere, by either id. Tasks known here stay as they are."""
        tally = Tally()
        made = set[tuple[str, str]]()  # in a dry run there is no row yet
        for name in names:
            try:
                found = [(each, record) for each in self._providers.values() if (record := self._read(each, name))]
            except (Retry, GiveUp) as error:
                tally.left[name] = str(error)
                continue
            if not found:
                tally.left[name] = "the provider does not know it"
            for provider, record in found:
                task = provider.name, _id(record) or record.report.external_task_id or name
                if task in made:
                    tally.counts["known"] += 1
                elif self._take(tally, provider, record, name):
                    made.add(task)
        return tally

    def take_listed(self, age: timedelta, *, page_size: int = PAGE_SIZE) -> Tally:
        """Take over all tasks in the provider's list that were made within `age`. Tasks known here stay as they are.

        The rows may be those of an old backup, so events get numbers above all that readers have seen. May be repeated,
        also after it was interrupted: `left` then names the page.
        """
        with change(self._database, dry_run=self._dry_run) as session:
            events.skip_numbers(session)
        tally, since = Tally(), self._database.now() - age
        seen = set[str | None]()  # meanwhile, new tasks move older ones to the next page
        for provider in self._providers.values():
            for page in range(1, MAX_PAGES + 1):
                try:
                    records = _with_retries(partial(self._list, provider, page, page_size))
                except (Retry, GiveUp) as error:
                    tally.left[f"page {page} of {provider.name}"] = str(error)
                    break
                self._take_page(tally, provider, [each for each in records if _id(each) not in seen], since)
                seen.update(map(_id, records))
                if not records or _is_past(records, since):
                    break
        return tally

    def _read(self, provider: Provider, name: str) -> Record | None:
        read = partial(read_task, provider, self._limit, provider_task_id=name, external_task_id=name)
        return _with_retries(read)

    def _list(self, provider: Provider, page: int, size: int) -> list[Record]:
        self._limit.wait(provider.name)
        return provider.list_page(page, size)

    def _take_page(self, tally: Tally, provider: Provider, records: Sequence[Record], since: datetime) -> None:
        for record in records:
            made_at = record.report.created_at
            if made_at is None or made_at >= since:
                self._take(tally, provider, record)
            else:
                tally.counts["too_old"] += 1

    def _take(self, tally: Tally, provider: Provider, record: Record, name: str | None = None) -> bool:
        """Take over one task. Returns whether it got a row, or would get one in a dry run."""
        report = record.report
        # A gateway may omit our id. The id by which the task was found is one of its ids.
        external_id = report.external_task_id or name or report.provider_task_id or ""
        try:
            encode_id(external_id)
        except IdInvalid as error:
            tally.left[name or external_id or "a task without an id"] = str(error)
            return False
        with change(self._database, dry_run=self._dry_run) as session:
            known = apply_deliveries.find(session, provider.name, external_id, report.provider_task_id)
            task = session.get(Task, known) if known else None
            if task is None:
                return self._insert(session, tally, provider, record, external_id)
            if name and task.state is TaskState.FAILED and task.provider_task_id is None:
                tally.left[name] = "its create failed here: `receiver submit --adopt` with its request takes it over"
            else:
                tally.counts["known"] += 1
                self._look_up_instead(session, task, report)
        return False

    def _look_up_instead(self, session: Session, task: Task, report: Report) -> None:
        """Let a create that waits to be sent be looked up: a restored backup has it from before it was sent."""
        row = tasks.lock_existing(session, task.id)
        if row.step is Step.CREATE and row.lease is None and row.sent_at is None:
            row.sent_at = max(row.created_at, report.created_at or row.created_at)
            session.flush()

    def _insert(self, session: Session, tally: Tally, provider: Provider, record: Record, external_id: str) -> bool:
        """Insert a task row like one that we made, with its first read as a delivery. Workers do the rest."""
        report = record.report
        if report.status is None:  # The provider has the task, whatever its status word means.
            report = replace(report, status=TaskState.SUBMITTED)
        task = Task(external_task_id=external_id, provider=provider.name, adopt=True)
        if not maintenance.adopt(session, task, report, self._schedule):
            tally.counts["known"] += 1  # another process inserted it first
            return False
        delivery = Delivery(provider.name, "poll", task.id, record.body)
        store_poll(session, delivery)
        tally.counts["adopted"] += 1
        tally.counts["files_due"] += len(tasks.assets_of(session, task.id))
        return True


def _with_retries(ask: Callable[[], T]) -> T:
    """Call, and repeat while the provider is down, throttles us, or other readers use up the rate limit. Raises the
    last error.
    """
    failures = turns = 0
    while True:
        try:
            return ask()
        except TooManyReads as error:
            turns += 1
            if turns == MAX_TURNS:
                raise
            time.sleep(error.after or 0)
        except Retry as error:
            failures += 1
            if failures == TRIES:
                raise
            time.sleep(min(max(error.after or 0, claims.backoff(failures, base=1)), MAX_WAIT_SECONDS))


def _id(record: Record) -> str | None:
    return record.report.provider_task_id


def _is_past(records: Sequence[Record], since: datetime) -> bool:
    """Whether later pages hold older tasks only. The list's order is undocumented, so it counts only if the page shows
    it.
    """
    times = [made_at for record in records if (made_at := record.report.created_at)]
    return bool(times) and times[0] < since and times == sorted(times, reverse=True)
