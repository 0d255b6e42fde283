"""Canaries: recognisable secrets pass through everything, and are then searched for everywhere.

Searched: standard output and error of every command and of the server with its worker at debug level, every HTTP
answer, the metrics, the manifests, and every column of every row except the three that are meant to hold them.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel, select

from receiver.app.wiring import Parts
from receiver.base import telemetry
from receiver.sandbox import Knobs, Sandbox
from receiver.tasks import task_view
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.rows.deliveries import Delivery
from storage.rows.models import Asset, Callback, Task
from tests.command_line import CommandLine, variables
from tests.console_reader import PAGES, Reader
from tests.forked import Forked
from tests.harness import wait_until
from tests.pipeline import Wired, free_port, settings_for, task_of

CANARY = "cAnArY"
API_KEY = f"sk-{CANARY}-of-the-api"
ACCESS_KEY = f"AK{CANARY}AccessKey"
SECRET_KEY = f"{CANARY}-secret-key-of-more-than-32-characters"
CALLBACK_SECRETS = f"{CANARY}-callback-secret-that-signs-now,{CANARY}-callback-secret-of-last-year"
WEBHOOK_SECRETS = [
    f"whsec_{base64.b64encode(f'{CANARY} webhook {n} of 32 characters!'.encode()).decode()}" for n in "12"
]
METRICS_TOKEN = f"{CANARY}-metrics-token"
CONSOLE_KEY = f"{CANARY}-console-key-of-24-characters"
DATABASE_PASSWORD = f"{CANARY}-database-password"
# Patterns of a result link's query and of a JWT.
SHAPES = (re.compile("Signature=[^…&\"' ]"), re.compile(r"eyJ[\w-]{8,}\.[\w-]+\."), re.compile("Key-Pair-Id=K"))
MEANT = {("task", "callback_url"), ("asset", "source_url"), ("callback", "body")}
ASK = ("submit", "--model-name", "kling-image-o1", "--prompt")


@dataclass
class Seen:
    """All output, each part with its source."""

    texts: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        self.texts.append((where, what))

    def leaks(self, secrets: list[str]) -> list[str]:
        found = []
        for where, what in self.texts:
            shapes = [re.compile(re.escape(secret)) for secret in secrets] + list(SHAPES)
            hits = (hit for shape in shapes if (hit := shape.search(what)))
            found += [f"{where}: {what[max(0, hit.start() - 60) : hit.end() + 20]!r}" for hit in hits]
        return found


class Echo(http.server.BaseHTTPRequestHandler):
    """A provider that answers every request with an error that repeats it, credentials first."""

    known = ""

    def answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        words = f"{self.headers['Authorization']} {self.known} {self.path} {sent}"
        status = 503 if "maintenance" in sent else 400
        body = json.dumps({"code": 5001 if status == 503 else 1200, "message": words, "data": {"task_id": words}})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def echo(database_kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Echo, "known", next(iter(CREDENTIALS[database_kind].values())))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    knobs = Knobs(
        api_keys=[API_KEY], access_key=ACCESS_KEY, secret_key=SECRET_KEY, webhook_secrets=WEBHOOK_SECRETS,
        picture_bytes=20_000, submitted_seconds=0, processing_seconds=0, cdn_faults=["503", "html"],
    )  # fmt: skip
    with Sandbox(knobs=knobs) as server:
        yield server


CREDENTIALS = {
    "sqlite": {"RECEIVER_KLING_API_KEY": API_KEY},
    "postgresql": {"RECEIVER_KLING_ACCESS_KEY": ACCESS_KEY, "RECEIVER_KLING_SECRET_KEY": SECRET_KEY},
}  # a provider might repeat the first of each


@pytest.fixture
def receiver(
    database_kind: str, database_url: str, bucket: Bucket, sandbox: Sandbox, tmp_path: Path,
    s3_environment: dict[str, str],
) -> CommandLine:  # fmt: skip
    """SQLite with an API key, PostgreSQL (which checks no password here) with a JWT."""
    port = free_port()
    common = {name: value for name, value in variables(database_url, bucket, sandbox).items() if "API_KEY" not in name}
    secret = {
        "RECEIVER_DATABASE_URL": database_url.replace("postgres@", f"postgres:{DATABASE_PASSWORD}@"),
        "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}", "RECEIVER_PORT": str(port),
        "RECEIVER_CALLBACK_SECRETS": CALLBACK_SECRETS, "RECEIVER_METRICS_TOKEN": METRICS_TOKEN,
        "RECEIVER_CONSOLE_KEYS": f"ann={CONSOLE_KEY}",
        "RECEIVER_KLING_WEBHOOK_SECRETS": ",".join(WEBHOOK_SECRETS), "RECEIVER_LOG_LEVEL": "debug",
    }  # fmt: skip
    return CommandLine({**common, **s3_environment, **secret, **CREDENTIALS[database_kind]}, tmp_path)


@contextlib.contextmanager
def serving(receiver: CommandLine, seen: Seen) -> Iterator[str]:
    log = receiver.folder / "serve.log"
    log.touch()
    server = Forked(("serve",), environment(receiver), receiver.folder, out=log, strict=True)
    try:
        wait_until(lambda: b"worker.started" in log.read_bytes() and b"web.started" in log.read_bytes(), seconds=60)
        yield receiver.variables["RECEIVER_PUBLIC_URL"]
    finally:
        server.terminate()
        server.wait(40)
        seen.add("the server's log", log.read_text())


Command = tuple[tuple[str, ...], dict[str, str | None]]


def run(receiver: CommandLine, seen: Seen, *commands: Command | tuple[str, ...]) -> str:
    """Run these commands one after the other. Returns their output. A command may have changed variables."""
    output = ""
    for command in commands:
        words, changes = command if isinstance(command[-1], dict) else (command, {})
        done = receiver(*words, **changes)
        seen.add(f"{words} {[*changes]}", done.out + done.err)
        output += done.out + done.err
    return output


def environment(receiver: CommandLine) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    return {**rest, "COLUMNS": "200", **receiver.variables}


def archive_and_fail(receiver: CommandLine, seen: Seen, parts: Parts) -> None:
    """Tasks that succeed, that fail, that get no callback, and that have dead links at first."""
    prompts = ("a boat", "[fail]", "[drop]", "[expire]")
    run(receiver, seen, *((*ASK, prompt, "--external-task-id", prompt) for prompt in prompts))
    wait_until(lambda: all(task_view.is_over(task_of(parts, prompt)) for prompt in prompts), seconds=120)


def send_requests(seen: Seen, web: str, token: str) -> None:
    """Send deliveries of every outcome, and requests to every other path, with and without the token."""
    good = f"{web}/callbacks/kling/{token}"
    signed = {"webhook-id": "x", "webhook-timestamp": "1", "webhook-signature": "v1,AAAA"}
    with httpx.Client(trust_env=False) as client:
        answers = [
            client.post(good, content=b"{}"), client.post(good, content=b"{}", headers=signed),
            client.post(good + "x", content=b"{}"), client.post(good, content=b"x" * 300_000), client.get(good),
            *(client.get(f"{web}/{path}") for path in ("healthz", "readyz", "metrics", "no", f"assets/{token}.png")),
            *(client.get(f"{web}/{path}", headers={"Authorization": f"Bearer {METRICS_TOKEN}"})
              for path in ("metrics", "readyz")),
        ]  # fmt: skip
    assert {200, 401, 404, 405, 413} <= {answer.status_code for answer in answers}
    for answer in answers:
        seen.add(f"{answer.request.method} {answer.status_code}", f"{answer.headers} {answer.text}")


def open_console(seen: Seen, web: str, database: Database) -> None:
    """Request every page of the console, with every task and every callback."""
    with database.read() as session:
        paths = [f"/tasks/{each}" for each in session.exec(select(Task.id))]
        paths += [f"/deliveries/{each.id}" for each in session.exec(select(Callback)) if each.source == "push"]
    with Reader(web, CONSOLE_KEY) as ann:
        for path in (*PAGES, *paths):
            seen.add(f"the console's {path}", ann.page(path))
        for path in (each.replace("/tasks/", "/ask?again=") for each in paths if each.startswith("/tasks/")):
            seen.add(f"the console's {path}", ann.get(path).text)
        seen.add("the console's check", ann.post("/settings").text)


def provoke(receiver: CommandLine, seen: Seen, echo: str) -> None:
    """Provoke faults with quoting messages: an echoing provider, wrong settings, an unreachable database and bucket."""
    bad = f"postgresql://postgres:{DATABASE_PASSWORD}@127.0.0.1"
    quiet = {"RECEIVER_PUBLIC_URL": None}  # otherwise `check` prints the account URL, as it should
    away = {**quiet, "RECEIVER_DATABASE_URL": f"{bad}:1/x", "RECEIVER_KLING_BASE_URL": echo}
    unreadable = {**quiet, "RECEIVER_DATABASE_URL": f"{bad}:{CANARY}/x"}
    short = {"RECEIVER_KLING_WEBHOOK_SECRETS": CANARY, "RECEIVER_CALLBACK_SECRETS": CANARY}
    wrong = [
        {**short, "RECEIVER_PUBLIC_URL": f"https://u:{CANARY}@example.com"},
        {**quiet, "AWS_SECRET_ACCESS_KEY": f"{CANARY}-of-the-bucket"},
        {**quiet, "RECEIVER_KLING_API_KEY": f"{CANARY} with spaces"},
    ]
    echoing = [((*ASK, prompt), {"RECEIVER_KLING_BASE_URL": echo}) for prompt in ("a boat", "maintenance")]
    run(receiver, seen, *echoing, (("work", "--once"), {"RECEIVER_KLING_BASE_URL": echo}))
    run(receiver, seen, (("check",), away))
    if "RECEIVER_KLING_API_KEY" in receiver.variables:  # the following commands never reach the credentials or the rows
        words = [("check",), ("status",), (*ASK, "a boat")]
        run(receiver, seen, *((one, unreadable) for one in words), *((one, away) for one in words[1:]))
        run(receiver, seen, *((("check",), change) for change in wrong))


FORCED = {
    "sqlite": [
        "CREATE TRIGGER forced BEFORE UPDATE OF state ON asset WHEN NEW.state = 'archived' "
        "BEGIN SELECT RAISE(ABORT, 'forced'); END",
        "CREATE TRIGGER forced_too BEFORE UPDATE OF note ON task BEGIN SELECT RAISE(ABORT, 'forced'); END",
    ],
    "postgresql": [
        "CREATE FUNCTION forced() RETURNS trigger AS "
        "$$ BEGIN RAISE EXCEPTION 'forced by %', NEW USING DETAIL = NEW; END $$ LANGUAGE plpgsql",
        "CREATE TRIGGER forced BEFORE UPDATE ON asset FOR EACH ROW WHEN (NEW.state = 'archived') "
        "EXECUTE FUNCTION forced()",
        "CREATE TRIGGER forced_too BEFORE UPDATE OF note ON task FOR EACH ROW EXECUTE FUNCTION forced()",
    ],
}


def force_exceptions(receiver: CommandLine, seen: Seen, database: Database, echo: str) -> None:
    """Make the database refuse to settle: a bug in the assets' lane, and one that ends a command with its traceback."""
    with database.write() as session:
        for statement in FORCED["sqlite" if database.is_sqlite else "postgresql"]:
            session.execute(text(statement))
    run(receiver, seen, (*ASK, "forced", "--json"))
    for log_format in ("console", "json"):
        work = (("work", "--once"), {"RECEIVER_LOG_FORMAT": log_format})
        logged = lambda work=work: "worker.step_failed" in (said := run(receiver, seen, work)) and said  # noqa: E731
        log = wait_until(logged, seconds=60, every=0.5)
        assert "forced" in log and "Traceback" in log
    shown = run(receiver, seen, ((*ASK, "maintenance"), {"RECEIVER_KLING_BASE_URL": echo}))
    assert "forced" in shown and "Traceback" in shown


def all_columns(rows: Database, seen: Seen) -> None:
    """Every column of every table, as text."""
    with rows.read() as session:
        for name, table in SQLModel.metadata.tables.items():
            for row in session.execute(select(table)).mappings():
                for column, value in row.items():
                    if (name, column) not in MEANT:
                        seen.add(
                            f"{name}.{column}", value.decode("latin-1") if isinstance(value, bytes) else str(value)
                        )


def secrets_of(parts: Parts, seaweed_key: str) -> list[str]:
    """All secrets: the settings', and those derived from them on the way."""
    with parts.database.read() as session:
        tokens = [str(url).rpartition("/")[2] for url in session.exec(select(Task.callback_url)) if url]
        queries = [url.partition("?")[2] for url in session.exec(select(Asset.source_url))]
    assert len(tokens) > 4 and all(len(token) == 55 for token in tokens) and len(queries) > 2 and all(queries)
    tokens.append(parts.tokens.sign("kling", None))
    return [CANARY, seaweed_key, *(secret[6:] for secret in WEBHOOK_SECRETS), *tokens, *queries]


@pytest.mark.campaign("sqlite")
def test_no_secret_leaves_through_any_output(
    receiver: CommandLine, database: Database, bucket: Bucket, sandbox: Sandbox, echo: str, database_url: str
) -> None:
    seen = Seen()
    parts = Wired(settings_for(database_url, bucket, sandbox, callback_secrets=CALLBACK_SECRETS), bucket=bucket)
    with serving(receiver, seen) as web:
        archive_and_fail(receiver, seen, parts)
        send_requests(seen, web, parts.tokens.sign("kling", None))
        open_console(seen, web, database)
    provoke(receiver, seen, echo)
    force_exceptions(receiver, seen, database, echo)
    run(receiver, seen, ("status",), ("status", "--json"), ("status", "a boat"), ("status", "[expire]", "--json"))
    all_columns(database, seen)
    for each in bucket.list(bucket.prefix):
        seen.add(each.key, bucket.read_bytes(each.key, 2**20).decode("latin-1"))
    leaks = seen.leaks(secrets_of(parts, receiver.variables["AWS_SECRET_ACCESS_KEY"]))
    parts.close()
    assert not leaks, "\n".join(leaks)
    assert len(seen.texts) > 200


SIGNED = f"https://p1.klingai.com/a.png?Expires=1&Signature={CANARY}&Key-Pair-Id=K1"


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_no_repr_shows_a_secret(database_url: str, bucket: Bucket, sandbox: Sandbox) -> None:
    keys = {"callback_secrets": CALLBACK_SECRETS, "metrics_token": METRICS_TOKEN,
            "console_keys": f"ann={CONSOLE_KEY}", "kling_api_key": API_KEY,
            "kling_access_key": ACCESS_KEY, "kling_secret_key": SECRET_KEY, "kling_webhook_secrets": WEBHOOK_SECRETS,
            "database_url": f"postgresql://u:{DATABASE_PASSWORD}@127.0.0.1:1/x"}  # fmt: skip
    parts = Wired(settings_for(bucket=bucket, sandbox=sandbox, **keys), bucket=bucket)
    token = parts.tokens.sign("kling", None)
    task = Task(external_task_id="x", provider="kling", callback_url=f"https://x/callbacks/kling/{token}")
    task.request = {"image_list": [{"image": SIGNED}]}
    rows = [task, Callback(body=SIGNED.encode(), provider="kling"), Asset(source_url=SIGNED, kind="image", index=0)]
    body = json.dumps({"task_id": "1", "task_status": "succeed", "task_result": {"images": [{"url": SIGNED}]}}).encode()
    parsed = [parts.kling.parse(body), Delivery("kling", "push", None, body, {"a": SIGNED})]
    made = [
        getattr(parts, name) for name in ("database", "kling", "tokens", "bucket", "submitter", "fetcher", "schedule")
    ]
    for one in [parts.settings, parts, parts.database.url, *rows, *parsed, *made, *parts.lanes()]:
        assert not any(secret in f"{one!r} {one!s}" for secret in (CANARY, token, *WEBHOOK_SECRETS)), type(one)
    parts.close()


def test_an_error_of_the_database_does_not_quote_its_values(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught, database.write() as session:
        session.execute(text("INSERT INTO task (nowhere) VALUES (:url)"), {"url": SIGNED})
    assert "nowhere" in str(caught.value) and CANARY not in str(caught.value)


def raise_with_a_local() -> None:
    password = CANARY
    raise ValueError(SIGNED, len(password))


def test_a_logged_exception_shows_neither_locals_nor_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    for output in ("console", "json"):
        telemetry.configure("debug", output)  # type: ignore[arg-type]
        log = structlog.get_logger()
        try:
            raise_with_a_local()
        except ValueError as error:
            log.exception("caught", nested={"url": [SIGNED]}, error=error, token=f"Bearer {CANARY}")
            log.debug("also", links=(SIGNED, {SIGNED}), raw=SIGNED.encode())
    shown = capsys.readouterr().err
    console, brace, json_lines = shown.partition('{"')
    assert brace and json_lines.count("\n") == 2
    for each in (console, json_lines):
        assert "Traceback" in each and "p1.klingai.com" in each and "also" in each
        assert CANARY not in each


@pytest.mark.parametrize(
    "secret",
    [
        SIGNED, f"/callbacks/kling/{CANARY * 5}", f"/assets/{CANARY * 5}.png", f"Bearer {CANARY}", WEBHOOK_SECRETS[0],
        f"eyJ{'a' * 20}.{CANARY}.{CANARY}", f"postgresql://u:{CANARY}@host/x", f"bearer\t{CANARY}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("around", ["{}", "'{}'", '"{}"', "({})", "x {} y", "\\n{}\\n"])
def test_text_in_the_form_of_a_secret_is_cut_from_logs(secret: str, around: str) -> None:
    shown = telemetry.scrub(around.format(secret))
    assert CANARY not in shown and WEBHOOK_SECRETS[0] not in shown and "…" in shown
