"""Batches: inserted once, continued by the same file, sent by workers, tried again, reported with their keys."""

from __future__ import annotations

import csv
import json
import os
import sys
import threading
import unicodedata
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sqlmodel import col, select, update

from receiver.app.wiring import Parts
from receiver.batch import batch_file, batch_report, batch_view
from receiver.batch.batch import Batches, Plan
from receiver.batch.batch_file import BatchInvalid, Line
from receiver.cli import main, show
from receiver.sandbox import Sandbox
from receiver.tasks.operate import Operator
from receiver.tasks.submit import Conflict
from receiver.tasks.task_view import is_over
from storage.accounts import batches
from storage.accounts.batches import Counts
from storage.archive.delete import delete
from storage.database.sessions import Database
from storage.errors import UserError
from storage.operations import heartbeats
from storage.rows.models import Asset, Batch, Callback, Task
from storage.states import ArchiveState, CallbackState, TaskState
from tests.command_line import Done, variables
from tests.harness import wait_until
from tests.night_run import run as spend_a_night
from tests.pipeline import assert_archived, deliver, insert_row, kept, make_due_now, run, task_of
from tests.receiver.batch.test_batch_file import FAULTS, GOOD, PICTURE, faulty_file, jsonl
from tests.rows import LONG_AGO, event_names, new_asset

LINES = [{**GOOD, "prompt": f"boat {number}"} for number in range(5)]
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])  # the output is the same on both databases
limited = pytest.mark.parametrize("changes", [{"kling_slots": 2}], ids=["two"])


def of(parts: Parts) -> Batches:
    return Batches(parts.database, parts.submitter, parts.schedule)


def read(parts: Parts, *lines: Any, name: str = "night") -> list[Line]:
    return batch_file.read(BytesIO(jsonl(*lines)), "jsonl", name, of(parts).check)


def plan(parts: Parts, *lines: Any, name: str = "night") -> Plan:
    return of(parts).plan(name, read(parts, *lines, name=name))


def put(parts: Parts, *lines: Any, name: str = "night") -> int:
    return of(parts).put(plan(parts, *lines, name=name))


def rows(parts: Parts) -> list[Task]:
    with parts.database.read() as session:
        return list(session.exec(select(Task).order_by(col(Task.batch_line), col(Task.created_at))))


def dismiss(parts: Parts, task: Task) -> None:
    Operator(parts.database, parts.providers, parts.schedule).dismiss(task.external_task_id, "not worth the money")


def finish(parts: Parts, name: str = "night") -> Counts:
    """Do all work in this thread. No web server runs, so callbacks are lost and tasks are read."""
    worker = parts.worker()

    def over() -> Counts | None:
        worker.run_until_idle()
        make_due_now(parts, Task)
        found = of(parts).counts(name)
        return found if found.over == found.total else None

    return wait_until(over, seconds=30)


# -- inserting --------------------------------------------------------------------------------------------------------


def test_rows_wait_in_the_order_of_the_file_and_are_sent_once(parts: Parts, sandbox: Sandbox) -> None:
    assert put(parts, *LINES) == 5
    made = rows(parts)
    assert [(row.batch_line, row.slots, row.due_at, row.state) for row in made] == [
        (line, -1, None, TaskState.CREATED) for line in range(1, 6)
    ]
    assert event_names(parts.database, made[0]) == ["task.created"]
    run(parts, "creates")
    prompts = [create.body["prompt"] for create in sandbox.ledger().creates]
    assert prompts == [line["prompt"] for line in LINES]


def test_same_file_submitted_again_inserts_nothing(parts: Parts) -> None:
    put(parts, *LINES)
    again = plan(parts, *LINES)
    assert (again.new, again.known, again.moved, again.left_over) == ([], 5, [], 0)
    assert of(parts).put(again) == 0
    assert len(rows(parts)) == 5


def test_submission_that_crashed_half_way_is_continued(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.batch.batch.CHUNK", 2)

    def die(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of(parts).put(plan(parts, *LINES), die)
    assert [row.batch_line for row in rows(parts)] == [1, 2]
    assert put(parts, *LINES) == 3
    assert [row.batch_line for row in rows(parts)] == [1, 2, 3, 4, 5]


def test_two_submissions_of_one_file_make_one_batch(parts: Parts) -> None:
    first, second = plan(parts, *LINES), plan(parts, *LINES)
    assert (of(parts).put(first), of(parts).put(second)) == (5, 0)
    assert len(rows(parts)) == 5


@ONE_DATABASE
def test_changed_file_adds_new_lines_and_reports_omitted_ones(parts: Parts) -> None:
    put(parts, *LINES)
    changed = plan(parts, {**GOOD, "prompt": "new"}, *LINES[1:])
    assert (len(changed.new), changed.known, changed.left_over) == (1, 4, 1)
    of(parts).put(changed)
    assert sorted(row.batch_line or 0 for row in rows(parts)) == [1, 1, 2, 3, 4, 5]


@ONE_DATABASE
def test_another_files_lines_join_a_batch_only_by_its_name(parts: Parts) -> None:
    put(parts, *LINES)
    other, edited = read(parts, {**GOOD, "prompt": "another"}), read(parts, LINES[4], {**GOOD, "prompt": "new"})
    with pytest.raises(BatchInvalid, match="batch 'night' already"):
        of(parts).plan("night", other, is_file_name=True)
    assert len(of(parts).plan("night", other).new) == 1
    assert len(of(parts).plan("night", edited, is_file_name=True).new) == 1


@ONE_DATABASE
def test_another_batch_name_sends_the_requests_again(parts: Parts) -> None:
    put(parts, *LINES)
    assert put(parts, *LINES, name="again") == 5
    assert len({row.external_task_id for row in rows(parts)}) == 10


@ONE_DATABASE
def test_id_of_another_request_is_a_fault_and_nothing_is_inserted(parts: Parts) -> None:
    put(parts, {**GOOD, "external_task_id": "mine"})
    with pytest.raises(BatchInvalid, match=r"line 2: external_task_id: 'mine' was submitted before"):
        plan(parts, GOOD, {**GOOD, "n": 2, "external_task_id": "mine"})
    with pytest.raises(BatchInvalid, match="another batch"):
        plan(parts, {**GOOD, "external_task_id": "mine"}, name="other")
    assert len(rows(parts)) == 1


def test_id_that_another_process_takes_meanwhile_is_a_fault(parts: Parts) -> None:
    ready = plan(parts, {**GOOD, "external_task_id": "mine"})
    parts.submitter.submit({**GOOD, "n": 2}, external_task_id="mine")
    with pytest.raises(BatchInvalid, match="another request"):
        of(parts).put(ready)


def test_adopted_tasks_of_a_lost_batch_join_it_again(parts: Parts, sandbox: Sandbox) -> None:
    """A restored backup is older than the batch. The provider does not say which requests its tasks had."""
    for line in read(parts, *LINES):
        insert_row(parts, external_task_id=line.external_task_id, adopt=True, request={}, request_hash="")
    assert put(parts, *LINES) == 0
    assert of(parts).counts("night").total == len(LINES)
    assert put(parts, *LINES) == 0
    insert_row(parts, external_task_id="mine", adopt=True, request={}, request_hash="")
    with pytest.raises(BatchInvalid, match="without its request; remove the line"):
        plan(parts, {**GOOD, "external_task_id": "mine"})
    assert not sandbox.ledger().creates


@ONE_DATABASE
def test_task_that_was_submitted_alone_joins_the_batch(parts: Parts, sandbox: Sandbox) -> None:
    parts.submitter.submit(GOOD, external_task_id="mine")
    assert put(parts, LINES[0], {**GOOD, "external_task_id": "mine"}) == 1
    assert of(parts).counts("night").total == 2
    assert task_of(parts, "mine").batch_line == 2
    assert len(sandbox.ledger().creates) == 1


def test_a_delivery_that_came_before_its_row_finds_it(parts: Parts) -> None:
    body = {"task_id": "777", "task_status": "processing", "task_info": {"external_task_id": "late"}}
    assert deliver(parts, None, body).state is CallbackState.UNMATCHED
    put(parts, {**GOOD, "external_task_id": "late"})
    with parts.database.read() as session:
        assert session.exec(select(Callback.state)).one() is CallbackState.RECEIVED


@ONE_DATABASE
@limited
def test_a_line_the_account_can_never_take_is_a_fault(parts: Parts) -> None:
    with pytest.raises(BatchInvalid, match=r"line 2: .*RECEIVER_KLING_SLOTS"):
        read(parts, GOOD, {**GOOD, "n": 3})


# -- archiving and reports --------------------------------------------------------------------------------------------


@limited
def test_a_batch_is_archived_within_its_slots_and_reported(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(concurrency_limit=2)
    put(parts, *LINES[:3], {**GOOD, "n": 2, "prompt": "[fail]"})
    found = finish(parts)
    assert (found.archived, found.failed, found.total) == (3, 1, 4)
    ledger = sandbox.ledger()
    assert (ledger.slots_peak, ledger.counts["create:1303"]) == (2, 0)
    lines = list(batch_report.lines(parts.database, of(parts), "night"))
    assert [(line["line"], len(line["files"])) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 0)]
    objects = kept(parts)
    assert all(objects[file["key"]] == file["sha256"] for line in lines for file in line["files"])
    for row in rows(parts)[:3]:
        assert_archived(parts, sandbox, row)


@ONE_DATABASE
def test_reports_hold_every_line_as_json_and_csv(parts: Parts, tmp_path: Path) -> None:
    put(parts, *LINES[:2], {**GOOD, "prompt": "[fail]"})
    finish(parts)
    for name in ("report.json", "report.csv"):
        batch_report.write(tmp_path / name, "night", batch_report.lines(parts.database, of(parts), "night"))
    told = json.loads((tmp_path / "report.json").read_text())
    table = list(csv.DictReader(StringIO((tmp_path / "report.csv").read_text())))
    assert told["batch"] == "night"
    assert [line["state"] for line in told["tasks"]] == ["succeeded", "succeeded", "failed"]
    assert [row["key"] for row in table] == [*(line["files"][0]["key"] for line in told["tasks"][:2]), ""]
    assert table[2]["error"] == told["tasks"][2]["error"]
    assert {"report.json", "report.csv"} == {name for name in os.listdir(tmp_path) if "report" in name}


@ONE_DATABASE
def test_a_report_is_read_in_pieces(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    put(parts, *LINES)
    monkeypatch.setattr(batches, "CHUNK", 2)
    assert [line["line"] for line in batch_report.lines(parts.database, of(parts), "night")] == [1, 2, 3, 4, 5]


def test_formulas_in_a_report_are_made_harmless() -> None:
    line: dict[str, Any] = dict.fromkeys((*batch_report.TASK_COLUMNS, "note"))
    out = StringIO()
    batch_report.write_csv(out, [{**line, "error": "=1+1", "files": []}])
    assert out.getvalue().rstrip().endswith(",'=1+1")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1"])
def test_no_column_of_a_report_starts_a_formula(text: str) -> None:
    columns = [column for column in batch_report.TASK_COLUMNS if column not in ("line", "expected", "units")]
    file = dict.fromkeys(batch_report.FILE_COLUMNS, text)
    line = dict.fromkeys((*batch_report.TASK_COLUMNS, "note", "error"), -7)
    out = StringIO(newline="")
    batch_report.write_csv(out, [{**line, **dict.fromkeys(columns, text), "error": text, "files": [file]}])
    _, row = csv.reader(StringIO(out.getvalue(), newline=""))
    assert {cell for cell in row if cell != "-7"} == {f"'{text}"}
    assert row.count("-7") == 3


@ONE_DATABASE
def test_counts_show_the_state_of_every_task(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(processing_seconds=60)
    put(parts, *LINES[:2])
    run(parts, "creates")
    put(parts, *LINES)
    assert of(parts).counts("night") == Counts(queued=3, running=2)


def test_a_deleted_task_is_over(parts: Parts) -> None:
    put(parts, *LINES[:2])
    finish(parts)
    delete(parts.database, parts.bucket, rows(parts)[0].external_task_id)
    found = of(parts).counts("night")
    assert found.over == found.total == 2
    assert found == Counts(archived=1, deleted=1)
    assert "deleted 1" in batch_view.words(found)


@ONE_DATABASE
def test_the_id_of_a_deleted_task_stays_taken_and_says_so(command: Command, parts: Parts) -> None:
    put(parts, LINES[0])
    finish(parts)
    name = rows(parts)[0].external_task_id
    delete(parts.database, parts.bucket, name)
    with pytest.raises(BatchInvalid, match="was deleted; remove the line, or give it another id"):
        plan(parts, LINES[0])
    with pytest.raises(Conflict, match=f"{name} was deleted on 2.*; choose another id"):
        parts.submitter.submit(LINES[0], external_task_id=name)
    assert "note: deleted at 2" in command("status", name).out


# -- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_a_create_that_was_refused_is_sent_again_under_its_id(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1301"])
    put(parts, *LINES[:2])
    assert finish(parts).failed == 1
    assert of(parts).retry("night", dry_run=True).counts == {"creates_queued": 1}
    assert of(parts).counts("night").failed == 1
    assert of(parts).retry("night").counts == {"creates_queued": 1}
    assert finish(parts).archived == 2
    assert len({task.external_task_id for task in sandbox.ledger().tasks}) == len(sandbox.ledger().tasks) == 2


@pytest.mark.databases("sqlite")
def test_a_refused_create_that_was_called_back_is_read_before_it_is_sent_again(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1301"])
    put(parts, LINES[0])
    finish(parts)
    (row,) = rows(parts)
    deliver(parts, row, {"task_id": "foreign", "task_status": "processing"})
    left = of(parts).retry("night").left
    assert "a callback came for it" in left[row.external_task_id]
    run(parts, "reads", "callbacks")
    assert of(parts).retry("night").counts == {"creates_queued": 1}


@pytest.mark.parametrize("end", [{"losses": 6}, {"sent_at": LONG_AGO}], ids=["parked", "no answer"])
def test_a_create_that_ended_in_doubt_is_not_sent_again(parts: Parts, sandbox: Sandbox, end: dict[str, Any]) -> None:
    """It may have arrived: it is read, and only a new name pays for it again."""
    sandbox.set(external_ids=False, create_faults=["5000:created"], query_faults=["5001"])
    put(parts, LINES[0])
    run(parts, "creates")
    with parts.database.write() as session:
        session.execute(update(Task).values(lease=uuid.uuid4(), **end))
    parts.submitter.create_step.work(rows(parts)[0])
    assert (rows(parts)[0].state, of(parts).failed_at_provider("night")) == (TaskState.FAILED, 1)
    assert of(parts).retry("night").counts == {"reads_due": 1, "files_due": 0}
    finish(parts)
    assert len(sandbox.ledger().creates) == 1


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("is_other", [True, False])
def test_a_refused_line_is_replaced_by_no_other_request(parts: Parts, sandbox: Sandbox, is_other: bool) -> None:
    """A client of the gateway sends its id."""
    sandbox.set(create_faults=["1301"])
    put(parts, LINES[0])
    run(parts, "creates")
    row = rows(parts)[0]
    request = parts.submitter.parse({**row.request, "prompt": "a ship"} if is_other else row.request)
    with parts.database.write() as session:
        again = parts.submitter.insert_again(session, parts.submitter.row(request, row.external_task_id))
    assert (again is None, rows(parts)[0].request["prompt"]) == (is_other, "boat 0")


def test_dismissed_task_of_a_batch_is_not_sent_again(parts: Parts, sandbox: Sandbox) -> None:
    put(parts, *LINES[:2])
    dismiss(parts, rows(parts)[0])
    assert of(parts).retry("night").counts == {}
    run(parts, "creates")
    assert [create.body["prompt"] for create in sandbox.ledger().creates] == ["boat 1"]
    assert [task.batch_line for task in of(parts).failures("night")] == [1], "it is shown all the same"


@ONE_DATABASE
def test_a_dismissed_file_is_not_due_again(parts: Parts) -> None:
    put(parts, LINES[0])
    with parts.database.write() as session:
        ended = {"state": TaskState.SUCCEEDED, "archive": ArchiveState.ARCHIVING, "queued_at": None, "slots": 0}
        session.execute(update(Task).values(ended))
        new_asset(session, session.exec(select(Task)).one(), 0)
    dismiss(parts, rows(parts)[0])
    assert of(parts).retry("night").counts == {}


@ONE_DATABASE
def test_refused_task_that_is_sent_again_is_not_over(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1301"])
    put(parts, LINES[0])
    run(parts, "creates")
    with parts.database.write() as session:
        session.execute(update(Task).values(archive=ArchiveState.INCOMPLETE))  # as if it had been dismissed once
    of(parts).retry("night")
    assert of(parts).counts("night") == Counts(queued=1)


@ONE_DATABASE
def test_refused_create_whose_input_picture_is_not_stored_has_a_reason(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1301"])
    put(parts, {**GOOD, "image_list": [{"image": PICTURE}]})
    finish(parts)
    tally = of(parts).retry("night")
    assert "another name" in next(iter(tally.left.values()))
    assert not tally.is_good


@ONE_DATABASE
def test_files_that_were_given_up_are_due_again(parts: Parts, sandbox: Sandbox) -> None:
    put(parts, LINES[0])
    sandbox.set(cdn_faults=["html"] * 8)  # the number of tries after which the archive is reported incomplete

    def given_up() -> bool:
        parts.worker().run_until_idle()
        make_due_now(parts, Task, Asset)
        return of(parts).counts("night").incomplete == 1

    wait_until(given_up)
    assert of(parts).retry("night").counts["files_due"] == 1
    assert finish(parts).archived == 1


@ONE_DATABASE
def test_task_that_failed_at_the_provider_is_read_and_never_sent_again(parts: Parts, sandbox: Sandbox) -> None:
    put(parts, {**GOOD, "prompt": "[fail]"})
    finish(parts)
    assert of(parts).retry("night").counts["reads_due"] == 1
    assert finish(parts).failed == 1
    assert len(sandbox.ledger().creates) == 1


@pytest.mark.databases("sqlite")
def test_task_that_failed_at_the_provider_becomes_a_new_task_of_a_new_batch(parts: Parts, sandbox: Sandbox) -> None:
    put(parts, LINES[0], {**LINES[1], "external_task_id": "mine"}, LINES[1], LINES[1])
    sandbox.set(fail_rate=1)
    assert finish(parts).failed == 4
    dismiss(parts, rows(parts)[0])
    sandbox.set(fail_rate=0)
    again, left = of(parts).plan_again("night", "again")
    assert (of(parts).put(again), left) == (3, {})
    assert finish(parts, "again").archived == 3
    assert (of(parts).counts("night").failed, of(parts).failed_at_provider("night")) == (4, 3)
    assert of(parts).plan_again("night", "again")[0].new == []
    new = [task for task in rows(parts) if task.state is TaskState.SUCCEEDED]
    assert [(task.batch_line, task.external_task_id[-2:]) for task in new] == [(2, "-1"), (3, "-2"), (4, "-3")]


@pytest.mark.databases("sqlite")
def test_task_that_was_called_back_failed_at_the_provider_though_no_query_finds_it(
    parts: Parts, sandbox: Sandbox
) -> None:
    """The answer to its create was lost. A second create would be charged again, so it is never queued."""
    sandbox.set(external_ids=False, create_faults=["5000:created"])
    put(parts, LINES[0])
    run(parts, "creates")
    deliver(parts, rows(parts)[0], {"task_status": "failed", "task_id": "elsewhere"})
    make_due_now(parts, Task)
    run(parts, "creates")
    with parts.database.write() as session:
        session.execute(update(Task).values(submitted_at=LONG_AGO))  # the result lifetime is over
    run(parts, "reads")
    assert of(parts).counts("night") == Counts(failed=1)
    with parts.database.read() as session:
        [row] = session.exec(select(Task)).all()
        assert row.batch_id and batches.refused(session, row.batch_id) == []
    tally = of(parts).retry("night")
    assert (+tally.counts, tally.left) == ({"reads_due": 1}, {})
    run(parts, "creates", "reads")
    assert Operator(parts.database, {}, parts.schedule).reconcile([row.external_task_id])[0].counts["reads_due"] == 1
    assert (of(parts).counts("night"), len(sandbox.ledger().creates)) == (Counts(failed=1), 1)
    again, left = of(parts).plan_again("night", "again")
    assert (len(again.new), left, of(parts).failed_at_provider("night")) == (1, {}, 1)


@ONE_DATABASE
def test_retrying_what_failed_at_the_provider_names_the_command_that_pays_again(
    command: Command, parts: Parts, sandbox: Sandbox
) -> None:
    put(parts, {**GOOD, "prompt": "[fail]"}, LINES[0])
    finish(parts)
    assert "`receiver batch retry --as NAME night`" in command("batch", "retry", "night").err
    assert "1 new, 0 submitted before; dry run" in command("batch", "retry", "night", "--as", "b", "--dry-run").out
    assert "b: 1 new, 0 submitted before" in command("batch", "retry", "night", "--as", "b").out
    assert command("batch", "retry", "night", "--as", "b", "--json").json["known"] == 1
    for wrong in ("night", " "):
        assert command("batch", "retry", "night", "--as", wrong).code == 1
    assert len(rows(parts)) == 3


@ONE_DATABASE
def test_task_whose_input_picture_is_not_stored_cannot_be_sent_again(
    command: Command, parts: Parts, sandbox: Sandbox
) -> None:
    put(parts, {**GOOD, "prompt": "[fail]", "image_list": [{"image": PICTURE}]})
    finish(parts)
    done = command("batch", "retry", "night", "--as", "again")
    assert (done.code, "pictures were not kept" in done.err, len(rows(parts))) == (1, True, 1)


@ONE_DATABASE
def test_a_line_that_no_longer_fits_the_slots_keeps_no_other_from_being_sent_again(
    command: Command, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.batch.batch.CHUNK", 1)
    sandbox.set(fail_rate=1)
    put(parts, LINES[0], {**LINES[1], "n": 3}, LINES[2])
    finish(parts)
    monkeypatch.setenv("RECEIVER_KLING_SLOTS", "2")
    for words, says in ((("--dry-run",), "2 new"), ((), "2 new"), ((), "0 new, 2 submitted before")):
        done = command("batch", "retry", "night", "--as", "again", *words)
        assert (done.code, says in done.out, "the account has 2 slots" in done.err) == (1, True, True)
    assert of(parts).counts("again").total == 2


@ONE_DATABASE
def test_a_retry_that_finds_nothing_makes_no_batch(command: Command, parts: Parts) -> None:
    put(parts, *LINES)
    assert command("batch", "retry", "night", "--as", "again", "--json").json["new"] == 0
    assert [each["batch"] for each in command("batch", "list", "--json").json] == ["night"]


# -- progress ---------------------------------------------------------------------------------------------------------


def test_rate_over_five_minutes_estimates_the_time_left() -> None:
    rate = batch_view.Rate()
    seen = [rate.see(over, now) for now, over in ((0.0, 0), (100.0, 50), (310.0, 100))]
    assert seen == [0, 0.5, 50 / 210]
    assert "30.0/min, 0:01:00 left" in batch_view.words(Counts(queued=30, archived=7), 0.5)


def test_progress_names_what_the_batch_waits_for() -> None:
    line = StringIO()
    batch_view.watch(lambda: Counts(archived=7), lambda: 1, Console(file=line), waiting=lambda: ["1 file waits: x"])
    assert line.getvalue() == "7/7 queued 0 · running 0 · archived 7 · failed 0 · 1 file waits: x\n"


# -- the command line -------------------------------------------------------------------------------------------------

Command = Callable[..., Done]


@pytest.fixture
def command(parts: Parts, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`receiver …` in this process, in a folder of its own, because a process each would take the time of ten tests."""
    settings = variables(parts.settings.database_url.get_secret_value(), parts.bucket, sandbox)
    for name, value in {**settings, "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: str, given: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(given.encode())))
        out, err, code = StringIO(), StringIO(), 0  # never closed, because loggers keep their stream
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main.app(list(words))
            except SystemExit as end:
                code = int(end.code or 0)
            except UserError as error:  # as `main.main` ends
                code = 1
                err.write(f"{error}\n")
        return Done(code, out.getvalue(), err.getvalue())

    return call


@ONE_DATABASE
def test_thirty_faults_are_all_listed_and_nothing_is_sent(command: Command, parts: Parts, sandbox: Sandbox) -> None:
    Path("night.jsonl").write_bytes(faulty_file())
    done = command("submit", "--batch", "night.jsonl")
    lines = [line.split(":")[1] for line in done.err.splitlines() if line.startswith("night.jsonl:")]
    assert lines == [str(2 + 2 * number) for number in range(len(FAULTS))]
    assert (done.code, f"{len(FAULTS)} faults; nothing was sent" in done.err) == (1, True)
    told = command("submit", "--batch", "night.jsonl", "--json").json
    assert len(told["faults"]) == len(FAULTS)
    assert (rows(parts), sandbox.ledger().creates) == ([], ())


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Plan], object]], None]:
    """Runs something between a command's check of its file and its first row."""

    def run_before(act: Callable[[Plan], object]) -> None:
        whole = Batches.put

        def late(self: Batches, plan: Plan, progress: Callable[[int], None]) -> int:
            monkeypatch.setattr(Batches, "put", whole)
            act(plan)
            return whole(self, plan, progress)

        monkeypatch.setattr(Batches, "put", late)

    return run_before


@ONE_DATABASE
def test_lines_that_were_put_in_before_a_fault_are_told(
    command: Command, parts: Parts, meanwhile: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.batch.batch.CHUNK", 2)
    Path("night.jsonl").write_bytes(jsonl(*LINES[:3], {**GOOD, "external_task_id": "mine"}))
    meanwhile(lambda _: parts.submitter.submit({**GOOD, "n": 2}, external_task_id="mine"))
    done = command("submit", "--batch", "night.jsonl")
    assert (done.code, of(parts).counts("night").total) == (1, 2)
    assert "1 fault; 2 lines were put in before and will be sent" in done.err and "nothing was sent" not in done.err
    assert command("submit", "--batch", "night.jsonl", "--json").json["inserted"] == 0


@ONE_DATABASE
def test_lines_that_another_command_put_in_meanwhile_do_not_count_as_new(
    command: Command, parts: Parts, meanwhile: Callable[..., None]
) -> None:
    Path("night.jsonl").write_bytes(jsonl(*LINES))
    meanwhile(of(parts).put)
    told = command("submit", "--batch", "night.jsonl", "--json").json
    assert (told["new"], told["known"], len(rows(parts))) == (0, len(LINES), len(LINES))


@ONE_DATABASE
def test_second_file_of_one_name_is_refused_until_the_name_is_given(command: Command, parts: Parts) -> None:
    put(parts, *LINES)
    Path("night.csv").write_text("model_name,prompt\nkling-v3-omni,a boat\n")
    done = command("submit", "--batch", "night.csv")
    assert (done.code, len(rows(parts))) == (1, len(LINES))
    assert "give another name, or give this one" in done.err and "--name NAME gives" in done.err
    assert command("submit", "--batch", "night.csv", "--name", "night").code == 0
    assert len(rows(parts)) == len(LINES) + 1


@ONE_DATABASE
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_whose_name_macos_spells_otherwise_is_not_paid_twice(
    forms: tuple[Any, Any], command: Command, parts: Parts
) -> None:
    for number, form in enumerate(forms):
        file = Path(unicodedata.normalize(form, "café.jsonl"))
        file.write_bytes(jsonl(*LINES[: number + 1]))
        assert "1 new" in command("submit", "--batch", str(file)).out
        assert command("batch", "retry", unicodedata.normalize(form, "café")).code == 0
    with parts.database.read() as session:
        assert [batch.name for batch in session.exec(select(Batch))] == ["caf\u00e9"]
    assert len(rows(parts)) == 2


@ONE_DATABASE
def test_a_batch_of_an_earlier_release_keeps_its_spelling(command: Command, parts: Parts) -> None:
    earlier = unicodedata.normalize("NFD", "café")
    put(parts, LINES[0], name=earlier)
    Path("café.jsonl").write_bytes(jsonl(LINES[0]))
    assert "0 new, 1 submitted before" in command("submit", "--batch", "café.jsonl").out
    assert len(rows(parts)) == 1


@ONE_DATABASE
def test_a_batch_from_standard_input_to_its_report(command: Command, parts: Parts) -> None:
    table = "model_name,prompt\nkling-v3-omni,a boat\nkling-v3-omni,[fail]\n"
    done = command("submit", "--batch", "-", "--name", "night", "--format", "csv", given=table)
    assert (done.code, "2 new, 0 submitted before" in done.out) == (0, True)
    assert "no worker is alive" in done.err
    assert command("batch", "status", "night").code == 1
    finish(parts)
    told = command("batch", "status", "night", "--json")
    assert (told.code, json.loads(told.out)["archived"]) == (1, 1)
    assert len(json.loads(told.out)["failures"]) == 1
    assert command("batch", "export", "night", "--format", "csv").out.count("\n") == 3
    assert command("batch", "export", "night", "--output", "all.json").code == 0
    assert len(json.loads(Path("all.json").read_text())["tasks"]) == 2
    assert "night" in command("batch", "list").out
    assert command("batch", "status", "other").code == 1


WAITING = {
    "batch": ("submit", "--batch", "night.jsonl", "--wait"),
    "single": ("submit", "--model-name", "kling-v3-omni", "--prompt", "a boat", "--wait"),
}


@ONE_DATABASE
@pytest.mark.parametrize("words", WAITING.values(), ids=WAITING)
def test_waiting_without_a_worker_is_reported_and_ends(
    command: Command, parts: Parts, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "WORKER_START_SECONDS", 0.3)
    Path("night.jsonl").write_bytes(jsonl(LINES[0]))
    done = command(*words)
    assert done.code == 1
    assert "no worker is alive, waiting 0.3 s; if none is starting, start `receiver serve`" in done.err
    assert len(rows(parts)) == 1


@ONE_DATABASE
@pytest.mark.parametrize("words", WAITING.values(), ids=WAITING)
def test_waiting_includes_a_worker_that_is_starting(command: Command, parts: Parts, words: tuple[str, ...]) -> None:
    def work() -> bool:
        parts.worker().run_until_idle()
        make_due_now(parts, Task)
        return all(is_over(task) for task in rows(parts))

    def begin_late() -> None:
        wait_until(lambda: [task for task in rows(parts) if task.queued_at or task.state is not TaskState.CREATED])
        heartbeats.register(parts.database, 1)
        wait_until(work, seconds=30)

    Path("night.jsonl").write_bytes(jsonl(LINES[0]))
    worker = threading.Thread(target=begin_late)
    worker.start()
    done = command(*words)
    worker.join()
    assert (done.code, "archived" in done.out or "s3://" in done.out) == (0, True)


@ONE_DATABASE
def test_waiting_ends_when_the_last_worker_has_ended(
    command: Command, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait in silence for a worker that was alive at its beginning."""
    monkeypatch.setattr(show, "WORKER_START_SECONDS", 0.3)
    worker, count = heartbeats.register(parts.database, 1), heartbeats.count_alive

    def seen_once(database: Database) -> int:
        alive = count(database)
        heartbeats.unregister(database, worker)
        return alive

    monkeypatch.setattr(heartbeats, "count_alive", seen_once)
    done = command(*WAITING["single"])
    assert (done.code, "submitted, but no worker is alive" in done.err) == (1, True)


@ONE_DATABASE
def test_waiting_ends_with_the_batch_and_writes_its_report(command: Command, parts: Parts) -> None:
    Path("night.jsonl").write_bytes(jsonl(*LINES[:2]))
    command("submit", "--batch", "night.jsonl")
    finish(parts)
    heartbeats.register(parts.database, 1)
    done = command("submit", "--batch", "night.jsonl", "--wait", "--report", "all.csv", "--report", "all.json")
    assert (done.code, "archived 2" in done.out) == (0, True)
    assert Path("all.csv").read_text().count(".png") == 2


@ONE_DATABASE
@pytest.mark.parametrize(
    ("report", "code", "why"),
    [
        ("folder", 1, "folder cannot be written: Is a directory"),
        ("night.jsonl/all.csv", 1, "night.jsonl/all.csv cannot be written: Not a directory"),
        ("./night.jsonl", 2, "night.jsonl is the batch itself"),
        ("-", 2, "`receiver batch export` prints the report"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_sent(
    report: str, code: int, why: str, command: Command, parts: Parts
) -> None:
    Path("folder").mkdir()
    Path("night.jsonl").write_bytes(jsonl(*LINES))
    done = command("submit", "--batch", "night.jsonl", "--wait", "--report", report)
    assert (done.code, why in done.err, "Traceback" in done.err, rows(parts)) == (code, True, False, []), done.err
    assert Path("night.jsonl").read_bytes() == jsonl(*LINES)


@ONE_DATABASE
def test_a_report_is_written_to_a_pipe_that_stays_one(tmp_path: Path, parts: Parts) -> None:
    put(parts, *LINES)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read_bytes)
        batch_report.write(pipe, "night", batch_report.lines(parts.database, of(parts), "night"))
        assert len(json.loads(reading.result(10))["tasks"]) == len(LINES)
    assert pipe.is_fifo()


@ONE_DATABASE
def test_a_report_to_an_open_file_replaces_no_device(tmp_path: Path, parts: Parts) -> None:
    put(parts, *LINES)
    with (tmp_path / "all.csv").open("wb") as file:
        batch_report.write(
            Path(f"/dev/fd/{file.fileno()}"), "night", batch_report.lines(parts.database, of(parts), "night")
        )
        assert os.fstat(file.fileno()).st_size == (tmp_path / "all.csv").stat().st_size > 0


@ONE_DATABASE
def test_a_dry_run_says_what_it_costs_and_writes_nothing(
    command: Command, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("night.jsonl").write_bytes(jsonl(*LINES, {**GOOD, "n": 3}))
    done = command("submit", "--batch", "night.jsonl", "--dry-run")
    assert "8 pictures (8 slots), 64 units = 0.224 USD by prices of 2026-09" in done.out
    Path("new.jsonl").write_bytes(jsonl({**GOOD, "model_name": "kling-v9"}))
    done = command("submit", "--batch", "new.jsonl", "--dry-run")
    assert "1 picture (1 slot); no price is known for 1 of the pictures" in done.out
    assert rows(parts) == []
    monkeypatch.setenv("RECEIVER_DATABASE_URL", "sqlite:///no.db")
    assert command("submit", "--batch", "night.jsonl", "--dry-run", "--json").json["new"] == 6
    assert not Path("no.db").exists()


@ONE_DATABASE
@pytest.mark.parametrize(
    "words",
    [
        ["--batch", "-"],
        ["--batch", "night.jsonl", "--prompt", "a boat"],
        ["--batch", "missing.jsonl"],
        ["--batch", "night.jsonl", "--report", "all.csv"],
        ["--prompt", "a boat", "--dry-run"],
    ],
    ids=["no name", "field beside", "no file", "report unwaited", "no batch"],
)
def test_wrong_usage_is_reported(command: Command, words: list[str]) -> None:
    Path("night.jsonl").write_bytes(jsonl(GOOD))
    assert command("submit", *words).code == 2


# -- whole batches ----------------------------------------------------------------------------------------------------


@pytest.mark.campaign("sqlite")
def test_a_batch_survives_kills_in_the_night(database_kind: str, tmp_path: Path) -> None:
    """The short form of `python -m tests.night_run`; outside CI with one worker instead of two."""
    workers = 2 if "CI" in os.environ else 1
    outcome = spend_a_night(tmp_path, lines=24, database=database_kind, kills=1, workers=workers)
    assert outcome.faults == []
    assert outcome.figures["archived"] == 24
    assert all(outcome.figures["leases lost at kill 1"])


@ONE_DATABASE
def test_a_pipe_needs_a_name(command: Command, parts: Parts) -> None:
    """`<(make-prompts)` is a pipe: its name would be the descriptor's number, which changes every night."""
    reader, writer = os.pipe()
    with open(writer, "wb") as pipe:
        pipe.write(jsonl(*LINES))
    path = f"/dev/fd/{reader}"
    refused = command("submit", "--batch", path)
    assert (refused.code, "(no regular file) has no name: give --name" in refused.err) == (2, True)
    assert rows(parts) == []
    assert command("submit", "--batch", path, "--name", "night").code == 0
    assert len(rows(parts)) == 5
    os.close(reader)


@ONE_DATABASE
def test_a_spreadsheet_saved_as_text_is_read(command: Command, parts: Parts) -> None:
    Path("night.txt").write_text("model_name;prompt\nkling-v3-omni;a boat\n")
    assert command("submit", "--batch", "night.txt").code == 0
    assert len(rows(parts)) == 1
