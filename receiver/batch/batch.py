"""Batches: a file's lines become task rows, and failed ones can be tried again.

file ─▶ `batch_file.read` ─▶ compare with the existing rows ─▶ queued rows, some hundred a transaction ─▶ workers send

This module sends nothing. After a crash the same file inserts the missing rows and none twice.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, TypeVar

from sqlmodel import Session

from receiver.batch import batch_file
from receiver.batch.batch_file import BatchInvalid, Fault, Line
from receiver.providers.base import ProviderRequest, RequestInvalid, is_storable, plain
from receiver.tasks.changes import Tally, change
from receiver.tasks.submit import Submitter, begin_again
from storage.accounts import batches, slots
from storage.accounts.accepted_creates import may_prove_accepted, was_accepted
from storage.accounts.batches import CHUNK, Counts
from storage.database.sessions import Database
from storage.errors import UserError
from storage.operations import maintenance
from storage.operations.lists import newest_batches
from storage.rows import reports, tasks
from storage.rows.models import Batch, Task
from storage.rows.task_conditions import is_dismissed
from storage.states import TaskState

T = TypeVar("T")

# Failures that a terminal shows. The report has all.
REASONS = 20
OTHER_FILE = (
    "there is a batch {name!r} already and none of its lines is in this file, so it is taken for another file's: "
    "give another name, or give this one to add these lines to that batch"
)
NOT_KEPT = "its pictures were not kept: submit the line again under another name"


@dataclass(frozen=True)
class Plan:
    """A file compared with the existing rows. `new`: lines without a row. `known`: how many lines have one. `moved`:
    (row, line) of those not yet noted at that line of this batch. `left_over`: tasks of the batch that are not in the
    file.
    """

    name: str
    new: list[Line] = field(default_factory=list)
    moved: list[tuple[uuid.UUID, int]] = field(default_factory=list)
    known: int = 0
    left_over: int = 0


class NoSuchBatch(UserError, LookupError):
    """No batch has this name."""


class Batches:
    """Batches on one database. `submitter` makes their rows."""

    def __init__(self, database: Database, submitter: Submitter, schedule: reports.Schedule) -> None:
        self._database = database
        self._submitter = submitter
        self._schedule = schedule

    def check(self, fields: Mapping[str, Any]) -> ProviderRequest:
        """Check a line's fields. Raises `RequestInvalid`, also for a request that the account can never take."""
        request = self._submitter.parse(fields)
        self._submitter.check_slots(request)
        return request

    def spelling(self, name: str) -> str:
        """How a batch's name is stored: as that of the batch here that reads the same, else composed (NFC).

        The ids of its requests hold the name. The same file, from macOS and typed by a person, was paid twice.
        """
        if not is_storable(name):
            return name
        with self._database.read() as session:
            batch = batches.find(session, name)
        return batch.name if batch else batch_file.composed(name)

    def read(
        self, file: BinaryIO, format: batch_file.Format | None, name: str, *, is_file_name: bool = False
    ) -> tuple[Plan, list[Line]]:
        """Read a file and compare it with the existing rows, under the name as it is stored. See `plan`."""
        name = self.spelling(name)
        lines = batch_file.read(file, format, name, self.check)
        return self.plan(name, lines, is_file_name=is_file_name), lines

    def plan(self, name: str, lines: Sequence[Line], *, is_file_name: bool = False) -> Plan:
        """Compare a file with the existing rows. Changes nothing.

        Raises `BatchInvalid` if an external id of the file has another request here or belongs to another batch.
        `is_file_name`: the name is the file's, so a batch that shares no line with the file is taken for another's.
        """
        new: list[Line] = []
        moved: list[tuple[uuid.UUID, int]] = []
        faults: list[Fault] = []
        with self._database.read() as session:
            batch = batches.find(session, name)
            left_over = total = batches.counts(session, batch.id).total if batch else 0
            for chunk in _chunks(lines):
                known = batches.known(session, [line.external_task_id for line in chunk])
                faults += _faults(chunk, known, batch)
                new += [line for line in chunk if line.external_task_id not in known]
                placed = batch.id if batch else None
                for line, row in ((line, known.get(line.external_task_id)) for line in chunk):
                    if row and (row.batch_id, row.batch_line) != (placed, line.number):
                        moved.append((row.id, line.number))
                    left_over -= bool(row and row.batch_id)
        if is_file_name and total and left_over == total:
            faults.append(Fault(0, OTHER_FILE.format(name=plain(name, 80))))
        if faults:
            raise BatchInvalid(faults)
        return Plan(name, new, moved, len(lines) - len(new), left_over)

    def put(self, plan: Plan, progress: Callable[[int], None] = lambda _: None) -> int:
        """Insert the rows, queued, in the order of the file. Returns how many were new.

        Each transaction holds some hundred rows. If this ends early, the committed ones stay. `progress` is called
        after each transaction with the number of lines that have a row. Raises `BatchInvalid` if another process took
        an id meanwhile.
        """
        if not (plan.new or plan.moved):
            return 0
        with self._database.write() as session:
            batch = batches.make(session, plan.name)
        done = new = 0
        for moved in _chunks(plan.moved):
            with self._database.write() as session:
                batches.place(session, batch.id, moved)
        for chunk in _chunks(plan.new):
            try:
                with self._database.write() as session:
                    new += self._put(session, batch, chunk)
                    self._database.wake(session)
            except BatchInvalid as error:
                raise BatchInvalid(error.faults, inserted=done) from None
            done += len(chunk)
            progress(done)
        return new

    def _put(self, session: Session, batch: Batch, lines: Sequence[Line]) -> int:
        now = tasks.now(session)
        rows = []
        for line in lines:
            row = self._submitter.row(line.request, line.external_task_id)
            row.batch_id, row.batch_line, row.created_at = batch.id, line.number, now
            slots.wait(row, now)
            rows.append(row)
        new = batches.insert_queued(session, rows)
        if len(new) < len(rows):
            known = batches.known(session, [row.external_task_id for row in rows if row.id not in new])
            if faults := list(_faults(lines, known, batch)):
                raise BatchInvalid(faults)
        return len(new)

    def counts(self, name: str) -> Counts:
        """How many tasks of a batch are in which state. Raises `NoSuchBatch`."""
        with self._database.read() as session:
            return batches.counts(session, self._batch(session, name).id)

    def newest(self, limit: int) -> list[tuple[Batch, Counts]]:
        """The newest batches with their counts, newest first."""
        with self._database.read() as session:
            return [(batch, batches.counts(session, batch.id)) for batch in newest_batches(session, None, limit).rows]

    def pages(self, name: str) -> Iterator[list[Task]]:
        """The tasks of a batch in the order of its file, some hundred at a time. Raises `NoSuchBatch`."""
        after = None
        while True:
            with self._database.read() as session:
                rows = batches.page(session, self._batch(session, name).id, after)
            if not rows:
                return
            yield rows
            after = (rows[-1].batch_line or 0, rows[-1].external_task_id)

    def retry(self, name: str, *, dry_run: bool = False) -> Tally:
        """Try again what failed of a batch. Raises `NoSuchBatch`.

        Files that were given up become due. A create that the provider refused is sent again under its own id, so it is
        never paid twice. A task that failed at the provider is only read again; `plan_again` makes a new task of it.
        Dismissed tasks are left alone.
        """
        tally = Tally()
        with self._database.read() as session:
            ids = batches.not_kept(session, self._batch(session, name).id, dismissed=False)
        for task_id in ids:
            with change(self._database, dry_run=dry_run) as session:
                task = tasks.lock_existing(session, task_id)
                self._retry(session, tally, task)
        return tally

    def _retry(self, session: Session, tally: Tally, task: Task) -> None:
        if task.state is TaskState.FAILED and not was_accepted(task):
            reason = _send_again(session, task, self._submitter)
            tally.counts["creates_queued"] += reason is None
        else:
            done = maintenance.retry(session, task, self._schedule)
            reason = done.reason
            tally.counts.update(done.counts)
        if reason:
            tally.left[task.external_task_id] = reason
        else:
            tally.tasks.append(task.id)

    def plan_again(self, name: str, new_name: str) -> tuple[Plan, dict[str, str]]:
        """Plan what failed at the provider as new tasks of the batch `new_name`, with new ids. Changes nothing.

        `put` inserts them, and they are paid for again. Once they are inserted, the same call plans none of them again.
        Returns the plan and `{external id: why}` of those that cannot be sent. Raises `NoSuchBatch`, and `BatchInvalid`
        if `new_name` cannot be the name of another batch.
        """
        if faults := list(batch_file.name_faults(new_name)):
            raise BatchInvalid(faults)
        name, new_name = self.spelling(name), self.spelling(new_name)
        if new_name == name:
            raise BatchInvalid([Fault(0, "the ids of this batch are used up: give another name")])
        lines: list[Line] = []
        left: dict[str, str] = {}
        equal: Counter[str] = Counter()
        with self._database.read() as session:
            for task_id in batches.failed_at_provider(session, self._batch(session, name).id):
                task = session.get_one(Task, task_id)
                try:
                    request = self._submitter.parse(task.request)
                except RequestInvalid:
                    left[task.external_task_id] = NOT_KEPT
                    continue
                try:
                    self._submitter.check_slots(request)
                except RequestInvalid as error:
                    left[task.external_task_id] = str(error)
                    continue
                digest = request.canonical_hash()
                new_id = batch_file.made_id(new_name, digest, equal)
                lines.append(Line(task.batch_line or 0, new_id, request, digest))
        return replace(self.plan(new_name, lines), left_over=0), left

    def failed_at_provider(self, name: str) -> int:
        """How many tasks only `plan_again` can complete. Raises `NoSuchBatch`."""
        with self._database.read() as session:
            return len(batches.failed_at_provider(session, self._batch(session, name).id))

    def failures(self, name: str) -> list[Task]:
        """The first failed tasks, in the order of the file. Raises `NoSuchBatch`."""
        with self._database.read() as session:
            ids = batches.not_kept(session, self._batch(session, name).id)[:REASONS]
            return [session.get_one(Task, task_id) for task_id in ids]

    def _batch(self, session: Session, name: str) -> Batch:
        batch = batches.find(session, name)
        if batch is None:
            raise NoSuchBatch(f"no batch {plain(name, 80)!r} here; `receiver batch list` shows the existing ones")
        return batch


def _faults(lines: Sequence[Line], known: Mapping[str, batches.Known], batch: Batch | None) -> Iterator[Fault]:
    """A fault for each line whose id already belongs to another request or batch.

    The request of an adopted task is not known here. A made id proves it.
    """
    for line in lines:
        row = known.get(line.external_task_id)
        shown = plain(line.external_task_id, 80)
        if row and row.deleted_at is not None:
            yield Fault(line.number, f"external_task_id: {shown!r} was deleted; remove the line, or give it another id")
        elif row and not row.request_hash and not line.has_made_id:
            yield Fault(line.number, f"external_task_id: {shown!r} was adopted without its request; remove the line")
        elif row and row.request_hash not in ("", line.request_hash):
            yield Fault(line.number, f"external_task_id: {shown!r} was submitted before with another request")
        elif row and row.batch_id is not None and (batch is None or row.batch_id != batch.id):
            yield Fault(line.number, f"external_task_id: {shown!r} belongs to another batch")


def _send_again(session: Session, task: Task, submitter: Submitter) -> str | None:
    """Queue a create that was refused. Returns the reason why it cannot be queued, or None."""
    if task.lease is not None:
        return "a worker holds it; try again when it has finished"
    if may_prove_accepted(session, task):
        return "a callback came for it, so it is read first; try again when that is done"
    if is_dismissed(task):  # The row changed since it was read.
        return "dismissed"
    try:
        request = submitter.parse(task.request)
    except RequestInvalid:
        return NOT_KEPT
    begin_again(task)
    task.slots = request.slots
    slots.wait(task, tasks.now(session))
    session.flush()
    return None


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]
