"""`receiver check`: each problem is one clear line with a remedy, and exit code 1."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from typer.testing import CliRunner

from receiver.app import check_secrecy, check_store, checks
from receiver.app.findings import Result, Status
from receiver.app.wiring import Parts
from receiver.base import config
from receiver.base.tokens import NO_TASK, Tokens
from receiver.cli.main import app
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.states import TaskState
from tests.command_line import CommandLine, variables
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.pipeline import CALLBACK_SECRET, settings_for
from tests.postgres import Postgres
from tests.rows import new_task
from tests.webhook_receiver import SECRET

ABILITIES = {f"bucket: {ability.replace('_', ' ')}" for ability in check_store.WITHOUT}
Look = Callable[..., dict[str, Result]]


@pytest.fixture
def settings(
    bucket: Bucket, sandbox: Sandbox, migrated_sqlite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., config.Settings]:
    """Valid settings on SQLite with the given changes."""
    monkeypatch.chdir(tmp_path)  # no .env of ours
    (tmp_path / "good.db").write_bytes(migrated_sqlite.read_bytes())

    def make(database_url: str = f"sqlite:///{tmp_path / 'good.db'}", **changes: Any) -> config.Settings:
        return settings_for(database_url, bucket, sandbox, **changes)

    return make


@pytest.fixture
def look_at_all(settings: Callable[..., config.Settings]) -> Look:
    """The results by name. Each name occurs once, because a problem has one line."""

    def run(*args: Any, bound_seconds: float = checks.BOUND_SECONDS, **changes: Any) -> dict[str, Result]:
        results = checks.run(settings(*args, **changes), bound_seconds=bound_seconds)
        assert len({result.name for result in results}) == len(results)
        return {result.name: result for result in results}

    return run


@pytest.fixture
def look(look_at_all: Look, monkeypatch: pytest.MonkeyPatch) -> Look:
    """The same with a store that is taken as good. Its check is 0.2 of the 0.25 s of CPU of all checks."""
    monkeypatch.setattr(check_store, "bucket", lambda parts: [Result("bucket", Status.OK, "not checked")])
    return look_at_all


@pytest.fixture
def receiver(migrated_sqlite: Path, bucket: Bucket, sandbox: Sandbox, tmp_path: Path) -> CommandLine:
    (tmp_path / "receiver.db").write_bytes(migrated_sqlite.read_bytes())
    return CommandLine(variables("sqlite:///receiver.db", bucket, sandbox), tmp_path)


def faults(found: dict[str, Result]) -> dict[str, str]:
    return {name: f"{one.line}: {one.advice}" for name, one in found.items() if one.status is Status.FAULT}


def test_valid_setup_has_no_fault(look_at_all: Look, database_url: str, bucket: Bucket) -> None:
    found = look_at_all(database_url)
    assert faults(found) == {}
    good = {name for name, result in found.items() if result.status is Status.OK}
    waking = set() if database_url.startswith("sqlite") else {"database: waking"}
    assert good == {"settings", "database", "callback secrets", "bucket", "provider", "clock", *ABILITIES, *waking}
    assert {name: found[name].status for name in ("workers", "callbacks")} == dict.fromkeys(
        ("workers", "callbacks"), Status.NOTE
    )
    assert list(bucket.list(bucket.prefix)) == []


def test_check_prints_a_table(receiver: CommandLine) -> None:
    done = receiver("check")
    assert (done.code, done.err) == (0, "")
    assert next(line for line in done.out.splitlines() if "bucket" in line.split()[:2]).endswith("by its SHA-256")
    assert not any(name in done.out for name in ABILITIES)


def test_check_prints_every_store_capability_with_verbose(receiver: CommandLine) -> None:
    done = receiver("check", "--verbose")
    assert (done.code, done.err) == (0, "")
    for name in ABILITIES:
        assert any(line.startswith("ok") and name in line for line in done.out.splitlines())


def test_check_prints_one_line_per_fault_and_no_secret(receiver: CommandLine, sandbox: Sandbox) -> None:
    wrong = {"AWS_SECRET_ACCESS_KEY": "not-the-secret-key", "RECEIVER_S3_PREFIX": "p"}
    done = receiver("check", **wrong, RECEIVER_CALLBACK_SECRETS=CALLBACK_SECRET)
    (fault,) = [line for line in done.out.splitlines() if line.startswith("fault")]
    assert (done.code, done.err) == (1, "")
    assert "says the secret key is wrong" in fault and fault.endswith("correct AWS_SECRET_ACCESS_KEY")
    assert not any(secret in done.out for secret in ("not-the-secret-key", CALLBACK_SECRET, sandbox.api_key))


def test_check_prints_json(receiver: CommandLine) -> None:
    done = receiver("check", "--json", RECEIVER_KLING_API_KEY="wrong")
    assert (done.code, done.json["ok"]) == (1, False)
    assert [one["name"] for one in done.json["checks"] if one["status"] == "fault"] == ["provider"]
    assert {tuple(one) for one in done.json["checks"]} == {("name", "status", "line", "advice", "paste", "detail")}


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("AWS_ACCESS_KEY_ID", "does not know the access key (bucket pictures, InvalidAccessKeyId, HTTP 403)"),
        ("AWS_SECRET_ACCESS_KEY", "says the secret key is wrong (bucket pictures, SignatureDoesNotMatch, HTTP 403)"),
    ],
)
def test_wrong_s3_key_is_a_fault_with_its_remedy(
    look_at_all: Look, monkeypatch: pytest.MonkeyPatch, variable: str, says: str
) -> None:
    monkeypatch.setenv(variable, "somebodyelse")
    found = faults(look_at_all())
    assert list(found) == ["bucket"]
    assert says in found["bucket"] and found["bucket"].endswith(f"correct {variable}")


def test_missing_s3_key_is_a_fault_with_its_remedy(look_at_all: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    says = "no credentials for the bucket: export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (.env does not count): "
    assert faults(look_at_all()) == {"bucket": says}


def test_missing_bucket_is_a_fault_with_its_remedy(look_at_all: Look) -> None:
    found = faults(look_at_all(s3_bucket="missing"))
    assert list(found) == ["bucket"]
    assert "has no such bucket (bucket missing, NoSuchBucket" in found["bucket"]
    assert found["bucket"].endswith("create it, or correct RECEIVER_S3_BUCKET")


def test_unreachable_store_is_a_fault_with_its_remedy(look_at_all: Look) -> None:
    found = faults(look_at_all(s3_endpoint_url="http://127.0.0.1:1"))
    assert list(found) == ["bucket"]
    assert "127.0.0.1:1 cannot be reached" in found["bucket"] and "RECEIVER_S3_ENDPOINT_URL" in found["bucket"]


def test_a_proxy_in_front_of_the_store_that_is_down_is_named(
    look_at_all: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    says = faults(look_at_all(s3_endpoint_url="https://store.example.com"))["bucket"]
    assert says.endswith("cannot be reached: correct that variable, or list the store's host in NO_PROXY")


def test_unreachable_store_of_boto3s_own_settings_is_named(look_at_all: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    says = faults(look_at_all(s3_endpoint_url=None))["bucket"]
    assert says.startswith("the store at 127.0.0.1:1 cannot be reached")
    assert "(AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's endpoint_url)" in says


def test_server_that_is_not_a_store_is_a_fault(look_at_all: Look, sandbox: Sandbox) -> None:
    assert list(faults(look_at_all(s3_endpoint_url=f"{sandbox.url}/"))) == ["bucket"]


def test_store_with_fewer_capabilities_is_described(look_at_all: Look, seaweed: Seaweed) -> None:
    def forgetful(request: Request, forward: Forward) -> Answer:
        return forward(request.without("if-none-match", "x-amz-checksum-sha256"))

    with FaultProxy(seaweed, forgetful) as proxy:
        found = look_at_all(s3_endpoint_url=proxy.endpoint_url)
    assert faults(found) == {}
    cannot = {name for name in ABILITIES if found[name].status is Status.NOTE}
    assert {"bucket: conditional put", "bucket: refuses wrong checksum"} <= cannot
    assert all(found[name].advice for name in cannot)


def test_unreachable_database_is_a_fault_with_its_remedy(look: Look) -> None:
    found = faults(look("postgresql://someone:hunter2@127.0.0.1:1/receiver"))
    assert list(found) == ["database"]
    assert "refused" in found["database"] and found["database"].endswith("correct RECEIVER_DATABASE_URL")
    assert "hunter2" not in found["database"] and "\n" not in found["database"]


def test_missing_database_is_a_fault_with_its_remedy(look: Look, postgres: Postgres) -> None:
    (says,) = faults(look(postgres.create_database("gone").replace("gone", "never"))).values()
    assert 'database "never" does not exist' in says


def test_missing_folder_of_the_database_is_a_fault(look: Look, tmp_path: Path) -> None:
    (says,) = faults(look(f"sqlite:///{tmp_path}/none/receiver.db")).values()
    assert "is not there" in says


def test_file_that_is_not_a_database_is_a_fault(look: Look, tmp_path: Path) -> None:
    for content in ("not a database, only words " * 100, "x"):
        (tmp_path / "text.db").write_text(content)
        (says,) = faults(look(f"sqlite:///{tmp_path}/text.db")).values()
        assert "file is not a database" in says


@pytest.mark.parametrize(
    ("revision", "advice"), [("0000", "run `receiver migrate`"), ("9999", "run a receiver of the version that made it")]
)
def test_schema_of_another_release_is_a_fault(look: Look, database: Database, revision: str, advice: str) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    found = faults(look(database.url.render_as_string(hide_password=False)))
    assert list(found) == ["database"]
    assert found["database"].startswith(f"the database schema is {revision}")
    assert found["database"].endswith(advice)


def test_empty_database_is_created_by_serve_or_a_fault(look: Look, empty_database_url: str, database_kind: str) -> None:
    """On SQLite `serve` creates the schema, on PostgreSQL an operator has to run `receiver migrate`."""
    postgresql = database_kind == "postgresql"
    found = look(empty_database_url)["database"]
    assert found.status is (Status.FAULT if postgresql else Status.NOTE)
    assert found.advice == ("run `receiver migrate`" if postgresql else "`receiver serve` makes it")


def test_check_creates_no_file(look: Look, tmp_path: Path) -> None:
    found = look(f"sqlite:///{tmp_path}/new.db", migrate_on_start=False)
    assert faults(found)["database"].endswith("does not exist yet: run `receiver migrate`")
    assert not (tmp_path / "new.db").exists()


def test_public_url_without_https_is_refused(receiver: CommandLine) -> None:
    done = receiver("check", RECEIVER_PUBLIC_URL="http://example.com", RECEIVER_CALLBACK_SECRETS=CALLBACK_SECRET)
    (line,) = [line for line in done.out.splitlines() if "settings" in line]
    assert (done.code, done.err) == (1, "")
    assert line.startswith("fault") and "RECEIVER_PUBLIC_URL: must be https" in line


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    for name in [f"RECEIVER_{name.upper()}" for name in config.Settings.model_fields]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_settings_faults_are_reported_in_one_line_each(nothing_set: pytest.MonkeyPatch) -> None:
    nothing_set.setenv("RECEIVER_PORT", "many")
    done = CliRunner().invoke(app, ["check"])
    lines = [line.split(maxsplit=2)[2] for line in done.output.splitlines() if line.startswith("fault")]
    assert done.exit_code == 1
    assert [line.split(":")[0] for line in lines] == ["RECEIVER_PORT", "RECEIVER_S3_BUCKET"]


def test_missing_callback_secret_is_printed_to_paste(nothing_set: pytest.MonkeyPatch) -> None:
    nothing_set.setenv("RECEIVER_S3_BUCKET", "pictures")
    nothing_set.setenv("RECEIVER_PUBLIC_URL", "https://example.com")
    first, second = (CliRunner().invoke(app, ["check"]) for _ in range(2))
    assert first.exit_code == second.exit_code == 1
    name, _, value = first.output.splitlines()[-1].partition("=")
    assert name == "RECEIVER_CALLBACK_SECRETS" and value not in second.output
    assert config.load(callback_secrets=value).callback_secrets == (SecretStr(value),)


def test_secret_to_paste_is_printed_without_a_public_url_too(look: Look) -> None:
    found = look(public_url=None, callback_secrets="")
    assert faults(found) == {}
    assert len(found["callback secrets: fresh"].paste) > 50
    assert "polled" in found["callbacks"].line


def test_account_url_is_printed_to_paste(look: Look) -> None:
    url = look(public_url="https://example.com/here")["callbacks"].paste
    before, _, token = url.rpartition("/")
    assert before == "https://example.com/here/callbacks/kling"
    assert Tokens([SecretStr(CALLBACK_SECRET)]).read("kling", token) == NO_TASK


def test_one_thing_is_counted_in_the_singular(look: Look, database: Database) -> None:
    with database.write() as session:
        new_task(session, callback_url="https://example.com/callbacks/kling/of-an-older-secret")
    found = look(database.url.render_as_string(hide_password=False))
    assert found["callback secrets"].line.startswith("1 of 1 unfinished task has a callback URL")
    assert found["slots"].line.endswith("0 pictures are in progress")


def test_unsigned_callbacks_are_a_note(look: Look) -> None:
    public = {"public_url": "https://example.com"}
    note = look(**public)["callbacks: unsigned"]
    assert note.status is Status.NOTE
    assert "RECEIVER_CONFIRM=always" in note.advice
    for safe in ({"confirm": "always"}, {"kling_webhook_secrets": SECRET}):
        assert "callbacks: unsigned" not in look(**public, **safe)


def test_unknown_variable_of_the_environment_is_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEIVER_S3_BUKET", "pictures")
    says = "nothing reads RECEIVER_S3_BUKET: RECEIVER_S3_BUCKET is the nearest there is"
    assert faults(look()) == {"settings": says}
    monkeypatch.delenv("RECEIVER_S3_BUKET")
    monkeypatch.setenv("RECEIVER_SERVICE_ADDRESS", "10.0.0.1")
    assert look()["settings"].status is Status.NOTE


def test_unknown_variable_of_the_env_file_is_named(look: Look, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RECEIVER_S3_BUKET=pictures\nOTHER=1\nRECEIVER_S3_BUCKET=pictures\n")
    found = look()
    assert (found["settings"].status, found["settings"].line) == (Status.FAULT, "nothing reads RECEIVER_S3_BUKET")


def test_lines_of_the_env_file_that_the_environment_overrides_are_named_without_values(
    look: Look, nothing_set: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = {"KLING_API_KEY": "of-the-file", "S3_BUCKET": "pictures", "API_KEYS": "a" * 24, "PORT": "1", "HOST": ""}
    (tmp_path / ".env").write_text("".join(f"RECEIVER_{name}={value}\n" for name, value in lines.items()))
    (tmp_path / "keys").write_text("b" * 24)
    environment = {"KLING_API_KEY": "of-the-shell", "S3_BUCKET": "pictures", "API_KEYS_FILE": "keys", "HOST": "h"}
    for name, value in environment.items():
        nothing_set.setenv(f"RECEIVER_{name}", value)
    found = look()["settings: .env"]
    assert (found.status, found.line.partition("wins: ")[2]) == (
        Status.NOTE,
        "RECEIVER_API_KEYS, RECEIVER_KLING_API_KEY",
    )
    assert "of-the-" not in f"{found}"


def test_variables_of_boto3_in_the_env_file_are_named(
    look: Look, nothing_set: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "settings: not exported" not in look()
    (tmp_path / ".env").write_text("AWS_ACCESS_KEY_ID=id\nAWS_PROFILE=kept\nSSL_CERT_FILE=ca.pem\nOTHER=1\n")
    nothing_set.setenv("AWS_PROFILE", "kept")
    found = look()["settings: not exported"]
    assert found.line.endswith("not .env: AWS_ACCESS_KEY_ID, SSL_CERT_FILE")


def test_the_file_of_a_secret_may_be_named_in_the_file(nothing_set: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 32 + "\n")
    lines = f"RECEIVER_S3_BUCKET=pictures\nRECEIVER_CALLBACK_SECRETS_FILE={tmp_path / 'secret'}\n"
    (tmp_path / ".env").write_text(lines)
    assert config.load().callback_secrets == (SecretStr("s" * 32),)
    assert config.unknown_variables() == []


def test_older_secret_that_unfinished_tasks_need_is_named_and_its_removal_a_fault(
    look: Look, database: Database
) -> None:
    old, new = (Tokens([SecretStr(secret)]) for secret in ("o" * 40, CALLBACK_SECRET))
    states = [(old, TaskState.CREATED), (old, TaskState.PROCESSING), (new, TaskState.SUBMITTED)]
    with database.write() as session:
        for tokens, state in [*states, (old, TaskState.SUCCEEDED)]:
            task_id = uuid.uuid4()
            url = f"https://example.com/callbacks/kling/{tokens.sign('kling', task_id)}"
            new_task(session, id=task_id, callback_url=url, state=state)
        new_task(session)
    url = database.url.render_as_string(hide_password=False)
    assert faults(look(url))["callback secrets"].startswith("2 of 3 unfinished tasks")
    both = look(url, callback_secrets=f"{CALLBACK_SECRET},{'o' * 40}")
    assert (faults(both), both["callback secrets"].status) == ({}, Status.NOTE)
    assert both["callback secrets"].line == "2 of 3 unfinished tasks need an older secret than the first one"


@pytest.mark.parametrize("credentials", [{"kling_api_key": "wrong"}, {"kling_access_key": "a", "kling_api_key": ""}])
def test_wrong_provider_credentials_are_a_fault(look: Look, credentials: dict[str, str]) -> None:
    found = faults(look(**credentials, kling_secret_key="s" * 40 if "kling_access_key" in credentials else None))
    assert list(found) == ["provider"]
    assert "HTTP 401" in found["provider"] and "set RECEIVER_KLING_API_KEY" in found["provider"]
    assert "wrong" not in found["provider"] and "s" * 40 not in found["provider"]


def test_missing_provider_credentials_are_a_fault(look: Look) -> None:
    assert faults(look(kling_api_key=""))["provider"].startswith("no provider credentials are set: set RECEIVER_KLING")


def test_invalid_webhook_secret_is_a_fault(look: Look) -> None:
    (says,) = faults(look(kling_webhook_secrets="whsec_!")).values()
    assert says.startswith("a webhook secret must be whsec_ followed by Base64")


@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [
        ("5001", Status.FAULT, "if it lasts, ask the provider"),
        ("1302", Status.NOTE, "again in a minute"),
        ("1101", Status.FAULT, "settle it in the provider's console"),
        ("1304", Status.FAULT, "allow this machine's address"),
    ],
)
def test_refusing_provider_is_a_fault_with_its_remedy(
    look: Look, sandbox: Sandbox, code: str, status: Status, advice: str
) -> None:
    sandbox.set(query_faults=[code, code])
    found = look()["provider"]
    assert found.status is status
    assert advice in found.advice


def test_gateway_without_a_list_is_checked_by_a_read(look: Look, sandbox: Sandbox) -> None:
    sandbox.set(query_faults=["1203"])
    assert look()["provider"].status is Status.OK


class Provider(ThreadingHTTPServer):
    """Answers every request with `body`, an hour late by its own clock."""

    skew_seconds = -3_600

    def __init__(self, status: int, body: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(time() + Provider.skew_seconds, usegmt=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Provider:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def test_server_that_is_not_a_provider_is_a_fault(look: Look) -> None:
    with Provider(200, b"<html>Welcome</html>") as page:
        found = look(kling_base_url=page.url)["provider"]
    assert found.status is Status.FAULT
    assert "did not answer in Kling's format (the answer is not JSON (HTTP 200))" in found.line
    assert "RECEIVER_KLING_BASE_URL" in found.advice
    assert " cannot be reached (no connection" in look(kling_base_url=page.url)["provider"].line


def test_clock_that_differs_from_the_providers_is_a_fault(look_at_all: Look) -> None:
    with Provider(200, b'{"code": 0, "data": []}') as provider:
        found = look_at_all(kling_base_url=provider.url)
    assert found["provider"].status is Status.OK
    (says,) = faults(found).values()
    assert "s ahead of the provider's: turn on time synchronisation" in says


def test_refusal_caused_by_the_clock_is_reported_as_one_fault(look: Look) -> None:
    with Provider(401, b'{"code": 1003, "message": "token not yet valid"}') as provider:
        found = look(kling_base_url=provider.url, kling_api_key="", kling_access_key="a", kling_secret_key="s" * 40)
    assert list(faults(found)) == ["clock"]
    assert found["provider"].status is Status.NOTE


def test_clock_that_differs_from_the_stores_is_a_fault(look_at_all: Look, seaweed: Seaweed) -> None:
    def late(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        return replace(answer, headers={**answer.headers, "date": formatdate(time() + 7_200, usegmt=True)})

    with FaultProxy(seaweed, late) as proxy:
        (says,) = faults(look_at_all(s3_endpoint_url=proxy.endpoint_url)).values()
    assert "s behind the bucket's: turn on time synchronisation" in says


# -- events and callbacks ---------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{name: address} of names that only this test's resolver knows."""
    known: dict[str, str] = {}
    real = socket.getaddrinfo

    def answer(host: Any, *rest: Any, **options: Any) -> Any:
        return real(known.get(host, host), *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return known


def test_valid_sinks_have_no_fault(look: Look, names: dict[str, str], queues: Any, tmp_path: Path) -> None:
    names["hooks.example.com"] = "93.184.215.14"
    url = queues.create_queue(QueueName="pictures")["QueueUrl"]
    listed = urlsplit(url).netloc
    sinks = f"https://hooks.example.com/x?key=hush queue=sqs+{url} file://{tmp_path}/events.jsonl stdout:"
    found = look(event_sinks=sinks, event_secrets=SECRET, private_event_hosts=listed)
    told = {name: one for name, one in found.items() if name.startswith("events to ")}
    assert {one.status for one in told.values()} == {Status.OK}
    assert told["events to hooks.example.com"].line == "hooks.example.com may be posted to"
    assert told.keys() == {f"events to {name}" for name in ("hooks.example.com", "queue", "events", "stdout")}
    assert not (tmp_path / "events.jsonl").exists()
    assert queues.receive_message(QueueUrl=url).get("Messages") is None


@pytest.mark.parametrize(
    ("address", "says"),
    [("10.0.0.7", "resolves to 10.0.0.7, which may not be dialled: private use"), ("nobody.invalid", "not resolved")],
)
def test_webhook_at_a_refused_address_is_a_fault(look: Look, names: dict[str, str], address: str, says: str) -> None:
    names["hooks.example.com"] = address
    found = faults(look(event_sinks="hook=https://hooks.example.com/?key=hush", event_secrets=SECRET))
    assert list(found) == ["events to hook"]
    assert says in found["events to hook"] and "RECEIVER_PRIVATE_EVENT_HOSTS" in found["events to hook"]
    assert "hush" not in found["events to hook"]


def test_missing_queue_is_a_fault(look: Look, queues: Any, sqs_server: str) -> None:
    sinks = f"queue=sqs+{sqs_server}/123456789012/nobody-made-it"
    found = faults(look(event_sinks=sinks, private_event_hosts=urlsplit(sqs_server).netloc))
    assert "NonExistentQueue" in found["events to queue"] and "RECEIVER_EVENT_SINKS" in found["events to queue"]


def test_queue_that_only_permits_sending_is_a_note(look: Look) -> None:
    body = b'{"__type": "com.amazonaws.sqs#AccessDeniedException", "message": "no"}'
    with Provider(403, body) as denying:
        sinks = f"queue=sqs+{denying.url}/123456789012/pictures"
        found = look(event_sinks=sinks, private_event_hosts=urlsplit(denying.url).netloc)
    assert faults(found) == {}
    assert found["events to queue"].status is Status.NOTE
    assert "sqs:GetQueueAttributes" in found["events to queue"].advice


def test_event_file_that_cannot_be_appended_to_is_a_fault(look: Look, tmp_path: Path) -> None:
    found = faults(look(event_sinks=f"file://{tmp_path}/none/events.jsonl folder=file://{tmp_path}"))
    assert list(found) == ["events to events", "events to folder"]
    assert "No such file or directory" in found["events to events"] and "needs a folder" in found["events to events"]


def test_gateway_without_a_public_url_is_a_note(look: Look) -> None:
    found = look(api_keys="a-key", public_url=None, result_lifetime_seconds=86_400)
    assert faults(found) == {}
    assert found["gateway"].status is Status.NOTE
    assert found["gateway"].line.endswith("clients get the provider's links, which die after 1 days")
    assert found["gateway"].advice.startswith("set it to the https address")
    assert look(api_keys="a-key")["gateway"].status is Status.OK
    assert "gateway" not in look()


@pytest.fixture
def silent() -> Iterator[str]:
    """HOST:PORT that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_check_gives_up_a_server_that_never_answers(look_at_all: Look, silent: str) -> None:
    found = look_at_all(
        f"postgresql://someone@{silent}/x",
        s3_endpoint_url=f"http://{silent}",
        kling_base_url=f"http://{silent}",
        event_sinks=f"queue=sqs+http://{silent}/1/q",
        private_event_hosts=silent,
        bound_seconds=1,
    )
    assert list(faults(found)) == ["database", "bucket", "provider", "events to queue"]
    assert "RECEIVER_EVENT_SINKS" in found["events to queue"].advice
    assert all(found[name].line == "gave no answer within 1 s" for name in faults(found))
    assert found["clock"].status is Status.NOTE


def test_check_ends_although_no_server_answers(receiver: CommandLine, silent: str) -> None:
    """The whole process, whose checks still wait. Its bound is short here: this is about the end after it."""
    soon = replace(receiver, constants={"receiver.app.checks:run": partial(checks.run, bound_seconds=1)})
    done = soon(
        "check",
        RECEIVER_DATABASE_URL=f"postgresql://someone@{silent}/x",
        RECEIVER_S3_ENDPOINT_URL=f"http://{silent}",
        RECEIVER_KLING_BASE_URL=f"http://{silent}",
    )
    lines = [line for line in done.out.splitlines() if line.startswith("fault")]
    assert (done.code, len(lines), done.err) == (1, 3, "")
    assert all("gave no answer within 1 s" in line for line in lines)


def test_check_names_secrets_that_can_be_guessed(look: Look) -> None:
    weak = {"api_keys": f"x,{'k' * 24}", "metrics_token": "m", "kling_webhook_secrets": "whsec_YQ=="}
    found = look(**weak)
    named = {name for name, one in found.items() if "easily guessed" in one.line and one.status is Status.NOTE}
    assert named == {"RECEIVER_API_KEYS", "RECEIVER_METRICS_TOKEN", "RECEIVER_KLING_WEBHOOK_SECRETS"}
    strong = look(api_keys="k" * 24, metrics_token="m" * 24, kling_webhook_secrets=SECRET)
    assert not named & strong.keys()


@pytest.mark.parametrize(
    ("address", "more", "advice"),
    [
        ("93.184.215.14", {}, "the next release refuses"),
        ("93.184.215.14", {"allow_http": True}, None),
        ("10.0.0.7", {}, "set RECEIVER_ALLOW_HTTP=true if the network is yours"),
        ("10.0.0.7", {"allow_http": True}, None),
        ("127.0.0.1", {}, None),
        ("nobody.invalid", {}, "if the network is yours"),
    ],
)
def test_check_names_a_store_reached_in_clear_text_over_a_network(
    settings: Callable[..., config.Settings],
    names: dict[str, str],
    address: str,
    more: dict[str, Any],
    advice: str | None,
) -> None:
    """Calls this check alone, because the whole command would connect to that address."""
    names["s3.example.com"] = address
    urls = {"s3_endpoint_url": "http://s3.example.com:8333", "s3_public_endpoint_url": "https://s3.example.com"}
    found = list(check_secrecy.clear_text(Parts(settings(**urls, **more))))
    assert [one.name for one in found] == ["RECEIVER_S3_ENDPOINT_URL"] * (advice is not None)
    assert all(str(advice) in one.advice for one in found)
