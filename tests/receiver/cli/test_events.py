"""`receiver events` as a command, and the setting of the sinks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from receiver.base.config import Settings, SettingsInvalid, load
from receiver.base.signature import key_of
from receiver.base.sink_setting import Entry
from receiver.cli.main import app
from receiver.gateway.api_keys import fingerprint
from storage.database.sessions import Database
from storage.operations import outbox
from storage.operations.outbox import Subscription
from storage.rows import events
from storage.rows.events import EventName, record
from storage.states import DispatchState
from tests.forked import Forked
from tests.harness import wait_until
from tests.rows import new_task, stored
from tests.storage.operations.test_outbox import claim, queue, settle
from tests.webhook_receiver import SECRET

HOOK = Subscription("hooks.example.com", frozenset(map(str, EventName)))
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def database_kind() -> str:
    """The queries are tested on both databases in test_outbox."""
    return "sqlite"


@pytest.fixture
def environment(database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The environment of the command, in a folder without a `.env`."""
    values = {
        "RECEIVER_DATABASE_URL": database_url,
        "RECEIVER_S3_BUCKET": "pictures",
        "RECEIVER_EVENT_SINKS": "https://hooks.example.com/?token=hidden",
        "RECEIVER_EVENT_SECRETS": SECRET,
    }
    monkeypatch.chdir(tmp_path)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Runs `receiver events …` here. Returns the exit code and both outputs."""

    def command(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["events", *words], env={"COLUMNS": "200"})
        return done.exit_code, done.output

    return command


def three(database: Database) -> None:
    """Three dispatches of one task to one sink: delivered, dead, open."""
    with database.write() as session:
        task = new_task(session, external_task_id="the-task")
        for name in (EventName.TASK_SUBMITTED, EventName.TASK_FAILED):
            record(session, name, task.id)
    outbox.sequence_all(database, [HOOK])
    settle(database, claim(database, HOOK.sink))
    settle(database, claim(database, HOOK.sink), outbox.dead, "hooks.example.com answered 500")


def states(database: Database) -> list[DispatchState]:
    return [row.state for row in queue(database)]


def test_list_shows_what_is_open_and_what_is_dead(database: Database, run: Run) -> None:
    assert run("list") == (0, "nothing is open and nothing is dead\n")
    three(database)
    code, said = run("list")
    assert code == 1
    shown = ("hooks.example.com answered 500", "the-task", "task.submitted", "task.failed")
    assert [word for word in shown if word not in said] == []
    assert "hidden" not in said
    assert run("list", "--open")[0] == 0


def test_event_list_prints_json(database: Database, run: Run) -> None:
    three(database)
    found = json.loads(run("list", "--json")[1])
    assert [(each["id"], each["state"], each["event"]) for each in found["deliveries"]] == [
        (2, "dead", "task.submitted"),
        (3, "due", "task.failed"),
    ]
    assert (found["disabled"], found["unknown"]) == ({}, [])


def test_list_names_sinks_that_are_not_configured(
    database: Database, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(database)
    monkeypatch.setenv("RECEIVER_EVENT_SINKS", "")
    assert json.loads(run("list", "--json")[1])["unknown"] == ["hooks.example.com"]
    assert run("disable", "hooks.example.com") == (0, "disabled: 1, given up: 1\n")
    assert "given up" not in run("list", "--open")[1]


def test_redeliver_sends_dead_ones_again(database: Database, run: Run) -> None:
    three(database)
    before = states(database)
    assert run("redeliver", "--all-dead", "--dry-run") == (0, "dry run, nothing was changed: redelivered: 1\n")
    assert states(database) == before
    said = run("redeliver", "--all-dead", "--sink", "another")[1]
    assert said.startswith("redelivered: 0\n") and "known sinks: client, hooks.example.com" in said
    assert run("redeliver", "--all-dead") == (0, "redelivered: 1\n")
    assert states(database) == [DispatchState.DELIVERED, DispatchState.DUE, DispatchState.DUE]
    assert "nothing was given up; give the numbers" in run("redeliver", "--all-dead")[1]


def test_redeliver_takes_numbers(database: Database, run: Run) -> None:
    three(database)
    code, said = run("redeliver", "1", "77")
    assert (code, said.splitlines()) == (1, ["redelivered: 1", "77: no such delivery"])
    assert stored(database, queue(database)[0])["state"] is DispatchState.DUE


@pytest.mark.parametrize("words", [[], ["1", "--all-dead"], ["1", "--sink", "x"]], ids=["nothing", "both", "sink"])
def test_redeliver_without_a_selection_is_refused(run: Run, words: list[str]) -> None:
    assert run("redeliver", *words)[0] == 2


def test_a_sink_is_disabled_and_enabled(database: Database, run: Run) -> None:
    three(database)
    assert run("disable", HOOK.sink, "--reason", "moving") == (0, "disabled: 1, given up: 1\n")
    assert json.loads(run("list", "--json")[1])["disabled"] == {HOOK.sink: "moving"}
    assert run("enable", HOOK.sink) == (0, "enabled: 1\n")
    assert run("enable", HOOK.sink)[0] == 1


def test_events_of_a_disabled_sink_are_not_said_to_be_sent_again(database: Database, run: Run) -> None:
    three(database)
    run("disable", HOOK.sink, "--reason", "moving")
    for words in (("--all-dead",), ("2",), ("--all-dead", "--sink", HOOK.sink)):
        code, said = run("redeliver", *words)
        assert (code, said.startswith("redelivered: 0\n"), "`receiver events enable" in said) == (1, True, True)
    assert states(database) == [DispatchState.DELIVERED, DispatchState.DEAD, DispatchState.DEAD]
    run("enable", HOOK.sink)
    assert run("redeliver", "--all-dead") == (0, "redelivered: 2\n")


def test_events_of_the_time_in_which_a_sink_was_disabled_are_never_sent_and_its_help_says_so(
    database: Database, run: Run
) -> None:
    three(database)
    run("disable", HOOK.sink)
    with database.write() as session:
        record(session, EventName.TASK_FAILED, None)
    outbox.sequence_all(database, [HOOK])
    run("enable", HOOK.sink)
    assert run("redeliver", "--all-dead") == (0, "redelivered: 2\n")
    assert "Those since it was disabled are never sent" in run("enable", "--help")[1]
    assert "task.failed" in run("tail", "--after", "3")[1]


def test_redeliver_names_a_sink_that_is_not_configured(
    database: Database, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(database)
    monkeypatch.setenv("RECEIVER_EVENT_SINKS", "")
    assert "`receiver events disable hooks.example.com` gives it up" in run("redeliver", "--all-dead")[1]


def test_unknown_sink_is_not_disabled(database: Database, run: Run) -> None:
    code, said = run("disable", "hooks.exmaple.com")
    assert (code, "known sinks: client, hooks.example.com" in said) == (2, True)
    with database.read() as session:
        assert outbox.disabled(session) == {}


def test_tail_prints_the_last_ones(database: Database, run: Run) -> None:
    three(database)
    lines = run("tail")[1].splitlines()
    assert [line.split("  ")[2:] for line in lines] == [
        ["task.created", "the-task"],
        ["task.submitted", "the-task"],
        ["task.failed", "the-task"],
    ]
    with database.write() as session:
        events.skip_numbers(session)
        record(session, EventName.TASK_CREATED, None)
    outbox.sequence_all(database, [])
    assert len(run("tail")[1].splitlines()) == 4, "a number that was skipped is no event"
    code, said = run("tail", "--after", "1", "--types", "task.f*", "--json")
    assert (code, json.loads(said)["type"]) == (0, "task.failed")
    assert run("tail", "--types", "nothing.*")[0] == 2


def test_tail_follows_new_events(database: Database, environment: dict[str, str], tmp_path: Path) -> None:
    three(database)
    out = tmp_path / "out"
    out.touch()

    def told(count: int) -> str:
        lines = wait_until(lambda: (found := out.read_text().splitlines(True))[count - 1 :] and found, seconds=60)
        return str(json.loads(lines[count - 1])["type"])

    words = ("events", "tail", "--follow", "--after", "2", "--json")
    process = Forked(words, os.environ, tmp_path, out=out, err=tmp_path / "err")
    try:
        assert told(1) == "task.failed"
        with database.write() as session:
            record(session, EventName.CALLBACK_UNMATCHED, None)
        outbox.sequence_all(database, [])
        assert told(2) == "callback.unmatched"
    finally:
        process.kill()
        process.wait()


def test_each_api_key_has_a_secret_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("client-secret")[0] == 1
    monkeypatch.setenv("RECEIVER_API_KEYS", "one-key,another-key")
    code, output = run("client-secret", "--json")
    first, second = json.loads(output)
    assert (code, first["client"]) == (0, fingerprint("one-key"))
    made = {*first["secrets"], *second["secrets"]}
    assert len(made - {SECRET}) == 2
    assert all(len(key_of(SecretStr(secret))) == 32 for secret in made)
    assert "one-key" not in output + run("client-secret")[1]


def test_secrets_of_clients_need_no_database(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"API_KEYS": "one-key", "DATABASE_URL": f"sqlite:///{tmp_path}/none.db"}.items():
        monkeypatch.setenv(f"RECEIVER_{name}", value)
    code, output = run("client-secret")
    assert (code, "whsec_" in output, (tmp_path / "none.db").exists()) == (0, True, False), output


# -- the setting ------------------------------------------------------------------------------------------------------


def settings(sinks: str, **changes: str) -> Settings:
    values = {"event_secrets": SECRET, "private_event_hosts": "localhost:8080,127.0.0.1:9324", **changes}
    return load(s3_bucket="pictures", event_sinks=sinks, **values)


def entries(sinks: str) -> list[Entry]:
    return settings(sinks).event_entries


def test_sinks_have_distinct_names() -> None:
    found = entries(
        "https://hooks.example.com/a?x=y=z  archive=https://hooks.example.com/b#task.archived,asset.*\n"
        "http://localhost:8080/ sqs+https://sqs.eu-central-1.amazonaws.com/123456789012/pictures"
        " queue=sqs+http://127.0.0.1:9324/1/q file:///var/log/events.jsonl stdout:#task.failed"
    )
    assert [(entry.name, entry.kind) for entry in found] == [
        ("hooks.example.com", "webhook"),
        ("archive", "webhook"),
        ("localhost", "webhook"),
        ("pictures", "sqs"),
        ("queue", "sqs"),
        ("events", "file"),
        ("stdout", "stdout"),
    ]
    assert found[0].url == "https://hooks.example.com/a?x=y=z"
    assert found[1].names == {"task.archived", "asset.archived", "asset.failed"}
    assert found[3].url == "https://sqs.eu-central-1.amazonaws.com/123456789012/pictures"
    assert found[5].path == Path("/var/log/events.jsonl")


FAULTS = {
    "hooks.example.com": "write [name=]URL[#filters]",
    "ftp://hooks.example.com/": "write [name=]URL[#filters]",
    "http://hooks.example.com/": "hooks.example.com is not https and not on RECEIVER_PRIVATE_EVENT_HOSTS",
    "https://hooks.example.com:8443/": "port 8443 is not 443 and not on RECEIVER_PRIVATE_EVENT_HOSTS",
    "https://10.0.0.1/": "10.0.0.1 may not be dialled: private use",
    "https://user:hidden@hooks.example.com/": "URL holds user information",
    "https://hooks.example.com/#task.done": "no event is called 'task.done'",
    "sqs+https://sqs.eu-central-1.amazonaws.com/": "write sqs+ and the queue's URL",
    "sqs+http://sqs.example.com/1/q": "is not https",
    "file://relative/path": "write file:///FOLDER/FILE",
    "file:///folder/": "write file:///FOLDER/FILE",
    "a=stdout: a=https://hooks.example.com/": "2 sinks are called a",
    "client=stdout:": "choose another name",
}


@pytest.mark.parametrize(("text", "words"), FAULTS.items(), ids=[f"fault{number}" for number in range(len(FAULTS))])
def test_a_wrong_entry_stops_the_start(text: str, words: str) -> None:
    with pytest.raises(SettingsInvalid) as fault:
        settings(text.replace("/#", "/?token=hidden#"))
    [line] = str(fault.value).splitlines()
    assert line.startswith("RECEIVER_EVENT_SINKS: ")
    assert words in line
    assert "hidden" not in line


def test_every_fault_of_the_sinks_is_listed() -> None:
    with pytest.raises(SettingsInvalid) as fault:
        settings("nonsense https://hooks.example.com/ ftp://x/", event_secrets="whsec_short")
    assert [line.partition(": ")[0] for line in str(fault.value).splitlines()] == [
        "RECEIVER_EVENT_SINKS",
        "RECEIVER_EVENT_SINKS",
        "RECEIVER_EVENT_SECRETS",
    ]


def test_an_unsigned_webhook_is_refused() -> None:
    with pytest.raises(SettingsInvalid, match="RECEIVER_EVENT_SECRETS: required with a webhook"):
        settings("https://hooks.example.com/", event_secrets="")
    assert settings("stdout:", event_secrets="").event_entries[0].name == "stdout"


def test_no_secret_is_shown() -> None:
    shown = repr(settings("https://hooks.example.com/?token=hidden")) + repr(
        entries("https://hooks.example.com/hidden")
    )
    assert "hidden" not in shown
    assert SECRET not in shown


def test_retry_schedule_is_a_setting() -> None:
    assert settings("stdout:", event_retry_seconds="1, 2.5").event_retry_seconds == (1, 2.5)
    assert sum(load(s3_bucket="b").event_retry_seconds) > 3 * 86_400
    with pytest.raises(SettingsInvalid, match="RECEIVER_EVENT_RETRY_SECONDS"):
        settings("stdout:", event_retry_seconds="0")
