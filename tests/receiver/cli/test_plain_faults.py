"""Faults in users' shells, files and databases: each is one line that names the place and the remedy."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlmodel import select

from receiver.sandbox import Sandbox
from storage.database.sessions import Database
from storage.operations import heartbeats
from storage.rows import migrations
from storage.rows.models import Task
from storage.states import ArchiveState
from tests.command_line import CommandLine
from tests.forked import Forked
from tests.harness import ROOT, wait_until
from tests.pipeline import free_port
from tests.postgres import MigratedDatabases, Postgres
from tests.rows import new_asset

ASK = ("submit", "--model-name", "kling-image-o1", "--prompt", "a boat")


@pytest.fixture
def postgres_url(migrated_databases: MigratedDatabases) -> Iterator[str]:
    yield from migrated_databases.lend()


@pytest.fixture
def role(postgres: Postgres, postgres_url: str) -> Iterator[str]:
    """A role that may connect and nothing else."""
    database = Database(postgres.url())
    with database.write() as session:
        session.execute(text("CREATE ROLE weak LOGIN PASSWORD 'hunter2'"))
    yield "weak"
    with database.write() as session:
        session.execute(text("DROP ROLE weak"))
    database.close()


READING = [
    ("status",),
    ("status", "x"),
    ("audit",),
    ("retry", "x"),
    ("events", "list"),
    ("batch", "list"),
]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_reading_verbs_make_no_database_and_say_where_none_is(receiver: CommandLine, words: tuple[str, ...]) -> None:
    done = receiver(*words)
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert f"{receiver.folder / 'receiver.db'} holds no database" in done.err
    assert list(receiver.folder.iterdir()) == []


NEEDING_THE_SCHEMA = [("status",), ("migrate",), ("serve", "--port", "0"), ("work",), ("work", "--once"), ASK]


@pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"])
def test_a_database_of_a_newer_version_is_refused_in_one_line(ready: CommandLine, postgres_url: str,
                                                              database_kind: str) -> None:  # fmt: skip
    url = f"sqlite:///{ready.folder}/receiver.db" if database_kind == "sqlite" else postgres_url
    database = Database(url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    for words in NEEDING_THE_SCHEMA:
        done = ready(*words, RECEIVER_DATABASE_URL=url)
        said = [line for line in done.err.splitlines() if not re.search(r"settings\.", line)]
        fault = f"the database schema is 9999, this version needs {migrations.head()}"
        assert (done.code, said) == (1, [f"{fault}: run a receiver of the version that made it"]), words


@pytest.mark.parametrize("name", ["RECEIVER_PORT", "RECEIVER_S3_PREFIX", "RECEIVER_WORKERS", "RECEIVER_LOG_LEVEL"])
def test_empty_variable_counts_as_unset(ready: CommandLine, name: str) -> None:
    assert ready("status", **{name: ""}).code == 0
    (ready.folder / ".env").write_text(f"{name}=\n")
    assert ready("status", **{name: None}).code == 0


@pytest.mark.parametrize(
    "verb", [("work", "--once"), ("check",), ("serve", "--host", "203.0.113.1")], ids=lambda verb: verb[0]
)
def test_a_misspelt_setting_is_named_with_the_nearest(ready: CommandLine, verb: tuple[str, ...]) -> None:
    """`serve` ends at an address that no interface has."""
    done = ready(*verb, RECEIVER_WORKER="3")
    assert re.search(r"RECEIVER_WORKER\b", done.out + done.err)
    assert "RECEIVER_WORKERS" in done.out + done.err


def test_a_worker_without_credentials_says_so(ready: CommandLine) -> None:
    assert "settings.credentials_not_set" not in ready("work", "--once").err
    done = ready("work", "--once", RECEIVER_KLING_API_KEY=None)
    assert "settings.credentials_not_set" in done.err and "RECEIVER_KLING_API_KEY" in done.err


def test_an_env_file_of_powershell_is_named(ready: CommandLine) -> None:
    (ready.folder / ".env").write_bytes("RECEIVER_PORT=1\n".encode("utf-16"))
    done = ready("status")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"{ready.folder}/.env:1: is UTF-16") and "save it as UTF-8" in done.err
    assert f"{ready.folder}/.env:1: is UTF-16" in ready("check").out


def test_fault_of_an_env_file_names_the_line_that_is_not_text(ready: CommandLine) -> None:
    (ready.folder / ".env").write_bytes(b"RECEIVER_PORT=1\nX=\xff\n")
    assert ready("status").err == f"{ready.folder}/.env:2: is not UTF-8 text; save the file as UTF-8\n"


@pytest.mark.parametrize(
    "line", ['RECEIVER_PUBLIC_URL="https://example.com', "RECEIVER_PUBLIC_URL: https://example.com"]
)
def test_a_setting_in_the_env_file_that_cannot_be_read_is_named(ready: CommandLine, line: str) -> None:
    (ready.folder / ".env").write_text(f"no line of ours\n{line}\nRECEIVER_LOG_LEVEL=info\n")
    done = ready("status")
    assert done.code == 1 and done.err.startswith(f"{ready.folder}/.env:2: cannot be read; write NAME=VALUE")


def test_an_env_file_with_a_byte_order_mark_is_read(ready: CommandLine) -> None:
    (ready.folder / ".env").write_bytes(b"\xef\xbb\xbfRECEIVER_LOG_LEVEL=nonsense\n")
    assert ready("status").err.startswith("RECEIVER_LOG_LEVEL: ")


FULL = [("status", "--json"), ("check", "--json"), ("batch", "list", "--json"), ("events", "list", "--json"),
        ("status",), ("check",)]  # fmt: skip


@pytest.mark.parametrize("words", FULL, ids=" ".join)
def test_a_full_disk_behind_the_output_is_reported_in_one_line(ready: CommandLine, words: tuple[str, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    variables, err = {**environment, **ready.variables}, ready.folder / "err"
    code = Forked(words, variables, ready.folder, out=Path("/dev/full"), err=err).wait(60)
    assert (code, err.read_text()) == (1, "standard output cannot be written: No space left on device\n")


def test_submit_whose_output_cannot_be_written_names_the_task_that_was_paid(
    ready: CommandLine, sandbox: Sandbox
) -> None:
    request = ("submit", "--model-name", "kling-image-o1", "--prompt", "a boat")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    variables, err = {**environment, **ready.variables}, ready.folder / "err"
    assert Forked(request, variables, ready.folder, out=Path("/dev/full"), err=err).wait(60) == 1
    name = sandbox.ledger().tasks[0].external_task_id
    assert f"the task is {name}; the same command with `--external-task-id {name}` sends" in err.read_text()
    ready(*request, "--external-task-id", name)
    assert len(sandbox.ledger().tasks) == 1


def test_submit_with_an_id_that_a_script_left_empty_sends_nothing(ready: CommandLine, sandbox: Sandbox) -> None:
    done = ready(*ASK, "--external-task-id", "")
    assert (done.code, done.out) == (1, "") and "external_task_id is empty" in done.err
    assert not sandbox.ledger().tasks


@pytest.mark.parametrize("number", [42, 0])
def test_an_id_that_is_a_number_is_one_line(ready: CommandLine, sandbox: Sandbox, number: int) -> None:
    asked = f'{{"model_name": "kling-image-o1", "prompt": "a boat", "external_task_id": {number}}}'
    done = ready("submit", "--request", "-", given=asked)
    assert (done.code, done.err.splitlines()[-1:]) == (1, ["external_task_id: must be text"])
    assert not sandbox.ledger().tasks


def test_submit_whose_remarks_cannot_be_written_prints_the_id(ready: CommandLine) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    variables, out = {**environment, **ready.variables, "RECEIVER_KLING_BASE_URL": "http://127.0.0.1:9"}, "out"
    Forked(ASK, variables, ready.folder, out=ready.folder / out, err=Path("/dev/full")).wait(60)
    assert ready("status", (ready.folder / out).read_text().strip()).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_create_names_the_task(
    ready: CommandLine, sandbox: Sandbox, tmp_path: Path, number: signal.Signals
) -> None:
    sandbox.set(create_faults=["hang:created"], hang_seconds=30)
    err = tmp_path / "err"
    process = Forked(ASK, {**os.environ, **ready.variables}, ready.folder, out=tmp_path / "out", err=err)
    try:
        wait_until(lambda: len(sandbox.ledger().tasks) == 1, seconds=25)
        process.send_signal(number)
        assert process.wait(20) != 0
    finally:
        process.kill()
    name = sandbox.ledger().tasks[0].external_task_id
    assert f"the task is {name}; the same command with `--external-task-id {name}` sends" in err.read_text()
    assert ready(*ASK, "--external-task-id", name).out == f"{name}\n" and len(sandbox.ledger().tasks) == 1


def test_a_current_folder_that_was_removed_is_one_line(ready: CommandLine) -> None:
    shell = ("sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh")
    words = (*shell, sys.executable, "-m", "receiver", "status")
    environment = {**os.environ, **ready.variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd=ready.folder, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "the current folder was removed; change to one that exists, by `cd`\n",
    )


def test_a_command_runs_with_its_standard_streams_closed(ready: CommandLine) -> None:
    shell = ("sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh")
    words = (*shell, sys.executable, "-m", "receiver", "batch", "list", "--json")
    assert subprocess.run(words, env={**os.environ, **ready.variables}, cwd=ready.folder, timeout=60).returncode == 0


def test_faults_of_single_settings_and_of_several_together_are_listed_at_once(receiver: CommandLine) -> None:
    wrong = {"RECEIVER_PORT": "80O0", "RECEIVER_KLING_API_KEY": "Bearer x", "RECEIVER_PUBLIC_URL": "http://a.example"}
    done = receiver("status", **wrong, RECEIVER_CALLBACK_SECRETS="short", RECEIVER_S3_BUCKET=None)
    names = [re.split("[: ]", line.removeprefix("RECEIVER_"))[0] for line in done.err.splitlines()]
    assert names == ["PORT", "S3_BUCKET", "CALLBACK_SECRETS", "KLING_API_KEY", "PUBLIC_URL"]


def test_a_misspelt_setting_is_named_beside_the_one_that_is_missing(receiver: CommandLine) -> None:
    (receiver.folder / ".env").write_text("RECEIVER_S3_BUCKT=pictures\n")
    done = receiver("audit", RECEIVER_S3_BUCKET=None)
    assert done.err.splitlines()[1:] == [
        "RECEIVER_S3_BUCKT: no setting has this name; did you mean RECEIVER_S3_BUCKET?"
    ]


def test_a_store_in_this_folder_is_named_where_no_bucket_is_set(receiver: CommandLine) -> None:
    (receiver.folder / "my pictures").mkdir()
    (receiver.folder / "my pictures" / "store.json").write_text("{}")
    done = receiver("audit", RECEIVER_S3_BUCKET=None, RECEIVER_S3_ENDPOINT_URL=None)
    assert "set RECEIVER_STORE='my pictures', which is a store in this folder" in done.err


def test_submit_and_a_batch_say_that_nothing_is_sent_for_lack_of_room(ready: CommandLine, sandbox: Sandbox) -> None:
    full = replace(ready, constants={"storage.database.free_space:MIN_FREE_SHARE": 2.0})
    (ready.folder / "night.jsonl").write_text('{"model_name": "kling-image-o1", "prompt": "a boat"}\n')
    for words in (ASK, ("submit", "--batch", "night.jsonl")):
        done = full(*words)
        assert (done.code, "deliveries need 200 %, so nothing is sent until there is room" in done.err) == (0, True)
    assert not sandbox.ledger().creates


WITHOUT_BUCKET = [
    *(("migrate",), ("status",), ("retry", "--all-failed"), ("replay", "--since", "1d"), ("reconcile",)),
    *(("adopt", "--listed-days", "1"), ("dismiss", "--delivery", "1", "--reason", "x"), ("prune", "--older-than", "9")),
    *(("batch", "list"), ("batch", "status", "b"), ("batch", "export", "b")),
    *(("events", "list"), ("events", "tail"), ("events", "redeliver", "--all-dead"), ("events", "enable", "x")),
    *(("events", "disable", "clients"), ("events", "client-secret")),
]


def test_commands_that_use_no_object_need_no_bucket(ready: CommandLine) -> None:
    for words in WITHOUT_BUCKET:
        done = ready(*words, RECEIVER_S3_BUCKET=None, RECEIVER_S3_ENDPOINT_URL=None)
        assert ("S3_BUCKET" in done.err, "Traceback" in done.err) == (False, False), (words, done)


@pytest.mark.parametrize("words", [("status", "x"), ("status", "--json"), ("events", "tail", "--json"), ASK])
def test_commands_that_name_objects_or_pay_for_them_need_a_bucket(ready: CommandLine, words: tuple[str, ...]) -> None:
    done = ready(*words, RECEIVER_S3_BUCKET=None, RECEIVER_S3_ENDPOINT_URL=None)
    assert (done.code, done.err.startswith("RECEIVER_S3_BUCKET: required")) == (1, True), done


def test_a_missing_folder_of_the_database_is_named(receiver: CommandLine) -> None:
    done = receiver(*ASK, RECEIVER_DATABASE_URL="sqlite:///missing/receiver.db")
    assert done.err.endswith(f"unable to open database file; make the folder {receiver.folder / 'missing'}\n"), done


def test_a_path_that_is_too_long_for_sqlite_is_named_as_such(receiver: CommandLine) -> None:
    """It was said that the user may not write in the folder."""
    said = "; SQLite takes paths of at most 504 bytes, and names of 247\n"
    folder = receiver.folder
    while len(str(folder)) < 500:
        folder /= "f" * 60
    folder.mkdir(parents=True)
    for path in (folder / "receiver.db", receiver.folder / f"{'n' * 245}.db"):
        assert receiver("migrate", RECEIVER_DATABASE_URL=f"sqlite:///{path}").err.endswith(said)


def test_a_submit_without_credentials_sends_nothing_and_pauses_nothing(ready: CommandLine) -> None:
    done = ready(*ASK, RECEIVER_KLING_API_KEY=None)
    assert (done.code, "set RECEIVER_KLING_API_KEY" in done.err) == (1, True), done
    status = ready("status", "--json").json
    assert (status["tasks"], status["summary"]["accounts"]["kling"]["pauses"]) == ([], [])


def test_csv_in_utf_16_of_excel_names_the_format_to_save(ready: CommandLine) -> None:
    (ready.folder / "mein excel.csv").write_bytes("model_name;prompt\r\nkling-image-o1;Düne\r\n".encode("cp1252"))
    done = ready("submit", "--batch", "mein excel.csv")
    assert 'mein excel.csv:2: is not UTF-8 (byte 17); save the file as UTF-8 ("CSV UTF-8")' in done.out + done.err


def test_a_batch_name_with_a_space_can_be_pasted(ready: CommandLine) -> None:
    (ready.folder / "mein excel.csv").write_bytes("\ufeffmodel_name;prompt\r\nkling-image-o1;Düne\r\n".encode())
    assert "`receiver batch status --wait 'mein excel'`" in ready("submit", "--batch", "mein excel.csv").out


def test_retry_as_without_failures_names_no_missing_batch(ready: CommandLine) -> None:
    (ready.folder / "good.csv").write_text("model_name,prompt\nkling-image-o1,a boat\n")
    assert ready("submit", "--batch", "good.csv").code == 0
    done = ready("batch", "retry", "good", "--as", "again")
    assert (done.code, done.out) == (0, "nothing to do\n")
    assert done.err == "nothing of good failed at the provider; `receiver batch status good` shows how it stands\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "file", "--all"), "file cannot be written: Not a directory; repeat the command then"),
        (("audit", "--resume", "missing/log"), "missing/log cannot be written: No such file or directory"),
        (("batch", "export", "good", "--output", "file/x.csv"), "file/x.csv cannot be written: Not a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_in_one_line(
    words: tuple[str, ...], said: str, ready: CommandLine
) -> None:
    (ready.folder / "file").touch()
    (ready.folder / "good.csv").write_text("model_name,prompt\nkling-image-o1,a boat\n")
    ready("submit", "--batch", "good.csv")
    done = ready(*words)
    assert (done.code, done.err.count("\n"), done.err.startswith(said)) == (1, 1, True), done.err


@pytest.mark.parametrize(
    "words",
    [
        ("events", "redeliver", str(2**63)),
        ("events", "tail", "--after", str(2**63)),
        ("replay", str(2**63)),
        ("replay", "--since", "999999d"),
        ("dismiss", "--reason", "x", "--delivery", str(2**63)),
        ("prune", "--older-than", "999999"),
        ("adopt", "--listed-days", "999999"),
        ("retry", "--all-failed", "--since", "0001-01-01T00:00+14:00"),
        ("submit", "--request", "deep.json"),
    ],
)
def test_a_number_without_end_is_wrong_usage(words: tuple[str, ...], ready: CommandLine) -> None:
    (ready.folder / "deep.json").write_text("[" * 100_000)
    done = ready(*words)
    assert (done.code, "Traceback" in done.err, "Invalid value" in done.err) == (2, False, True), done.err


def test_a_request_from_standard_input_may_have_a_byte_order_mark(ready: CommandLine) -> None:
    done = ready("submit", "--request", "-", given='\ufeff{"model_name": "kling-image-o1", "prompt": "a boat"}')
    assert "is not JSON" not in done.err and done.code == 0, done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_names_the_task(ready: CommandLine, tmp_path: Path, number: signal.Signals) -> None:
    said = ended_while_waiting(ready, tmp_path, number, *ASK, "--external-task-id", "a b")
    assert said.endswith("stopped waiting; the workers go on; `receiver status 'a b'` shows the task\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_names_the_batch(ready: CommandLine, tmp_path: Path, number: signal.Signals) -> None:
    """Its lines are inserted, and a worker that starts later sends them."""
    lines = tmp_path / "night.jsonl"
    lines.write_text('{"model_name": "kling-image-o1", "prompt": "a boat"}\n')
    said = ended_while_waiting(ready, tmp_path, number, "submit", "--batch", str(lines))
    assert "stopped watching; the workers go on; `receiver batch status --wait night`" in said


def ended_while_waiting(ready: CommandLine, folder: Path, number: signal.Signals, *words: str) -> str:
    err = folder / "err"
    process = Forked((*words, "--wait"), {**os.environ, **ready.variables}, ready.folder, out=folder / "out", err=err)
    try:
        wait_until(lambda: err.exists() and "waiting 30 s" in err.read_text(), seconds=25)
        process.send_signal(number)
        assert process.wait(20) == 1
    finally:
        process.kill()
    return err.read_text()


def test_submit_that_is_killed_while_waiting_has_printed_the_id(ready: CommandLine, tmp_path: Path) -> None:
    out, words = tmp_path / "out", (*ASK, "--external-task-id", "a b", "--wait")
    process = Forked(words, {**os.environ, **ready.variables}, ready.folder, out=out, err=tmp_path / "err")
    try:
        wait_until(lambda: out.exists() and out.read_text() == "a b\n", seconds=25)
    finally:
        process.kill()


def test_submit_with_wait_prints_the_id_once(ready: CommandLine) -> None:
    words = (*ASK, "--external-task-id", "a b")
    assert ready(*words).code == 0 and ready("dismiss", "a b", "--reason", "none").code == 0
    database = Database(f"sqlite:///{ready.folder}/receiver.db")
    heartbeats.register(database, 1)
    database.close()
    assert ready(*words, "--wait").out == "a b\n"


@pytest.mark.parametrize("waits_for", ["a file", "a read"])
def test_submit_with_wait_says_what_it_waits_for(waits_for: str, ready: CommandLine, tmp_path: Path) -> None:
    words, why = (*ASK, "--external-task-id", "a b"), "the store at 127.0.0.1:9 does not answer"
    assert ready(*words).code == 0
    database = Database(f"sqlite:///{ready.folder}/receiver.db")
    heartbeats.register(database, 1)
    with database.write() as session:
        task = session.exec(select(Task)).one()
        if waits_for == "a file":
            task.archive = ArchiveState.ARCHIVING
            new_asset(session, task, 0, error=why)
        else:
            task.attempts, task.note = 1, why
    database.close()
    err, at_once = tmp_path / "err", {"receiver.cli.show:WAITS_SECONDS": 0.0}
    err.touch()
    process = Forked((*words, "--wait"), {**os.environ, **ready.variables}, ready.folder, out=err, constants=at_once)
    try:
        wait_until(lambda: f"still waiting, and tried again: {why}\n" in err.read_text(), seconds=25)
    finally:
        process.kill()


def test_a_key_with_a_line_end_works(ready: CommandLine) -> None:
    key = ready.variables["RECEIVER_KLING_API_KEY"]
    assert ready(*ASK, RECEIVER_KLING_API_KEY=f"{key}\n").code == 0


@pytest.mark.parametrize("name", ["RECEIVER_KLING_API_KEY", "RECEIVER_KLING_SECRET_KEY"])
def test_a_key_with_bearer_before_it_names_its_variable(ready: CommandLine, name: str) -> None:
    done = ready(
        "status", **{"RECEIVER_KLING_ACCESS_KEY": "a", "RECEIVER_KLING_SECRET_KEY": "s", name: "Bearer hunter2"}
    )
    assert (done.code, done.err) == (1, f'{name}: write the key alone, without "Bearer" before it\n')


@pytest.mark.parametrize("end", ["{}\n", "{}\r\n", " {} "])
def test_line_end_and_blanks_around_a_database_url_are_removed(ready: CommandLine, end: str) -> None:
    assert ready("status", RECEIVER_DATABASE_URL=end.format("sqlite:///receiver.db")).code == 0


def test_a_value_in_quotes_is_reported_with_the_variable(ready: CommandLine) -> None:
    done = ready("status", RECEIVER_METRICS_TOKEN='"metrics-token-of-many-characters"')
    said = "is in quotes, which count as a part of it; remove them (`docker run --env-file` keeps them)"
    assert (done.code, done.err) == (1, f"RECEIVER_METRICS_TOKEN: {said}\n")


@pytest.mark.parametrize(
    ("verb", "option", "said"),
    [
        ("status", "ssl=true", "sslmode=require"),
        ("migrate", "pgbouncer=true", "leave it out"),
        ("serve", "schema=public", "search_path"),
    ],
)
def test_an_option_that_libpq_does_not_know_is_reported_in_one_line(
    receiver: CommandLine, verb: str, option: str, said: str
) -> None:
    done = receiver(verb, RECEIVER_DATABASE_URL=f"postgresql://u:hunter2@127.0.0.1:1/x?{option}")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert done.err.startswith("RECEIVER_DATABASE_URL: ") and said in done.err and "hunter2" not in done.err


@pytest.mark.parametrize("words", [("status",), ("migrate",), ("serve",), ("work",), ASK], ids=lambda words: words[0])
def test_a_file_that_is_not_a_database_is_reported_in_one_line(receiver: CommandLine, words: tuple[str, ...]) -> None:
    path = receiver.folder / "receiver.db"
    for content in (b"a picture, and no database" * 100, b"x"):
        path.write_bytes(content)
        done = receiver(*words)
        assert (done.code, done.err) == (1, f"RECEIVER_DATABASE_URL: {path}: file is not a database\n")
        assert path.read_bytes() == content


@pytest.mark.parametrize("words", [("migrate",), ("serve",), ASK], ids=lambda words: words[0])
def test_a_file_that_cannot_be_opened_is_named(receiver: CommandLine, words: tuple[str, ...]) -> None:
    done = receiver(*words, RECEIVER_DATABASE_URL="sqlite:///none/receiver.db")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert done.err.startswith(f"RECEIVER_DATABASE_URL: {receiver.folder / 'none' / 'receiver.db'}: ")


@pytest.mark.parametrize("words", [("status",), ("serve",), ("work",)], ids=" ".join)
def test_a_server_without_tls_is_reported_at_once(
    receiver: CommandLine, postgres: Postgres, postgres_url: str, words: tuple[str, ...]
) -> None:
    done = receiver(*words, RECEIVER_DATABASE_URL=f"{postgres_url}?sslmode=require")
    said = "server does not support SSL, but SSL was required"
    assert (done.code, done.err) == (1, f"RECEIVER_DATABASE_URL: 127.0.0.1:{postgres.port}: {said}\n")


@pytest.mark.parametrize("words", [("migrate",), ASK], ids=lambda words: words[0])
def test_a_read_only_database_is_reported_in_one_line(
    receiver: CommandLine, postgres: Postgres, postgres_url: str, words: tuple[str, ...]
) -> None:
    name = postgres_url.rpartition("/")[2]
    if words == ("migrate",):
        name, postgres_url = "bare", postgres.create_database("bare")
    with postgres.read_only(name):
        done = receiver(*words, RECEIVER_DATABASE_URL=postgres_url)
    if name == "bare":
        postgres.drop_database(name)
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert f"127.0.0.1:{postgres.port}: cannot execute " in done.err and "read-only" in done.err


def of_wrong_names(postgres: Postgres) -> dict[str, str]:
    """URLs of a role and of a database that do not exist, and what the server says."""
    place = f"127.0.0.1:{postgres.port}"
    return {
        f"postgresql://nobody_here:hunter2@{place}/postgres": 'role "nobody_here" does not exist',
        f"postgresql://postgres:hunter2@{place}/nope": 'database "nope" does not exist',
    }


@pytest.mark.parametrize("words", [("status",), ("migrate",), ("serve",), ("work",)], ids=" ".join)
def test_a_wrong_role_or_database_name_is_reported_at_once(
    receiver: CommandLine, postgres: Postgres, words: tuple[str, ...]
) -> None:
    for url, said in of_wrong_names(postgres).items():
        began = time.monotonic()
        done = receiver(*words, RECEIVER_DATABASE_URL=url)
        assert (done.code, done.err) == (1, f"RECEIVER_DATABASE_URL: 127.0.0.1:{postgres.port}: {said}\n")
        assert time.monotonic() - began < 20


def test_check_names_a_wrong_role_or_database_name(receiver: CommandLine, postgres: Postgres) -> None:
    for url, said in of_wrong_names(postgres).items():
        done = receiver("check", RECEIVER_DATABASE_URL=url)
        assert f"127.0.0.1:{postgres.port} cannot be used ({said})" in done.out


@pytest.mark.parametrize(
    "words", [("status",), ("serve",), ("work",), ("events", "list"), ASK], ids=lambda words: words[0]
)
def test_a_role_without_rights_on_our_tables_is_reported_in_one_line(
    receiver: CommandLine, postgres_url: str, role: str, words: tuple[str, ...]
) -> None:
    done = receiver(*words, RECEIVER_DATABASE_URL=postgres_url.replace("postgres@", f"{role}:hunter2@"))
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "permission denied for table" in done.err and "hunter2" not in done.err
    assert "let its owner run GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE " in done.err and ' TO "weak"' in done.err


def test_a_role_without_create_on_the_schema_is_reported_in_one_line(
    receiver: CommandLine, postgres: Postgres, role: str
) -> None:
    url = postgres.create_database("bare")
    try:
        done = receiver("migrate", RECEIVER_DATABASE_URL=url.replace("postgres@", f"{role}:hunter2@"))
    finally:
        postgres.drop_database("bare")
    place = f"127.0.0.1:{postgres.port}"
    grant = 'to "weak"; let its owner run GRANT USAGE, CREATE ON SCHEMA public TO "weak"'
    assert (done.code, done.err) == (
        1,
        f"RECEIVER_DATABASE_URL: {place}: permission denied for schema public {grant}\n",
    )


def test_a_port_that_is_taken_and_an_unknown_host_are_reported_in_one_sentence(ready: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (("--port", port), ("--host", "nope.invalid"), ("--host", "203.0.113.1")):
            done = ready("serve", *words)
            assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
            assert done.err.startswith("cannot listen on ")


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@contextlib.contextmanager
def serving(receiver: CommandLine, *words: str, forks_supervisor: bool = True) -> Iterator[tuple[Forked, Path]]:
    """`receiver serve` in a process group of its own, listening."""
    log = receiver.folder / "serve.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    log.touch()
    variables = {**environment, **receiver.variables}
    words = ("serve", *words)
    process = Forked(words, variables, receiver.folder, out=log, leads=True, forks_supervisor=forks_supervisor)
    try:
        wait_until(lambda: "worker.started" in log.read_text() and "web.started" in log.read_text(), seconds=40)
        yield process, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_host_in_brackets_can_be_listened_on(ready: CommandLine) -> None:
    port = free_port()
    with serving(ready, "--host", "[::1]", "--port", str(port)):
        socket.create_connection(("::1", port), timeout=5).close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_is_not_logged_as_the_death_of_a_worker(
    ready: CommandLine, number: signal.Signals
) -> None:
    with serving(ready, "--port", str(free_port())) as (process, log):
        os.killpg(process.pid, number)
        assert process.wait(40) == 0
        assert "worker.died" not in log.read_text() and "worker.ended" not in log.read_text()


def test_ctrl_c_while_a_worker_of_serve_still_imports_prints_no_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-X", "importtime", "-m", "receiver", "work", "--supervised"]  # logs its imports
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    with log.open("wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stderr=err)
        try:
            wait_until(lambda: "typer." in log.read_text(), seconds=30)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 1  # no settings are set
        finally:
            process.kill()
    assert "RECEIVER_S3_BUCKET: required" in log.read_text() and "Traceback" not in log.read_text()


MIGRATING = [("work", "--once"), ("adopt", "--listed-days", "1"), ("rebuild",), ASK]


@pytest.mark.parametrize(("words", "migrates"), [*((each, True) for each in MIGRATING), (("work",), False)])
def test_verbs_that_the_pages_name_migrate_a_sqlite_file(
    receiver: CommandLine, words: tuple[str, ...], migrates: bool
) -> None:
    (receiver.folder / "receiver.db").touch()
    done = receiver(*words)
    assert ("run `receiver migrate`" in done.err, receiver("status").code) == (not migrates, int(not migrates))
