"""The specific behaviour of each kind of sink: webhooks, clients of the gateway, queues, lines."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import resource
import socket
import sys
import termios
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlmodel import select
from standardwebhooks.webhooks import WebhookVerificationError

from receiver.app.wiring import Parts
from receiver.base.signature import client_secret
from receiver.events import sqs
from receiver.events.cloudevents import event_id
from receiver.events.dispatcher import Message, NotTried, SinkRefused, SinkSilent, SinkUnavailable
from receiver.events.lines import STDOUT, Lines
from receiver.events.sqs import Sqs
from receiver.gateway import client_callback
from receiver.gateway.api_keys import fingerprint
from receiver.gateway.callback_turns import CallbackTurns
from receiver.gateway.openapi import PATH
from receiver.sandbox import Sandbox
from receiver.workers.clock_steps import USUAL_SECONDS
from storage import circuit
from storage.database.sessions import Database
from storage.operations import outbox
from storage.rows.models import Event
from storage.states import DispatchState
from tests.forked import Forked
from tests.harness import ROOT, wait_until
from tests.loopback import Listener, ScriptedServer
from tests.pipeline import Web, working
from tests.sink_pairs import (
    RETRY_SECONDS,
    STEPS,
    Case,
    client_case_of,
    dispatches,
    failing,
    messages,
    of,
    record_steps,
    run,
    sending,
    webhook_case,
    webhook_to,
)
from tests.unreported_tasks import go_on_after
from tests.webhook_receiver import OTHER_SECRET, SECRET, Hook


@pytest.fixture
def database_kind() -> str:
    """Claims and queues are tested on both databases in test_outbox."""
    return "sqlite"


# -- webhooks ---------------------------------------------------------------------------------------------------------


def test_a_webhook_is_a_signed_cloud_event() -> None:
    with Hook() as hook, webhook_to(hook.url, hook, secrets=(SECRET, OTHER_SECRET)) as sink:
        [message] = messages(1, key="a.png", error="naïve")
        sink.send([message])
        [got] = hook.got
    assert got.path == "/hook?token=secret-in-url"
    assert got.headers["content-type"] == "application/cloudevents+json"
    assert got.headers["webhook-id"] == message.id
    assert (
        got.verified(SECRET)
        == got.verified(OTHER_SECRET)
        == {
            "specversion": "1.0",
            "id": message.id,
            "source": "https://pictures.example.com",
            "type": "task.failed",
            "subject": "t0",
            "time": "2020-01-01T00:00:00Z",
            "sequence": "0000000000000000001",
            "datacontenttype": "application/json",
            "data": {
                "external_task_id": "t0",
                "task_id": str(message.event.task_id),
                "bucket": "pictures",
                "key": "a.png",
                "error": "naïve",
            },
        }
    )


def test_one_connection_serves_a_batch() -> None:
    with Hook() as hook, webhook_to(hook.url, hook) as sink:
        connections = set[Any]()
        accept = hook._server.verify_request
        hook._server.verify_request = lambda *call: connections.add(call[1]) or accept(*call)  # type: ignore[method-assign,func-returns-value]
        assert sink.send(messages(8)) == [None] * 8
    assert len(connections) == 1


@pytest.mark.parametrize("status", [301, 307, 400, 404, 413, 429, 500, 503])
def test_message_refused_temporarily_is_retried(status: int) -> None:
    answer = (status, {"Location": "http://127.0.0.1:1/", "Retry-After": "120"})
    with Hook(lambda: answer) as hook, webhook_to(hook.url, hook) as sink:
        outcomes = sink.send(messages(2))
        assert len(hook.got) == 1  # no redirect is followed, and a receiver that asks to wait gets no request
    first, second = outcomes
    assert isinstance(first, SinkUnavailable)
    assert (str(first), first.after) == (f"127.0.0.1 answered {status}", 120)
    assert isinstance(second, NotTried)


def test_requested_wait_is_kept_up_to_an_hour(database: Database) -> None:
    with Hook(lambda: (503, {"Retry-After": "999999"})) as hook, webhook_to(hook.url, hook) as sink:
        case = Case("webhook", sink, list, *failing(hook))
        record_steps(database, case, STEPS[0])
        run(database, case)
        [row] = dispatches(database)
        assert row.due_at is not None
        assert 3_500 < (row.due_at - database.now()).total_seconds() <= 3_600


def test_410_disables_the_sink(database: Database) -> None:
    with Hook(lambda: 410) as hook, webhook_to(hook.url, hook) as sink:
        case = Case("webhook", sink, list, *failing(hook))
        for _ in range(3):
            record_steps(database, case, *STEPS)
        run(database, case)
        assert len(hook.got) == 1
    assert {row.state for row in dispatches(database)} == {DispatchState.DEAD}
    with database.read() as session:
        assert outbox.disabled(session) == {"it": "127.0.0.1 answered 410"}


def test_a_private_receiver_must_be_on_the_list() -> None:
    with Hook() as hook, webhook_to(hook.url) as sink:
        [outcome] = sink.send(messages(1))
        assert hook.got == []
    assert "not https and not on" in str(outcome)


def test_name_that_resolves_to_a_private_address_is_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    with webhook_to("https://hooks.example.com/") as sink:
        [outcome] = sink.send(messages(1))
    assert "may not be dialled: loopback" in str(outcome)


def test_no_error_shows_the_url(database: Database) -> None:
    with webhook_case(None) as case:
        case.fail()
        record_steps(database, case, STEPS[0])
        run(database, case)
    assert "token" not in str(dispatches(database)[0].error)


# -- clients of the gateway -------------------------------------------------------------------------------------------


def test_each_status_is_sent_to_a_client_once(database: Database) -> None:
    """An event without news for the client is settled without a request."""
    with client_case_of(database) as (case, hook):
        record_steps(database, case, STEPS[0], STEPS[1], STEPS[1], STEPS[2], STEPS[0])
        run(database, case)
        assert [got.json["task_status"] for got in hook.taken] == ["submitted", "processing", "failed"]
        assert all(got.verified() for got in hook.taken)
    assert {row.state for row in dispatches(database)} == {DispatchState.DELIVERED}


@pytest.fixture
def long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open circuit grants no trial during a test."""
    monkeypatch.setattr(circuit, "FIRST_PAUSE_SECONDS", 30)


@pytest.mark.usefixtures("long_pause")
def test_a_client_whose_host_is_down_holds_up_no_other(database: Database) -> None:
    with Hook() as dead, client_case_of(database, dead) as (case, _):
        dead.down()
        for _ in range(6):
            record_steps(database, replace(case, url=dead.url), STEPS[0])
        live = record_steps(database, case, *STEPS)
        run(database, case)
        assert of(case.arrived(), live) == list(map(str, STEPS))
        dead.up()
    assert [row.tries for row in dispatches(database)] == [1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_client_callback_has_its_own_id_and_signature(database: Database) -> None:
    with client_case_of(database) as (case, hook):
        record_steps(database, case, STEPS[0], client=fingerprint(API_KEY))
        run(database, case)
        [got] = hook.taken
    assert got.verified(own_secret(API_KEY))
    for other in (SECRET, own_secret("another key")):
        with pytest.raises(WebhookVerificationError):
            got.verified(other)
    with database.read() as session:
        assert got.headers["webhook-id"] not in {event_id(event) for event in session.exec(select(Event))}


@pytest.mark.parametrize("clients", [["a"], ["a", "b"]], ids=["one client", "two clients"])
def test_a_slow_host_holds_up_no_other(clients: list[str], database: Database) -> None:
    """A host of the same client, or twelve hosts of another. The deadline of a silent one is 5 s."""
    told_others = threading.Event()
    with ExitStack() as opened:
        slow = [opened.enter_context(Hook(lambda: told_others.wait(30) and 204)) for _ in range(12)]
        case, hook = opened.enter_context(client_case_of(database, *slow))
        opened.callback(told_others.set)
        for number in range(24):
            url = slow[number % 12 if len(clients) > 1 else 0].url
            record_steps(database, replace(case, url=url), STEPS[0], client="a")
        record_steps(database, case, *STEPS, client=clients[-1])
        with sending(database, case):
            wait_until(lambda: len(hook.taken) == len(STEPS), seconds=4)
            told_others.set()


def test_a_slow_answer_is_a_failure_of_its_host(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_callback, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(circuit, "FIRST_PAUSE_SECONDS", 30)
    with client_case_of(database) as (case, hook):
        hook.pause_seconds = 0.2
        for _ in range(5):
            record_steps(database, case, STEPS[0])
        run(database, case)
    assert [row.state for row in dispatches(database)] == [DispatchState.DELIVERED] * 3 + [DispatchState.DUE] * 2


def test_a_quick_host_has_many_callbacks_and_none_waits_long(database: Database) -> None:
    with client_case_of(database) as (case, hook):
        for _ in range(60):
            record_steps(database, case, STEPS[0])
        with sending(database, case):
            wait_until(lambda: len(hook.taken) == 60)


def test_410_ends_one_callback_and_disables_no_client(database: Database) -> None:
    with client_case_of(database) as (case, hook):
        hook.answer = iter([410, 204, 204]).__next__
        record_steps(database, case, *STEPS)
        run(database, case)
    assert [row.state for row in dispatches(database)] == [
        DispatchState.DEAD,
        DispatchState.DELIVERED,
        DispatchState.DELIVERED,
    ]
    with database.read() as session:
        assert outbox.disabled(session) == {}


@pytest.mark.usefixtures("long_pause")
def test_each_host_has_its_own_circuit(database: Database) -> None:
    with client_case_of(database) as (case, hook):
        case.fail()
        for _ in range(5):
            record_steps(database, case, STEPS[0])
        run(database, case)
        assert len(hook.got) == 3
        rows = dispatches(database)
        assert [row.tries for row in rows] == [1, 1, 1, 0, 0]
        assert {row.state for row in rows} == {DispatchState.DUE}


@pytest.mark.usefixtures("long_pause")
def test_callbacks_to_a_host_that_is_down_return_one_behind_the_other(database: Database) -> None:
    """A worker claims 80 a second. If thousands returned every 30 s, those of other clients would wait behind them."""
    with client_case_of(database) as (case, hook):
        case.fail()
        record_steps(database, case, STEPS[0])
        with database.read() as session:
            [event] = session.exec(select(Event).where(Event.name == STEPS[0]))
        outcomes = [case.sink.send([Message("id", event, None, b"")])[0] for _ in range(103)]
    waits = [outcome.after for outcome in outcomes if isinstance(outcome, NotTried)]
    assert len(hook.got) == 3 and len(waits) == 100
    assert max(waits) > 33  # 40 without the time that the test takes


@pytest.mark.usefixtures("long_pause")
def test_callbacks_to_a_host_that_stays_down_are_given_up_after_the_schedule(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial every 30 s ends few callbacks. Otherwise those of a host that is gone waited for ever."""
    monkeypatch.setattr(client_callback, "LONG_DOWN_SECONDS", 0)
    with client_case_of(database) as (case, hook):
        case.fail()
        for _ in range(6):
            record_steps(database, case, STEPS[0])
        for _ in range(len(RETRY_SECONDS) + 1):
            run(database, case, make_due_now=True)
        assert len(hook.got) == 3
    rows = dispatches(database)
    assert {(row.state, row.error) for row in rows} == {(DispatchState.DEAD, "its host is down")}


def test_a_slow_host_that_takes_its_callbacks_is_not_given_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLOW_SECONDS", "LONG_DOWN_SECONDS"):
        monkeypatch.setattr(client_callback, name, 0)
    monkeypatch.setattr(circuit, "FIRST_PAUSE_SECONDS", 30)
    with client_case_of(database) as (case, _):
        for _ in range(5):
            record_steps(database, case, STEPS[0])
        run(database, case)
    assert [row.tries for row in dispatches(database)] == [1, 1, 1, 0, 0]


@pytest.mark.usefixtures("long_pause")
@pytest.mark.parametrize("answer", [204, 410])
def test_a_host_that_answered_since_its_failure_is_not_long_down(
    database: Database, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """Otherwise the next outage would count tries that were not made from its beginning."""
    monkeypatch.setattr(client_callback, "LONG_DOWN_SECONDS", 2)
    with client_case_of(database) as (case, hook):
        hook.answer = iter([500, answer, *[500] * 3]).__next__
        for _ in range(2):
            record_steps(database, case, STEPS[0])
        run(database, case)
        time.sleep(2)
        for _ in range(5):
            record_steps(database, case, STEPS[0])
        run(database, case)
    assert [row.tries for row in dispatches(database)][2:] == [1, 1, 1, 0, 0]


def test_callbacks_to_a_slow_host_return_one_behind_the_other() -> None:
    turns = CallbackTurns(client_callback.THREADS, lambda: 0)
    assert turns.begin("slow", "a") == 0
    waits = [turns.begin("slow", "a") for _ in range(40_000)]
    assert max(Counter(map(int, waits[:1_000])).values()) < 12 and waits[-1] == USUAL_SECONDS
    assert turns.begin("quick", "a") == 0


def test_callbacks_to_a_slow_host_do_not_wait_behind_those_to_a_host_that_is_down() -> None:
    """Behind 20,000 it was 34 minutes, where both have the same API key."""
    turns = CallbackTurns(client_callback.THREADS, lambda: 0)
    assert max(turns.put_off_longest("a") for _ in range(20_000)) > 2_000
    assert turns.begin("slow", "a") == 0
    assert 30 < max(turns.begin("slow", "a") for _ in range(300)) < 60


@pytest.fixture
def callback_hook() -> Iterator[Hook]:
    with Hook() as running:
        yield running


API_KEY = "a-key-of-the-client"


def own_secret(key: str) -> str:
    return client_secret(SecretStr(SECRET), fingerprint(key)).get_secret_value()


@pytest.fixture
def changes(callback_hook: Hook) -> dict[str, Any]:
    return {"api_keys": API_KEY, "event_secrets": SECRET, "private_callback_hosts": callback_hook.host}


def test_gateway_client_is_called_back_in_klings_format(
    web: Web, parts: Parts, sandbox: Sandbox, callback_hook: Hook
) -> None:
    sandbox.set(submitted_seconds=3_600, processing_seconds=3_600)
    wanted = {"model_name": "kling-image-o1", "prompt": "a boat", "n": 2, "callback_url": callback_hook.url}
    with working(parts):
        answer = httpx.post(f"{web.url}{PATH}", json=wanted, headers={"Authorization": f"Bearer {API_KEY}"})
        wait_until(
            lambda: go_on_after(sandbox, len(callback_hook.got)) or len(callback_hook.got) == len(STEPS), seconds=60
        )
    arrival = [got.verified(own_secret(API_KEY)) for got in callback_hook.got]
    assert [record["task_status"] for record in arrival] == ["submitted", "processing", "succeed"]
    assert {record["task_id"] for record in arrival} == {answer.json()["data"]["task_id"]}
    urls = [picture["url"] for picture in arrival[-1]["task_result"]["images"]]
    opened = {hashlib.sha256(httpx.get(url, follow_redirects=True).content).hexdigest() for url in urls}
    assert opened == set(sandbox.ledger().sha256.values())
    assert len(urls) == 2


# -- queues -----------------------------------------------------------------------------------------------------------


def test_a_fifo_queue_keeps_each_task_in_order_and_drops_copies(queues: Any) -> None:
    attributes = {"FifoQueue": "true"}
    url = queues.create_queue(QueueName=f"{uuid.uuid4().hex}.fifo", Attributes=attributes)["QueueUrl"]
    sent = messages(3)
    with closing(Sqs(url)) as sink:
        assert sink.send(sent) == sink.send(sent) == [None] * 3
    asked = {"QueueUrl": url, "MaxNumberOfMessages": 10, "AttributeNames": ["MessageGroupId"]}
    found = queues.receive_message(**asked)["Messages"]
    groups = {each["Attributes"]["MessageGroupId"]: json.loads(each["Body"])["id"] for each in found}
    assert groups == {str(message.event.task_id): message.id for message in sent}


def test_messages_beyond_one_call_are_sent_in_several(queues: Any) -> None:
    url = queues.create_queue(QueueName=uuid.uuid4().hex)["QueueUrl"]
    large = messages(1, error="x" * (sqs.MAX_BYTES + 1))
    with closing(Sqs(url)) as sink:
        outcomes = sink.send([*messages(12), *messages(3, error="x" * 100_000), *large])
    assert outcomes[:15] == [None] * 15
    assert isinstance(outcomes[15], SinkRefused)
    counted = queues.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])
    assert counted["Attributes"]["ApproximateNumberOfMessages"] == "15"


@pytest.mark.parametrize(
    ("first", "again"), [(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), (b"", b"HTTP/1.1 100 Continue\r\n\r\n")]
)
def test_a_queue_whose_answer_never_begins_is_silent(
    monkeypatch: pytest.MonkeyPatch, first: bytes, again: bytes
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setattr(sqs, "READ_SECONDS", 0.3)

    def drip(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(first)
        for _ in range(200):
            connection.sendall(again)
            time.sleep(0.05)

    queue = Listener(drip)
    started = time.monotonic()
    with closing(Sqs(f"http://127.0.0.1:{queue.port}/queue")) as sink:
        assert [type(outcome) for outcome in sink.send(messages(1))] == [SinkSilent]
    queue.close()
    assert time.monotonic() - started < 5


class OfNoQueue(ScriptedServer):
    """Gives every request the same answer."""

    def __init__(self, status: str, body: bytes) -> None:
        self._answer = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)
        super().__init__()

    def script_of(self, head: bytes) -> bytes:
        return self._answer


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>Log in</html>", b"[]", b'{"Failed":[{"Code":"x"}]}', b"\xe9"])
def test_a_page_in_place_of_a_queue_has_taken_no_message(queues: Any, body: bytes) -> None:
    """Behind a proxy that answers 200, events counted as delivered that no queue had."""
    with closing(OfNoQueue("200 OK", body)) as page, closing(Sqs(f"http://127.0.0.1:{page.port}/queue")) as sink:
        assert [type(outcome) for outcome in sink.send(messages(2))] == [SinkUnavailable] * 2
        with pytest.raises(SinkUnavailable):
            sink.check()


def test_an_error_code_of_a_queue_is_made_safe_to_store(queues: Any) -> None:
    body = json.dumps({"__type": "sqs#Bad\0\x1b[31m" + "x" * 1_000}).encode()
    with closing(OfNoQueue("400 Bad Request", body)) as queue:
        with closing(Sqs(f"http://127.0.0.1:{queue.port}/queue")) as sink:
            (outcome,) = sink.send(messages(1))
    assert str(outcome).isprintable() and len(str(outcome)) < 100


# -- lines ------------------------------------------------------------------------------------------------------------


def test_half_a_line_left_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"id": "half')
    assert Lines(file).send(messages(2)) == [None, None]
    half, *whole = file.read_bytes().splitlines()
    assert [json.loads(line)["subject"] for line in whole] == ["t0", "t1"]
    assert half == b'{"id": "half'


def test_lines_are_written_again_if_the_file_was_rotated_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been compressed and removed before they were written."""
    file, flush = tmp_path / "events.jsonl", os.fsync

    def rotate_first(number: int) -> None:
        file.rename(tmp_path / "events.jsonl.1")
        flush(number)

    with monkeypatch.context() as rotating:
        rotating.setattr(os, "fsync", rotate_first)
        [failed] = Lines(file).send(messages(1))
    assert isinstance(failed, SinkUnavailable) and "rotated while lines were written" in str(failed)
    assert Lines(file).send(messages(1)) == [None]
    assert whole_lines(file.read_bytes()) == ["t0"]


def test_check_of_a_file_in_a_folder_without_write_access_names_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    folder.chmod(0o555)
    user = os.getuid()
    if user == 0:  # root may write everywhere; access(2) goes by the real user
        os.setreuid(65_534, 0)
    try:
        with pytest.raises(SinkUnavailable) as refused:
            Lines(folder / "events.jsonl").check()
    finally:
        os.setreuid(user, -1)
    assert str(refused.value) == f"{folder / 'events.jsonl'}: Permission denied ({folder})"


def test_check_of_a_file_in_a_read_only_file_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(SinkUnavailable, match=r"Read-only file system"):
        Lines(tmp_path / "events.jsonl").check()


def test_unread_pipe_delays_no_other_sink(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    first, second = Lines(tmp_path / "pipe").send(messages(2))
    assert isinstance(first, SinkUnavailable)
    assert isinstance(second, NotTried)


def test_lines_of_several_processes_on_one_pipe_are_whole(tmp_path: Path) -> None:
    """A pipe takes 4 KB at once. Longer lines go in pieces, between which other processes may write."""
    pipe, batch = tmp_path / "pipe", tmp_path / "batch"
    os.mkfifo(pipe)
    batch.write_bytes(pickle.dumps(messages(100, note="x" * 600)))
    reader, writer = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), os.open(pipe, os.O_WRONLY)
    os.set_blocking(reader, True)
    words, err = (str(batch), "10"), tmp_path / "err"
    writers = [Forked(words, dict(os.environ), ROOT, out=pipe, err=err, module="tests.line_writer") for _ in range(3)]
    read = b""
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(lambda: [each.wait(30) for each in writers])
        ends.add_done_callback(lambda _: os.close(writer))
        while chunk := os.read(reader, 8192):
            read += chunk
            time.sleep(0.0003)  # slower than they write, so that the pipe is full
    os.close(reader)
    lines = read.splitlines()
    assert ends.result() == [0, 0, 0]
    assert len(lines) == 3 * 10 * 100
    assert all(line.startswith(b"{") and line.endswith(b"}") for line in lines)


def test_standard_output_takes_lines(capfd: pytest.CaptureFixture[str]) -> None:
    assert Lines(None).send(messages(2)) == [None, None]
    assert [json.loads(line)["subject"] for line in capfd.readouterr().out.splitlines()] == ["t0", "t1"]


@contextmanager
def output_to(file: int) -> Iterator[None]:
    """Standard output is `file` during the block."""
    own = os.dup(STDOUT)
    os.dup2(file, STDOUT)
    try:
        yield
    finally:
        os.dup2(own, STDOUT)
        os.close(own)


def whole_lines(text: bytes) -> list[str]:
    """The tasks of the lines that are JSON."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line)["subject"])
    return found


def test_a_line_that_a_full_disk_cut_off_spoils_none_of_those_after_it(tmp_path: Path) -> None:
    """Standard output is a file. Another worker process may write the next line."""
    output, limits = tmp_path / "events.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with output.open("wb") as file, output_to(file.fileno()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            [failed] = Lines(None).send(messages(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert isinstance(failed, SinkUnavailable) and output.stat().st_size == 100
        assert Lines(None).send(messages(2)) == [None, None]
    assert whole_lines(output.read_bytes()) == ["t0", "t1"]


def test_a_line_that_a_reader_of_a_pipe_left_spoils_none_for_the_next_reader(tmp_path: Path) -> None:
    pipe, sink = tmp_path / "pipe", Lines(None)
    os.mkfifo(pipe)
    reader, writer = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), os.open(pipe, os.O_WRONLY)
    with ThreadPoolExecutor(1) as pool, output_to(writer):
        sending = pool.submit(sink.send, messages(1, note="x" * 100_000))
        wait_until(lambda: unread(reader) >= 65_536)
        os.close(reader)
        assert isinstance(sending.result()[0], SinkUnavailable)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        read = os.read(reader, 65_536)
        assert sink.send(messages(2)) == [None, None]
        read += os.read(reader, 65_536)
    os.close(writer)
    os.close(reader)
    assert whole_lines(read) == ["t0", "t1"]


def unread(reader: int) -> int:
    return int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: b"".join(iter(lambda: os.read(reader, 8_192), b"")))
        with output_to(writer):
            outcomes = Lines(None).send(messages(100, note="x" * 3_000))
        os.close(writer)
    os.close(reader)
    assert outcomes == [None] * 100
    assert len(whole_lines(reading.result())) == 100
