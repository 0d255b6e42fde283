"""Ids and texts of others: every command escapes them, and no new task gets such an id."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from receiver.app.wiring import Parts
from receiver.base import telemetry
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.keys import IdInvalid
from storage.operations import outbox
from storage.rows.models import Batch, Dispatch, Event
from storage.states import ArchiveState, AssetState, DispatchState, TaskState
from tests.command_line import CommandLine, Done, variables
from tests.rows import LONG_AGO, new_asset, new_task

# Rich's markup, a title, a cleared screen, a forged line, text that runs backwards, a C1 escape, DEL
HOSTILE = "[/nope]\x1b]0;owned\x07\x1b[2J\nforged 99 ok\u202e\x9b31m\x7f"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture
def receiver(bucket: Bucket, sandbox: Sandbox, migrated_sqlite: Path, tmp_path: Path) -> CommandLine:
    """On a database with such a task from an earlier release."""
    (tmp_path / "receiver.db").write_bytes(migrated_sqlite.read_bytes())
    database = Database(f"sqlite:///{tmp_path / 'receiver.db'}")
    with database.write() as session:
        batch = Batch(name=HOSTILE, created_at=LONG_AGO)
        session.add(batch)
        session.flush()
        over = {"state": TaskState.SUCCEEDED, "archive": ArchiveState.INCOMPLETE, "batch_id": batch.id, "batch_line": 1}
        task = new_task(session, external_task_id=HOSTILE, step=None, due_at=None, error=HOSTILE, **over)
        new_asset(session, task, 0, state=AssetState.FAILED, error=HOSTILE, due_at=None)
        event = Event(name="task.incomplete", at=LONG_AGO, task_id=task.id, data={})
        session.add(event)
        session.flush()
        session.add(
            Dispatch(event_id=event.id, sink=HOSTILE, state=DispatchState.DEAD, error=HOSTILE, created_at=LONG_AGO)
        )
    outbox.sequence_all(database, ())
    database.close()
    return CommandLine(variables("sqlite:///receiver.db", bucket, sandbox), tmp_path)


VERBS = [
    ("status",),
    ("status", HOSTILE),
    ("status", HOSTILE, "--urls"),
    ("retry", HOSTILE, "--dry-run"),
    ("retry", "--all-failed", "--dry-run"),
    ("replay", "1"),
    ("reconcile", HOSTILE, "--wait"),
    ("adopt", HOSTILE),
    ("dismiss", HOSTILE, "--reason", HOSTILE),
    ("delete", HOSTILE, "--dry-run"),
    ("export", "out", "--task", HOSTILE),
    ("audit",),
    ("rebuild",),
    ("check",),
    ("batch", "list"),
    ("batch", "status", HOSTILE),
    ("batch", "retry", HOSTILE),
    ("events", "list"),
    ("events", "tail"),
    ("events", "enable", HOSTILE),
    ("events", "disable", HOSTILE),
    ("submit", "--batch", HOSTILE),
    ("status", f"no {HOSTILE}"),
    ("sandbox", "--knob", HOSTILE),
    (HOSTILE,),
]


def check_harmless(done: Done) -> None:
    shown = done.out + done.err
    assert not OBEYED.search(shown), shown
    assert not re.search("^forged", shown, re.MULTILINE), shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("words", VERBS, ids=lambda words: " ".join(words).replace(HOSTILE, "ID"))
def test_no_command_prints_control_sequences(receiver: CommandLine, words: tuple[str, ...]) -> None:
    check_harmless(receiver(*words))


@pytest.mark.parametrize("words", [("status",), ("status", HOSTILE), ("events", "list"), ("batch", "list")])
def test_json_keeps_the_text_and_shows_nothing_raw(receiver: CommandLine, words: tuple[str, ...]) -> None:
    done = receiver(*words, "--json")
    check_harmless(done)
    assert json.dumps(HOSTILE) in json.dumps(done.json)


@pytest.mark.parametrize("format", ["csv", "json"])
def test_a_batch_report_on_the_terminal_is_harmless(receiver: CommandLine, format: str) -> None:
    done = receiver("batch", "export", HOSTILE, "--format", format)
    check_harmless(Done(done.code, done.out.replace("\r\n", "\n"), done.err))
    assert "nope" in done.out


def test_question_of_delete_shows_the_id_escaped(receiver: CommandLine) -> None:
    done = receiver("delete", HOSTILE, given="n\n")
    check_harmless(done)
    assert r"Delete [/nope]\x1b]0;owned\x07" in done.err + done.out


def test_status_shows_the_id_escaped(receiver: CommandLine) -> None:
    assert r"[/nope]\x1b]0;owned\x07\x1b[2J\nforged 99 ok\u202e\x9b31m\x7f" in receiver("status", COLUMNS="400").out


def test_console_log_escapes_text_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    import structlog

    telemetry.configure("info", "console")
    structlog.get_logger().info("task.read", task=HOSTILE)
    shown = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().err)
    assert r"\x1b]0;owned" in shown and not OBEYED.search(shown)


@pytest.mark.parametrize("bad", ["\x1b[2J", "a\nb", "a\u202eb", "\x9b", "a\x7f", "\u2066"])
def test_no_new_task_gets_an_id_with_a_control_character(parts: Parts, bad: str) -> None:
    with pytest.raises(IdInvalid, match="control character"):
        parts.submitter.submit({"model_name": "kling-image-o1", "prompt": "a boat"}, external_task_id=f"a{bad}")


def test_a_batch_line_with_such_an_id_is_a_fault(receiver: CommandLine) -> None:
    line = {"model_name": "kling-image-o1", "prompt": "a boat", "external_task_id": "a\x1b[2J"}
    (receiver.folder / "b.jsonl").write_text(json.dumps(line))
    done = receiver("submit", "--batch", "b.jsonl")
    assert (done.code, done.err.splitlines()[0]) == (
        1,
        r"b.jsonl:1: external_task_id holds a control character (\x1b at character 2)",
    )
