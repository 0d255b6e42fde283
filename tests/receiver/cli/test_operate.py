"""The operator's commands: output, exit codes, JSON, and dry runs that change nothing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col
from typer.testing import CliRunner

from receiver.app.wiring import Parts
from receiver.cli import archive
from receiver.cli.main import app
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.rows.models import Callback, Event, Task
from tests.command_line import CommandLine, variables
from tests.harness import wait_until
from tests.pipeline import deliver, insert_row
from tests.receiver.tasks.test_adopt import made_elsewhere
from tests.receiver.tasks.test_operate import ASKED, counted, everything, lost, operating
from tests.rows import LONG_AGO, new_task


def accidents(parts: Parts) -> dict[str, Any]:
    """One row of each kind that a command would change, and the commands."""
    task, [asset] = lost(parts.database)
    waiting = insert_row(parts)
    row = deliver(parts, waiting, {"task_id": "7", "task_status": "processing"})
    unmatched = deliver(parts, None, {"task_id": "8", "task_status": "processing"})
    later = parts.database.now() + timedelta(hours=1)
    with parts.database.write() as session:
        of_task = update(Callback).where(col(Callback.id) == row.id)
        session.execute(of_task.values(received_at=LONG_AGO, task_id=task.id))
        session.execute(update(Event).values(at=LONG_AGO))
        session.execute(update(Task).where(col(Task.id) == task.id).values(request=ASKED))
        # Its read is far off: one that is due already is no change.
        session.execute(update(Task).where(col(Task.id) == waiting.id).values(due_at=later))
    return {
        "retry": lambda operator: operator.retry(str(asset.id)),
        "retry_failed": lambda operator: operator.retry_failed(limit=10),
        "replay": lambda operator: operator.replay([row.id or 0]),
        "reconcile": lambda operator: operator.reconcile()[0],
        "reconcile_one": lambda operator: operator.reconcile([waiting.external_task_id])[0],
        "dismiss": lambda operator: operator.dismiss(waiting.external_task_id, "why"),
        "dismiss_deliveries": lambda operator: operator.dismiss_deliveries([unmatched.id or 0], "why"),
        "prune": lambda operator: operator.prune(timedelta(days=1)),
    }


@pytest.mark.parametrize(
    "verb", ["retry", "retry_failed", "replay", "reconcile", "reconcile_one", "dismiss", "dismiss_deliveries", "prune"]
)
@pytest.mark.databases("sqlite")
def test_a_dry_run_counts_what_would_be_done_and_changes_nothing(parts: Parts, verb: str) -> None:
    call = accidents(parts)[verb]
    before = everything(parts.database)
    would = call(operating(parts.database, parts, dry_run=True))
    assert everything(parts.database) == before
    did = call(operating(parts.database, parts))
    assert everything(parts.database) != before
    assert counted(would) == counted(did) != {}


@pytest.fixture
def receiver(bucket: Bucket, sandbox: Sandbox, migrated_sqlite: Path, tmp_path: Path) -> CommandLine:
    """On a SQLite file with the schema."""
    (tmp_path / "receiver.db").write_bytes(migrated_sqlite.read_bytes())
    return CommandLine(variables("sqlite:///receiver.db", bucket, sandbox), tmp_path)


@pytest.fixture
def beside(receiver: CommandLine) -> Database:
    """The database file of the commands."""
    return Database(f"sqlite:///{receiver.folder / 'receiver.db'}")


def test_operator_commands_have_documented_output_and_exit_codes(receiver: CommandLine, beside: Database) -> None:
    task, _ = lost(beside, 2)
    would = receiver("retry", task.external_task_id, "--dry-run")
    assert (would.code, would.out) == (0, "dry run, nothing was changed: files due: 2\n")
    again = receiver("dismiss", "no-such-task", "--reason", "why")
    assert (again.code, again.out) == (1, "nothing to do\n")
    assert again.err == "no-such-task: no task has this external id\n"
    again = receiver("dismiss", "--delivery", "4711", "--reason", "why")
    assert (again.code, again.err.startswith("4711: no such delivery")) == (1, True)
    beside.close()


def test_command_without_work_says_why(receiver: CommandLine) -> None:
    for words, why in (
        (("retry", "--all-failed"), "no file was given up"),
        (("replay", "--since", "3h"), "no stored delivery"),
        (("reconcile",), "no task waits"),
        (("prune", "--older-than", "9"), "older than that"),
    ):
        done = receiver(*words)
        assert (done.code, done.out, why in done.err) == (0, "nothing to do\n", True), done


def test_task_is_named_by_its_own_id_too_and_a_pipe_wraps_no_id(receiver: CommandLine, beside: Database) -> None:
    name = "order-" + "4711" * 30
    with beside.write() as session:
        task = new_task(session, external_task_id=name, error="a long reason " * 20)
    listed = receiver("status", COLUMNS="60").out.splitlines()
    assert any(line.startswith(f"{name} ") and "a long reason a long" in line for line in listed)
    for own_id in (str(task.id), task.id.hex):
        assert receiver("status", own_id).out.startswith(name)
    assert receiver("dismiss", task.id.hex, "--reason", "known").out == "dismissed: 1\n"
    assert "no task" in receiver("status", task.id.hex[:-1]).err
    beside.close()


def test_operator_commands_print_json(receiver: CommandLine, beside: Database) -> None:
    lost(beside, 2)
    done = receiver("retry", "--all-failed", "--since", "2019-12-31", "--error", "no picture", "--limit", "1", "--json")
    assert done.json == {"ok": True, "dry_run": False, "counts": {"files_due": 1}, "left": {}}
    beside.close()


def test_adopt_and_reconcile_run_as_commands(receiver: CommandLine, beside: Database, sandbox: Sandbox) -> None:
    sandbox.set(processing_seconds=600)
    made_elsewhere(sandbox, "theirs")
    assert receiver("adopt", "--listed-days", "1").out == "adopted: 1\n"
    done = receiver("reconcile", "--wait")
    assert (done.code, done.out) == (0, "reads due: 1, read: 1\n")
    beside.close()


@pytest.mark.parametrize(
    "words",
    [
        ("retry",),
        ("retry", "x", "--all-failed"),
        ("retry", "x", "--limit", "3"),
        ("retry", "--all-failed", "--accept-unverified"),
        ("replay",),
        ("replay", "--since", "yesterday"),
        ("replay", "1", "--since", "3h"),
        ("adopt",),
        ("adopt", "x", "--listed-days", "3"),
        ("dismiss", "x"),
        ("dismiss", "x", "--reason", " "),
        ("dismiss", "--reason", "x"),
        ("dismiss", "x", "--delivery", "1", "--reason", "x"),
        ("dismiss", "x", "--object", "x", "--reason", "x"),
        ("dismiss", "--object", "x"),
        ("prune",),
        ("prune", "--older-than", "0"),
    ],
)
def test_wrong_usage_is_reported_before_anything_is_opened(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, list(words)).exit_code == 2


def test_archive_command_that_is_held_up_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archive, "STALLED_SECONDS", 0.01)
    silent = Bucket("pictures", endpoint_url="http://us:hush@127.0.0.1:1")
    said: list[str] = []
    with archive._progress("auditing", silent, None):
        wait_until(lambda: said.append(capsys.readouterr().err) or any(said))
    words = "auditing: nothing was finished for 0.01 s, waiting for the store at 127.0.0.1:1 (bucket pictures)"
    assert "".join(said).splitlines()[0] == words
