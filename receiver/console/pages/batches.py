"""`/console/batches`: many requests under one name: progress, failures, and a new batch from a file."""

from __future__ import annotations

import io
from typing import Any

from sqlmodel import col, select
from starlette.responses import Response

from receiver.base.visible import short
from receiver.batch import batch_report
from receiver.batch.batch import Plan
from receiver.batch.batch_file import BatchInvalid, Fault
from receiver.batch.checked_files import CheckedFile, CheckedFiles, given_file
from receiver.console.installation import Installation, note_act, row_of
from receiver.console.pages.tasks import path_of
from receiver.console.shares import Streamed
from receiver.console.visit import Visit, is_short, part
from storage import filters
from storage.accounts import batches
from storage.operations import lists
from storage.operations.kept_results import KeptResults
from storage.rows import events
from storage.rows.models import Batch, Task

HOME = "/console/batches"
# Batches whose counts are kept. The ids of the failures of one take up to 10 MB, as long as its file is.
KEPT_COUNTS, KEPT_FAILURES = 1_000, 8
SHOWN_FAULTS = 40
# In the order of their lines.
FAILURES_A_PAGE = 40
# Of the whole form. `receiver submit --batch` takes larger files.
MAX_UPLOAD_BYTES = 16 * 2**20
NO_FILE = "no file and no lines are given: choose a file, or paste its lines"


class BatchPages:
    """The pages and their actions."""

    def __init__(self, of: Installation) -> None:
        self._of = of
        self._counts = KeptResults(of.database, batches.counts, KEPT_COUNTS)
        self._failed = KeptResults(of.database, batches.not_kept, KEPT_FAILURES)
        self._checked = CheckedFiles()

    def close(self) -> None:
        """End the background threads."""
        self._counts.close()
        self._failed.close()

    def table(self, visit: Visit) -> Response:
        filters.understood(visit.query)
        with self._of.database.read() as session:
            page = lists.newest_batches(session, visit.query.get("before"))
        counts = self._counts.of([batch.id for batch in page.rows])
        return visit.page("batches.html", rows=page, counts=counts)

    def show(self, visit: Visit) -> Response:
        with self._of.database.read() as session:
            batch = row_of(session, Batch, visit.path("id"))
            counts = self._counts.of([batch.id]).get(batch.id)
            lost = self._failed.of([batch.id]).get(batch.id)
            failed = part(visit, "from", lost or [], FAILURES_A_PAGE)
            rows = {row.id: row for row in session.scalars(select(Task).where(col(Task.id).in_(failed.rows)))}
            estimate = self._of.estimate(batches.refused(session, batch.id)) if visit.query.get("retry") else None
            failures = [rows[task_id] for task_id in failed.rows if task_id in rows]
        return visit.page(
            "batch.html", section="batches", batch=batch, counts=counts, failures=failures,
            failed=failed, is_whole=lost is not None, path_of=path_of, estimate=estimate,
        )  # fmt: skip

    def retry(self, visit: Visit) -> Response:
        """Try again what failed. Refused requests are paid for then, so their price is shown first."""
        with self._of.database.read() as session:
            batch = row_of(session, Batch, visit.form.get("batch", ""))
            estimate = self._of.estimate(batches.refused(session, batch.id))
        if estimate.tasks and visit.form.get("priced") != f"{estimate.tasks} {estimate.pictures} {estimate.units}":
            return visit.redirect(f"{HOME}/{batch.id}?retry=1")
        tally = self._of.batches.retry(batch.name)
        self._counts.forget(batch.id)
        self._failed.forget(batch.id)
        if tally.tasks:
            note_act(self._of, visit.session.name, "retry batch", batch.name, tally.tasks)
        read = tally.counts.pop("reads_due", 0)
        again, failed = tally.counts.total(), self._of.batches.failed_at_provider(batch.name)
        for key, n in (("batch.retried", again), ("batch.reread", read), ("batch.ask_anew", failed)):
            if n or (key == "batch.retried" and not read):
                visit.say(visit.text(key, n=n, name=short(batch.name, 80)), bad=not n)
        visit.say_left(tally)
        return visit.redirect(f"{HOME}/{batch.id}")

    def export(self, visit: Visit) -> Response:
        """The report as a file, streamed while it is read."""
        with self._of.database.read() as session:
            batch = row_of(session, Batch, visit.path("id"))
        lines = batch_report.lines(self._of.database, self._of.batches, batch.name)
        headers = {"Content-Disposition": f'attachment; filename="batch-{batch.id}.csv"'}
        return Streamed(batch_report.csv_parts(lines), media_type="text/csv; charset=utf-8", headers=headers)

    def form(self, visit: Visit) -> Response:
        return _form(visit, CheckedFile())

    def check(self, visit: Visit) -> Response:
        """A dry run: every fault with its line, or the price. The file is kept, and the next form, which names it by
        its hash, sends it.
        """
        key = visit.form.get("checked", "")
        given = self._checked.get(visit.session.name, key) if key else given_file(visit.form, visit.uploads.get("file"))
        if given is None:
            visit.say(visit.text("batch.gone"), bad=True)
            return visit.redirect(f"{HOME}/new")
        is_empty = not given.content.strip()
        kept = key or ("" if is_empty else self._checked.keep(visit.session.name, given))
        try:
            if is_empty:
                raise BatchInvalid([Fault(0, NO_FILE)])
            content = io.BytesIO(given.content)
            plan, _ = self._of.batches.read(content, given.format, given.name, is_file_name=given.is_file_name)
            if key and visit.form.get("step") == "send":
                return self._send(visit, plan)
        except BatchInvalid as error:
            faults = [(fault.line, short(fault.text, 300)) for fault in error.faults[:SHOWN_FAULTS]]
            return _form(visit, given, status=422, faults=faults, fault_count=len(error.faults), checked=kept)
        estimate = self._of.estimate(line.request.wire() for line in plan.new)
        return _form(visit, given, plan=plan, estimate=estimate, checked=kept)

    def _send(self, visit: Visit, plan: Plan) -> Response:
        with events.by(visit.session.name):
            new = self._of.batches.put(plan)
        note_act(self._of, visit.session.name, "submit batch", plan.name)
        visit.say(visit.text("batch.sent", n=new))
        with self._of.database.read() as session:
            batch = batches.find(session, plan.name)
        return visit.redirect(f"{HOME}/{batch.id}" if batch else HOME)


def _form(visit: Visit, given: CheckedFile, *, status: int = 200, **found: Any) -> Response:
    """The form. Pasted lines are shown again where they are short; a file is chosen again."""
    shown = {"faults": [], "fault_count": 0, "plan": None, "estimate": None, "checked": "", **found}
    pasted = given.content.decode("utf-8", "replace") if given.is_pasted else ""
    shown |= {"content": pasted if is_short(pasted) else "", "is_long": not is_short(pasted)}
    return visit.page("batch_new.html", section="batches", status=status, given=given, **shown)
