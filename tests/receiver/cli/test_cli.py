"""The command line in real processes: output, exit codes and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import receiver as package
from receiver.cli.main import app, main
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.rows import migrations
from tests.command_line import CommandLine, Done
from tests.harness import wait_until
from tests.rows import new_assets

VERBS = get_command(app).commands  # type: ignore[attr-defined]
ASK = ("submit", "--model-name", "kling-image-o1", "--prompt", "a boat")
# DESIGN, section 6. Further output may change, this may not.
TASK_KEYS = "external_task_id task_id provider_task_id state archive expected error assets events"
ASSET_KEYS = "kind index state key uri sha256 size media_type error"


def last_line(done: Done) -> str:
    return done.err.splitlines()[-1]


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_option(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    assert VERBS[verb].help.splitlines()[0] in " ".join(shown.output.split())
    for parameter in VERBS[verb].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert parameter.opts[0] in shown.output, parameter.name


def test_help_and_version_in_a_process(receiver: CommandLine) -> None:
    shown = receiver("--help")
    assert shown.code == 0
    assert all(f" {verb} " in shown.out for verb in VERBS)
    assert receiver("--version") == Done(0, f"{package.__version__}\n", "")


def test_the_verbs_import_what_they_use_when_they_run() -> None:
    """SQLAlchemy, boto3 and their like take 0.7 s, which the help and a mistyped option would wait for."""
    heavy = {"sqlalchemy", "sqlmodel", "httpx", "botocore", "pydantic", "starlette", "structlog"}
    lines = f"import receiver.cli.main, sys; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, timeout=60)
    assert done.stdout.split() == []


def test_help_needs_no_settings_and_reads_no_env_file(receiver: CommandLine) -> None:
    (receiver.folder / ".env").write_text("RECEIVER_PORT=nonsense\n")
    assert receiver("submit", "--help", RECEIVER_S3_BUCKET=None).code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("status", "--nonsense"),
        (*ASK, "--n", "many"),
        ("submit", "--request", "missing.json"),
        ("submit", "--request", "-"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(ready: CommandLine, words: tuple[str, ...]) -> None:
    done = ready(*words, given="[1, 2]")
    assert (done.code, done.out) == (2, "")
    assert "Usage: " in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("words", [(), ("batch",), ("events",)], ids=" ".join)
def test_a_command_without_its_word_prints_its_help(words: tuple[str, ...], receiver: CommandLine) -> None:
    assert receiver(*words).err.splitlines() == receiver(*words, "--help").out.splitlines()


def test_settings_faults_are_reported_in_one_line_each(receiver: CommandLine) -> None:
    done = receiver("status", RECEIVER_S3_BUCKET=None, RECEIVER_PORT="many", RECEIVER_KLING_API_KEY="")
    assert (done.code, done.out) == (1, "")
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["RECEIVER_PORT", "RECEIVER_S3_BUCKET"]
    wrong = receiver(*ASK, RECEIVER_PUBLIC_URL="http://example.com", RECEIVER_DATABASE_URL="oracle://u:hunter2@h/x")
    assert wrong.code == 1
    assert "hunter2" not in wrong.err


def test_migrate_says_what_it_did(receiver: CommandLine) -> None:
    before = receiver("status")
    assert (before.code, before.out) == (1, "")
    assert "run `receiver migrate`" in before.err
    assert receiver("migrate") == Done(0, f"schema empty -> {migrations.head()}\n", "")
    assert receiver("migrate") == Done(0, f"schema {migrations.head()} was there already\n", "")


def test_a_submitted_task_is_archived_by_a_worker_and_shown_by_status(receiver: CommandLine, bucket: Bucket) -> None:
    """From an empty folder to pictures in the bucket."""
    assert receiver("migrate").code == 0
    submitted = receiver(*ASK, "--n", "2")
    assert (submitted.code, "no worker is alive" in submitted.err) == (0, True)
    name = submitted.out.strip()
    waiting = receiver("status", name).out
    assert "  next: the provider is asked how it stands (2" in waiting
    assert "  no worker is alive: start `receiver serve`" in waiting

    def archived() -> Any:
        worked = receiver("work", "--once")
        assert worked.code == 0 and worked.out.startswith("worked on ")
        report = receiver("status", name, "--json").json
        return report if report["archive"] == "archived" else None

    report = wait_until(archived, seconds=60)
    assert {one["uri"] for one in report["assets"]} <= {bucket.uri(each.key) for each in bucket.list(bucket.prefix)}
    for shown in (receiver("status").out, receiver("status", name).out):
        assert name in shown and "succeeded" in shown and "archived" in shown and "next:" not in shown
    assert len(receiver("status", "--json").json["tasks"]) == 1
    assert f"  units: {report['units']}\n" in receiver("status", name).out and float(report["units"]) > 0
    check_the_contract(report, name)


def test_what_work_did_is_not_said_among_events(receiver: CommandLine) -> None:
    """`receiver work --once | jq` failed at the last line."""
    assert receiver("migrate").code == 0
    assert receiver(*ASK).code == 0
    done = receiver("work", "--once", RECEIVER_EVENT_SINKS="stdout:")
    assert (done.code, "worked on " in done.err) == (0, True)
    assert {json.loads(line)["specversion"] for line in done.out.splitlines()} <= {"1.0"}


def check_the_contract(report: dict[str, Any], name: str) -> None:
    assert " ".join(key for key in report if key not in ("units", "note")) == TASK_KEYS
    assert (report["external_task_id"], report["state"], report["expected"]) == (name, "succeeded", 2)
    assert [one["index"] for one in report["assets"]] == [0, 1]
    for asset in report["assets"]:
        assert " ".join(key for key in asset if key not in ("id", "trailing_bytes", "notes")) == ASSET_KEYS
        assert (asset["kind"], asset["state"], asset["media_type"]) == ("image", "archived", "image/png")
        assert len(asset["sha256"]) == 64 and asset["size"] > 0
    assert all(set(event) == {"name", "at"} for event in report["events"])
    names = [event["name"] for event in report["events"]]
    assert (names[0], names[-1]) == ("task.created", "task.archived")


def test_status_says_what_to_do_about_files_that_wait_for_the_store(ready: CommandLine) -> None:
    advice = "`receiver check` tests the store and the spool folder, and says what to do"
    database = Database(f"sqlite:///{ready.folder}/receiver.db")
    (unread,) = new_assets(database, 1, error="cdn.example answered 503", due_at=database.now())
    assert all(advice not in ready("status", *words).out for words in ((), (str(unread.task_id),)))
    (asset,) = new_assets(database, 1, error="the store at 127.0.0.1:1 cannot be reached", due_at=database.now())
    database.close()
    assert all(advice in ready("status", *words).out for words in ((), (str(asset.task_id),)))


def test_submit_reports_json_before_anything_came(ready: CommandLine) -> None:
    report = ready(*ASK, "--json", "--external-task-id", "mine").json
    assert (report["external_task_id"], report["archive"], report["assets"]) == ("mine", "none", [])


def test_every_wrong_field_is_named(ready: CommandLine, sandbox: Sandbox) -> None:
    done = ready("submit", "--model-name", "kling-image-o1", "--n", "12", "--resolution", "8k", "--aspect-ratio", "5:1")
    assert (done.code, done.out) == (1, "")
    named = {line.split(":")[0] for line in done.err.splitlines()}
    assert {"prompt", "n", "resolution", "aspect_ratio"} <= named
    assert not sandbox.ledger().creates
    assert ready("status", "--json").json["tasks"] == []


def test_same_id_and_request_are_submitted_once(ready: CommandLine, sandbox: Sandbox) -> None:
    mine = ("--external-task-id", "mine")
    assert ready(*ASK, *mine).out == "mine\n"
    again = ready(*ASK, *mine)
    assert (again.code, again.out) == (0, "mine\n")
    assert "submitted before" in again.err
    other = ready(*ASK, *mine, "--n", "3")
    assert (other.code, other.out) == (1, "")
    assert "another request" in last_line(other)
    assert len(sandbox.ledger().creates) == 1


def test_a_refused_request_is_exit_code_1(ready: CommandLine, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1301"])
    done = ready(*ASK, "--external-task-id", "mine")
    assert (done.code, done.out) == (1, "mine\n")
    assert last_line(done).startswith("failed: ") and "1301" in last_line(done)


def test_unknown_task_is_reported_in_one_line_with_exit_code_1(ready: CommandLine) -> None:
    for words in (("status", "nothing"), ("status", "nothing", "--json")):
        assert ready(*words) == Done(1, "", "no task 'nothing' here; `receiver status` lists the newest\n")


WRONG = {
    "a batch that is not here": (("batch", "status", "none"), {}, "no batch 'none' here"),
    "a task that is not here": (("delete", "none", "--yes"), {}, "no task 'none' here"),
    "an id that is too long": ((*ASK, "--external-task-id", "x" * 201), {}, "external_task_id takes 201 bytes"),
    "a key with a space": (ASK, {"RECEIVER_KLING_API_KEY": "a b"}, "RECEIVER_KLING_API_KEY: must be printable ASCII"),
    "a store nobody can dial": (("audit",), {"RECEIVER_S3_ENDPOINT_URL": "http://my_store"}, "boto3 refuses the host"),
}


@pytest.mark.parametrize("case", WRONG)
def test_users_mistake_is_reported_in_one_line_without_a_traceback(case: str, ready: CommandLine) -> None:
    words, changes, said = WRONG[case]
    done = ready(*words, **changes)
    assert (done.code, len(done.err.splitlines()), said in done.err) == (1, 1, True), done.err


BUGS = {
    "KeyError": lambda: {}["key"],
    "IndexError": lambda: [][0],
    "UnicodeDecodeError": lambda: b"\xff".decode(),
    "ValueError": lambda: int("x"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_shows_its_traceback_whatever_its_class(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # `main` sets another
    monkeypatch.setattr(app, "registered_commands", [])
    monkeypatch.setattr(sys, "argv", ["receiver", "bug"])
    app.command("bug")(BUGS[name])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err.splitlines()
    assert (ended.value.code, shown[0]) == (1, "Traceback (most recent call last):")
    assert shown[-1].startswith(f"{name}: ")


def test_request_is_read_from_a_file(ready: CommandLine, sandbox: Sandbox) -> None:
    """Options take precedence over the file, and its callback_url is ignored."""
    request = {"model_name": "kling-image-o1", "prompt": "a boat", "n": 2, "external_task_id": "theirs"}
    (ready.folder / "r.json").write_text(json.dumps({**request, "callback_url": "https://example.com"}))
    assert ready("submit", "--request", "r.json", "--n", "3").out == "theirs\n"
    assert ready("submit", "--request", "r.json", "--external-task-id", "mine").out == "mine\n"
    assert ready("submit", "--request", "-", given=json.dumps({**request, "external_task_id": "piped"})).code == 0
    sent = [create.body for create in sandbox.ledger().creates]
    assert [(body["external_task_id"], body["n"]) for body in sent] == [("theirs", 3), ("mine", 2), ("piped", 2)]
    assert not any("callback_url" in body for body in sent)


def test_image_is_read_from_a_file(ready: CommandLine, sandbox: Sandbox) -> None:
    from PIL import Image

    Image.new("RGB", (320, 320)).save(ready.folder / "in.png")
    assert ready(*ASK, "--image", "in.png", "--image", "https://example.com/a.png").code == 0
    (create,) = sandbox.ledger().creates
    first, second = create.body["image_list"]
    assert len(first["image"]) > 100 and second == {"image": "https://example.com/a.png"}


@pytest.mark.parametrize("name", ["missing.png", "missing.txt", "pictures/missing"])
def test_an_image_that_looks_like_a_missing_file_is_named_so(ready: CommandLine, name: str) -> None:
    refused = ready(*ASK, "--image", name)
    assert (refused.code, f"{name}: no such file" in refused.err) == (2, True)


def test_an_unknown_model_passes_with_a_warning(ready: CommandLine) -> None:
    done = ready("submit", "--model-name", "kling-v9", "--prompt", "a boat")
    assert done.code == 0
    assert done.err.startswith("warning: ")
