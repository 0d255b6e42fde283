"""The callback endpoint over real sockets: access, bounds, answers, and stored deliveries."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import structlog
from pydantic import SecretStr
from sqlalchemy import event, text, update
from standardwebhooks import Webhook
from starlette.types import Message

from receiver.app.wiring import Parts
from receiver.base.tokens import ASSET_PURPOSE, Tokens
from receiver.web import account_budget, callbacks
from receiver.web.http_protocol import BoundedHttpProtocol
from receiver.web.refusals import RETRY_AFTER_SECONDS
from storage.errors import DatabaseUnavailable
from storage.operations import heartbeats
from storage.rows import group_commit, tasks
from storage.rows.deliveries import Delivery
from storage.rows.models import Callback, Task
from storage.states import CallbackState, Step, TaskState
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET, Web, callbacks_of, deliver, insert_row, run, task_of
from tests.plans import plans, scans
from tests.postgres import Postgres
from tests.rows import event_names

ON_SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"])
ON_POSTGRESQL = pytest.mark.parametrize("database_kind", ["postgresql"])
SECRET, NEXT_SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI=", "whsec_" + "bmV4dHNlY3JldA" * 4
SIGNED = pytest.mark.parametrize("changes", [{"kling_webhook_secrets": SECRET}])
METRICS_TOKEN = "a-metrics-token"
WATCHED = pytest.mark.parametrize("changes", [{"metrics_token": METRICS_TOKEN}])
BODY = b'{"task_id": "901", "task_status": "processing"}'


@pytest.fixture(autouse=True)
def loop_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop commits from the first delivery on, and leaves to the thread what it cannot."""
    monkeypatch.setattr(group_commit, "QUICK_COMMITS", 0)


def path_of(parts: Parts, task: Task, **options: Any) -> str:
    return f"/callbacks/kling/{parts.tokens.sign('kling', task.id, **options)}"


def post(web: Web, path: str, body: bytes = BODY, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(web.url + path, content=body, headers=named, timeout=10)


@contextmanager
def connected(web: Web, path: str, *headers: str) -> Iterator[socket.socket]:
    """A connection that has sent the head of a POST, and nothing of its body yet."""
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        lines = [f"POST {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        yield connection


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


# -- tokens and methods ---------------------------------------------------------------------------------------------


def test_a_delivery_is_committed_as_it_came_and_answered_200(web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    answer = post(web, path_of(parts, task), user_agent="Apache-HttpClient/4.5", authorization="Bearer secret")
    assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
    (row,) = callbacks_of(parts)
    assert (row.source, row.task_id, row.body, row.state) == ("push", task.id, BODY, CallbackState.RECEIVED)
    assert row.headers == {"user-agent": "Apache-HttpClient/4.5"}
    assert row.due_at is not None


BAD_TOKENS = ["x" * 55, "AA", "%00" * 10, "A" * 64, "..%2f..", "é" * 55]


@ON_SQLITE
@pytest.mark.parametrize("token", BAD_TOKENS)
def test_a_bad_token_is_404_and_its_body_is_not_waited_for(token: str, web: Web, parts: Parts) -> None:
    path = httpx.URL(f"/callbacks/kling/{token}").raw_path.decode()
    with connected(web, path, "Content-Length: 1000", "Connection: close") as connection:
        assert answer_on(connection) == (404, {"error": "not found"})
    assert callbacks_of(parts) == []


@ON_SQLITE
def test_token_of_another_purpose_is_404(web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    other_provider = parts.tokens.sign("fal", task.id)
    good = parts.tokens.sign("kling", task.id)
    changed = good[:-1] + ("E" if good.endswith("A") else "A")
    for token in (other_provider, changed, parts.tokens.sign("kling", task.id, purpose=ASSET_PURPOSE)):
        assert post(web, f"/callbacks/kling/{token}").status_code == 404
    assert post(web, f"/callbacks/fal/{other_provider}").status_code == 404
    assert callbacks_of(parts) == []


@ON_SQLITE
@pytest.mark.parametrize("changes", [{"callback_secrets": f"{'n' * 40},{CALLBACK_SECRET}"}])
def test_token_of_the_previous_secret_is_accepted(web: Web, parts: Parts) -> None:
    old = Tokens([SecretStr(CALLBACK_SECRET)]).sign("kling", insert_row(parts).id)
    assert post(web, f"/callbacks/kling/{old}").status_code == 200


@ON_SQLITE
def test_delivery_of_a_task_without_a_row_is_stored(web: Web, parts: Parts) -> None:
    gone = Task(external_task_id="gone", provider="kling")
    assert post(web, path_of(parts, gone)).status_code == 200
    assert callbacks_of(parts)[0].task_id == gone.id


@ON_SQLITE
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods_are_405(method: str, web: Web, parts: Parts) -> None:
    answer = httpx.request(method, web.url + path_of(parts, insert_row(parts)))
    assert (answer.status_code, answer.json()) == (405, {"error": "method not allowed"})
    assert answer.headers["allow"] == "POST"


@ON_SQLITE
def test_one_trailing_slash_is_accepted_and_nothing_is_ever_redirected(web: Web, parts: Parts) -> None:
    path = path_of(parts, insert_row(parts))
    answers = [post(web, path + end).status_code for end in ("", "/", "//", "/more")]
    assert answers == [200, 200, 404, 404]
    assert httpx.get(f"{web.url}/healthz/").status_code == 404


# -- bounds of bodies -----------------------------------------------------------------------------------------------


@ON_SQLITE
def test_a_body_declared_too_long_is_413_before_it_is_sent(web: Web, parts: Parts) -> None:
    length = f"Content-Length: {callbacks.MAX_BODY_BYTES + 1}"
    with connected(web, path_of(parts, insert_row(parts)), length, "Connection: close") as connection:
        status, _ = answer_on(connection)
    assert (status, callbacks_of(parts)) == (413, [])


@ON_SQLITE
def test_a_chunked_body_is_413_once_it_is_too_long(web: Web, parts: Parts) -> None:
    with connected(web, path_of(parts, insert_row(parts)), "Transfer-Encoding: chunked") as connection:
        chunk = b"x" * 65_536
        for _ in range(callbacks.MAX_BODY_BYTES // len(chunk)):
            connection.sendall(b"10000\r\n" + chunk + b"\r\n")
        connection.sendall(b"1\r\nx\r\n")  # and no end
        status, _ = answer_on(connection)
    assert (status, callbacks_of(parts)) == (413, [])


@ON_SQLITE
def test_the_longest_body_allowed_is_taken(web: Web, parts: Parts) -> None:
    body = b'"' + b"x" * (callbacks.MAX_BODY_BYTES - 2) + b'"'
    assert post(web, path_of(parts, insert_row(parts)), body).status_code == 200


@ON_SQLITE
def test_a_body_that_does_not_come_is_408(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "BODY_SECONDS", 0.2)
    with connected(web, path_of(parts, insert_row(parts)), "Content-Length: 100") as connection:
        connection.sendall(b"half of it")
        status, _ = answer_on(connection)
    assert (status, callbacks_of(parts)) == (408, [])


# -- answers --------------------------------------------------------------------------------------------------------


def test_the_same_delivery_again_is_200_and_kept_once(web: Web, parts: Parts) -> None:
    path = path_of(parts, insert_row(parts))
    assert [post(web, path).status_code for _ in range(3)] == [200] * 3
    assert len(callbacks_of(parts)) == 1


@ON_SQLITE
@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"<html>", b'{"task_status": "succeed"'])
def test_unreadable_body_is_200_and_stored_as_unreadable(body: bytes, web: Web, parts: Parts) -> None:
    assert post(web, path_of(parts, insert_row(parts)), body).status_code == 200
    run(parts, "callbacks")
    (row,) = callbacks_of(parts)
    assert (row.state, row.body) == (CallbackState.UNREADABLE, body)


@ON_SQLITE
def test_compressed_body_is_200_and_its_row_says_so(web: Web, parts: Parts) -> None:
    body = gzip.compress(BODY)
    assert post(web, path_of(parts, insert_row(parts)), body, content_encoding="gzip").status_code == 200
    run(parts, "callbacks")
    (row,) = callbacks_of(parts)
    assert (row.state, row.body) == (CallbackState.UNREADABLE, body)
    assert (row.reason, row.headers["content-encoding"]) == ("compressed with gzip, which is not undone", "gzip")


@ON_SQLITE
def test_a_contradicting_body_is_200_and_kept_as_rejected(web: Web, parts: Parts) -> None:
    body = json.dumps({**json.loads(BODY), "task_info": {"external_task_id": "another"}}).encode()
    assert post(web, path_of(parts, insert_row(parts)), body).status_code == 200
    run(parts, "callbacks")
    assert callbacks_of(parts)[0].state is CallbackState.REJECTED


# -- signatures -----------------------------------------------------------------------------------------------------


def signature(body: bytes, *secrets: str, minutes_ago: float = 0, webhook_id: str = "msg_1") -> dict[str, str]:
    moment = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    signed = " ".join(Webhook(secret).sign(webhook_id, moment, body.decode()) for secret in secrets)
    return {
        "webhook_id": webhook_id,
        "webhook_timestamp": str(int(moment.timestamp())),
        "webhook_signature": signed,
    }


@SIGNED
def test_a_signed_delivery_is_taken_and_remembers_its_id(web: Web, parts: Parts) -> None:
    assert post(web, path_of(parts, insert_row(parts)), **signature(BODY, SECRET)).status_code == 200
    (row,) = callbacks_of(parts)
    assert (row.webhook_id, row.state) == ("msg_1", CallbackState.RECEIVED)


REFUSED: dict[str, Callable[[], dict[str, str]]] = {  # made when they are sent, because their time counts
    "unsigned": dict,
    "another secret's": lambda: signature(BODY, NEXT_SECRET),
    "another body's": lambda: signature(b"{}", SECRET),
    "too old": lambda: signature(BODY, SECRET, minutes_ago=6),
    "too new": lambda: signature(BODY, SECRET, minutes_ago=-6),
    "no Base64": lambda: {**signature(BODY, SECRET), "webhook_signature": "v1,%%%%"},
    "no time": lambda: {**signature(BODY, SECRET), "webhook_timestamp": "now"},
}


@ON_SQLITE
@SIGNED
@pytest.mark.parametrize("case", REFUSED)
def test_a_badly_signed_delivery_is_401_kept_and_causes_a_read(case: str, web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    answer = post(web, path_of(parts, task), **REFUSED[case]())
    assert (answer.status_code, answer.json()) == (401, {"error": "the signature is missing or wrong"})
    (row,) = callbacks_of(parts)
    assert (row.state, row.due_at, row.body) == (CallbackState.REJECTED, None, BODY)
    found = task_of(parts, task.external_task_id)
    assert (found.state, found.step) == (TaskState.SUBMITTED, Step.READ)
    assert found.due_at is not None and found.due_at <= parts.database.now()


@pytest.mark.databases("sqlite")
@SIGNED
def test_at_most_twenty_refused_deliveries_of_a_task_are_kept(web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    bodies = [json.dumps({"number": number}).encode() for number in range(23)]
    assert {post(web, path_of(parts, task), body).status_code for body in bodies} == {401}
    assert len(callbacks_of(parts)) == callbacks.MAX_REJECTED_PER_TASK == 20
    assert event_names(parts.database, task).count("callback.rejected") == 20


@pytest.mark.databases("sqlite")
@SIGNED
def test_refused_deliveries_beyond_those_kept_cost_neither_a_read_nor_a_write(web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    bodies = [json.dumps({"number": number}).encode() for number in range(40)]
    assert {post(web, path_of(parts, task), body).status_code for body in bodies[:21]} == {401}
    later = datetime.now(UTC) + timedelta(hours=1)
    with parts.database.write() as session:
        session.execute(update(Task).values(due_at=later))
    assert {post(web, path_of(parts, task), body).status_code for body in [*bodies[21:], bodies[0]]} == {401}
    assert task_of(parts, task.external_task_id).due_at == later
    assert len(callbacks_of(parts)) == 20


@contextmanager
def statements(parts: Parts) -> Iterator[list[str]]:
    """The statements meanwhile, without the commits of the event loop."""
    asked: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    engines = [parts.database.writer, *([parts.database.reader] if parts.database.is_sqlite else [])]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    yield asked
    for engine in engines:
        event.remove(engine, "before_cursor_execute", note)


@SIGNED
@pytest.mark.databases("sqlite")
def test_refused_deliveries_beyond_those_kept_reach_no_database(parts: Parts) -> None:
    """Also when they arrive at the same time. After a restart one of them is checked."""
    task = insert_row(parts)

    def refused(web: Web, number: int) -> int:
        return post(web, path_of(parts, task), json.dumps({"number": number}).encode()).status_code

    with Web(parts) as web, ThreadPoolExecutor(30) as senders:
        with statements(parts) as asked:
            assert set(senders.map(lambda number: refused(web, number), range(60))) == {401}
            assert len([each for each in asked if each.startswith("SELECT count(")]) <= 20
            del asked[:]
            assert {refused(web, number) for number in range(100, 110)} == {401} and asked == []
    assert len(callbacks_of(parts)) == 20
    with Web(parts) as web, statements(parts) as asked:
        assert {refused(web, number) for number in range(200, 210)} == {401}
        assert len([each for each in asked if each.startswith("SELECT count(")]) == 1
    assert len(callbacks_of(parts)) == 20


@ON_POSTGRESQL
@SIGNED
def test_a_refused_delivery_that_could_not_be_kept_takes_no_place(web: Web, parts: Parts, postgres: Postgres) -> None:
    task = insert_row(parts)
    postgres.stop()
    try:
        assert {post(web, path_of(parts, task), b"%d" % number).status_code for number in range(21)} == {503}
    finally:
        postgres.start()
    wait_until(lambda: post(web, path_of(parts, task)).status_code == 401)
    assert len(callbacks_of(parts)) == 1


@pytest.fixture
def prompt_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "TARPIT_SECONDS", 0)


@pytest.mark.usefixtures("prompt_refusals")
@pytest.mark.parametrize("limit", ["MAX_ROWS", "MAX_BYTES"])
def test_unmatched_deliveries_have_a_budget_of_their_own(
    limit: str, web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [b'{"task_id": "%d", "task_status": "processing"}' % number for number in range(5)]
    monkeypatch.setattr(account_budget, limit, 2 if limit == "MAX_ROWS" else 2 * len(bodies[0]))
    path = f"/callbacks/kling/{web.account_token}"
    assert [post(web, path, body).status_code for body in bodies] == [200, 200, 429, 429, 429]
    assert post(web, path_of(parts, insert_row(parts)), BODY).status_code == 200, "a task's own URL goes on"
    with parts.database.read() as session:
        assert account_budget.count(session) == (2, len(bodies[0]) * 2)


def about(task: Task, number: int) -> bytes:
    told = {"task_id": "901", "task_status": "succeed", "n": number}
    return json.dumps(told | {"task_info": {"external_task_id": task.external_task_id}}).encode()


@pytest.mark.usefixtures("prompt_refusals")
def test_the_accounts_url_keeps_twenty_deliveries_of_a_task(web: Web, parts: Parts) -> None:
    """Neither the database's size nor a restart of the web server makes room."""
    (task, other), path = [insert_row(parts) for _ in range(2)], f"/callbacks/kling/{web.account_token}"
    codes = [post(web, path, about(task, number)).status_code for number in range(23)]
    assert codes == [200] * 20 + [429] * 3
    answer = post(web, path, about(task, 99))
    assert (answer.headers["retry-after"], "20 deliveries of this task" in answer.json()["error"]) == ("3600", True)
    assert post(web, path, about(task, 0)).status_code == 200, "this one is kept"
    assert post(web, path, about(other, 0)).status_code == 200
    run(parts, "callbacks")
    assert task_of(parts, task.external_task_id).callback_reads <= 20
    with parts.database.read() as session:
        assert account_budget.count_of_task(session, task.id) == 20
    again = account_budget.AccountBudget(parts.database, lambda _: (task.external_task_id, None))
    with pytest.raises(account_budget.AccountFull):
        asyncio.run(again.take(Delivery("kling", "push", None, b"{}")))
    again.close()


@ON_SQLITE
@pytest.mark.usefixtures("prompt_refusals")
def test_delivery_that_the_account_url_refuses_costs_no_session(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session and a thread for each took a millisecond of the interpreter, which acknowledgements waited for."""
    monkeypatch.setattr(account_budget, "MAX_ROWS", 1)
    monkeypatch.setattr(account_budget, "COUNT_SECONDS", 3_600)
    task, path = insert_row(parts), f"/callbacks/kling/{web.account_token}"
    for number in range(account_budget.MAX_OF_TASK):
        assert post(web, path, about(task, number)).status_code == 200
    assert post(web, path, BODY).status_code == 429, "the rows are counted"
    with statements(parts) as asked:
        of_none = [b'{"task_id": "%d", "task_status": "processing"}' % number for number in range(2, 12)]
        of_task = [about(task, number) for number in range(100, 110)]
        assert {post(web, path, body).status_code for body in (*of_none, *of_task, b"[[")} == {429}
        assert asked == []


@ON_SQLITE
def test_refusals_at_the_accounts_url_are_held_back(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight senders that repeat a refused delivery at once took half a processor. Other deliveries do not wait."""
    path, task = f"/callbacks/kling/{web.account_token}", path_of(parts, insert_row(parts))
    monkeypatch.setattr(account_budget, "MAX_ROWS", 0)
    started = time.monotonic()
    assert post(web, path).status_code == 429
    assert time.monotonic() - started > callbacks.TARPIT_SECONDS / 2
    monkeypatch.setattr(callbacks, "TARPIT_SECONDS", 3_600)
    with ExitStack() as opened:
        for _ in range(300):
            opened.enter_context(connected(web, path, "Content-Length: 2")).sendall(b"{}")
        wait_until(lambda: web.requests_under_way == 300)
        assert post(web, task).status_code == 200
    wait_until(lambda: not web.requests_under_way)


def test_deliveries_that_find_no_place_in_the_queue_are_held_back(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were answered 503 at once, which a proxy repeats up to twelve times."""
    monkeypatch.setattr(account_budget, "MAX_WAITING", 0)
    path, started = f"/callbacks/kling/{web.account_token}", time.monotonic()
    answer = post(web, path)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
    assert time.monotonic() - started > callbacks.TARPIT_SECONDS / 2
    assert post(web, path_of(parts, insert_row(parts))).status_code == 200


@ON_SQLITE
def test_a_long_body_beyond_the_budget_is_not_read(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_budget, "SECONDS_A_SECOND", 1e-9)
    monkeypatch.setattr(account_budget, "MOST_SECONDS", 1e-9)
    with Web(parts) as web:
        path = f"/callbacks/kling/{web.account_token}"
        assert post(web, path, b" " * 60_000).status_code == 200
        with connected(web, path, "Content-Length: 60000") as connection:
            assert answer_on(connection)[0] == 429
        assert post(web, path, b"{}").status_code == 200
        monkeypatch.setattr(callbacks, "TARPIT_SECONDS", 3_600)
        with connected(web, path, "Content-Length: 60000") as connection:
            connection.sendall(b" " * 60_000)
            wait_until(lambda: BoundedHttpProtocol._held)
            [protocol] = BoundedHttpProtocol._held
            wait_until(lambda: not protocol._in_body and protocol.cycle.body == b"")


@ON_POSTGRESQL
def test_the_accounts_url_waits_for_no_slow_database_and_delays_no_other(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account_budget, "MAX_WAITING", 3)
    task, path = insert_row(parts), f"/callbacks/kling/{web.account_token}"
    with parts.database.write() as session, ThreadPoolExecutor(12) as senders:
        session.execute(text("LOCK TABLE task IN ACCESS EXCLUSIVE MODE"))
        answers = [senders.submit(post, web, path, about(task, number)) for number in range(12)]
        assert post(web, path_of(parts, task)).status_code == 200
        codes = {each.result().status_code for each in answers}
        assert codes == {429, 503}, "no place in the queue; the database is late, which is our fault"
        session.rollback()
    assert post(web, path, about(task, 0)).status_code == 200


def test_deliveries_of_a_task_at_the_account_are_counted_by_an_index(parts: Parts) -> None:
    task = insert_row(parts)
    deliver(parts, None, {})
    assert not scans(parts.database, lambda session: account_budget.count_of_task(session, task.id))
    assert "callback_at_account" in plans(
        parts.database, lambda session: account_budget.count_of_task(session, task.id)
    )


def test_deliveries_of_nobody_are_counted_by_the_index_that_holds_no_applied_ones(parts: Parts) -> None:
    deliver(parts, None, {})
    assert "callback_of_nobody" in plans(parts.database, account_budget.count)
    rejected = plans(parts.database, lambda session: callbacks.count_rejected(session, None))
    assert "callback_of_nobody" in rejected and "TEMP B-TREE" not in rejected


@pytest.mark.databases("sqlite")
def test_a_delivery_at_the_account_that_is_not_stored_takes_no_place(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, path = insert_row(parts), f"/callbacks/kling/{web.account_token}"
    monkeypatch.setattr(group_commit, "MAX_WAITING", 0)
    assert {post(web, path, about(task, number)).status_code for number in range(21)} == {503}
    monkeypatch.undo()
    assert {post(web, path, about(task, 0)).status_code for _ in range(21)} == {200}
    assert post(web, path, about(task, 1)).status_code == 200


@ON_SQLITE
def test_the_accounts_url_takes_small_bodies_alone(web: Web, parts: Parts) -> None:
    long = b" " * (callbacks.MAX_ACCOUNT_BODY_BYTES + 1)
    assert post(web, f"/callbacks/kling/{web.account_token}", long).status_code == 413
    assert post(web, path_of(parts, insert_row(parts)), long).status_code == 200


@SIGNED
@pytest.mark.databases("sqlite")
def test_refused_and_unstored_deliveries_are_logged_once_a_minute(web: Web, parts: Parts) -> None:
    bodies = [json.dumps({"number": number}).encode() for number in range(23)]
    with structlog.testing.capture_logs() as logs:
        for path in (path_of(parts, insert_row(parts)), f"/callbacks/kling/{web.account_token}"):
            assert {post(web, path, body).status_code for body in bodies} == {401}
    assert [line["log_level"] for line in logs if line["event"] == "callback.refusal_not_stored"] == ["warning"] * 2


@SIGNED
def test_refused_deliveries_to_the_account_are_kept_again_after_newer_ones(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MAX_REJECTED_PER_TASK", 1)
    monkeypatch.setattr(callbacks, "NEWEST", 2)
    monkeypatch.setattr(callbacks, "RECHECK_SECONDS", 0.0)
    path = f"/callbacks/kling/{web.account_token}"
    for number in range(3):
        good, bad = (json.dumps({"number": number, "good": good}).encode() for good in (True, False))
        assert (post(web, path, good, **signature(good, SECRET)).status_code, post(web, path, bad).status_code) == (
            200,
            401,
        )
    assert [row.state for row in callbacks_of(parts)].count(CallbackState.REJECTED) == 2


@SIGNED
def test_the_genuine_delivery_after_a_refused_one_is_applied(web: Web, parts: Parts) -> None:
    task = insert_row(parts)
    assert post(web, path_of(parts, task)).status_code == 401
    assert post(web, path_of(parts, task), **signature(BODY, SECRET)).status_code == 200
    run(parts, "callbacks")
    assert {row.state for row in callbacks_of(parts)} == {CallbackState.REJECTED, CallbackState.APPLIED}
    assert task_of(parts, task.external_task_id).state is TaskState.PROCESSING


@ON_SQLITE
@pytest.mark.parametrize("changes", [{"kling_webhook_secrets": f"{NEXT_SECRET},{SECRET}"}])
@pytest.mark.parametrize("secrets", [[SECRET], [NEXT_SECRET], [SECRET, NEXT_SECRET]])
def test_either_secret_is_accepted_during_a_rotation(secrets: list[str], web: Web, parts: Parts) -> None:
    assert post(web, path_of(parts, insert_row(parts)), **signature(BODY, *secrets)).status_code == 200


@ON_SQLITE
@pytest.mark.parametrize("length", ["1000", "000000000000001000"])
def test_bodies_of_one_url_are_bounded_together(
    length: str, web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are complete or lack a byte, however the length is written. The bodies of other URLs are read."""
    monkeypatch.setattr(callbacks, "MAX_TASK_BYTES", 2_000)
    task, other = insert_row(parts), insert_row(parts)
    with ExitStack() as opened:
        held = [
            opened.enter_context(connected(web, path_of(parts, task), f"Content-Length: {length}")) for _ in range(2)
        ]
        for connection in held:
            connection.sendall(BODY + b" " * 900)
        wait_until(lambda: web.requests_under_way == 2)
        last = BODY + b" " * 900
        wait_until(lambda: post(web, path_of(parts, task), last).status_code == 429)
        answer = post(web, path_of(parts, task), last)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
        assert post(web, path_of(parts, other)).status_code == 200
        for connection in held:
            connection.sendall(b" " * (1_000 - len(last)))
            assert answer_on(connection)[0] == 200
    assert post(web, path_of(parts, task), last).status_code == 200


@ON_SQLITE
def test_a_body_that_came_in_parts_is_in_memory_once_while_it_waits(parts: Parts) -> None:
    """What counts as in hand is then what is in memory."""
    task, inbox = insert_row(parts), group_commit.GroupCommit(parts.database)
    endpoint = callbacks.Callbacks(parts.database, inbox, parts.providers, parts.tokens, parts.schedule)
    params = {"provider": "kling", "token": parts.tokens.sign("kling", task.id)}
    scope = {"type": "http", "method": "POST", "path_params": params, "headers": []}
    sent: list[Message] = []

    async def deliver_in_parts() -> None:
        left = iter(range(15, -1, -1))

        async def receive() -> Message:
            return {"type": "http.request", "body": bytes(2**14), "more_body": next(left) > 0}

        async def send(message: Message) -> None:
            sent.append(message)

        inbox.start()
        with parts.database.write():  # so that none is committed before the end of the block
            tracemalloc.start()
            delivery = asyncio.create_task(endpoint(scope, receive, send))
            while not inbox._waiting:
                await asyncio.sleep(0)
            size = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
        await delivery
        await inbox.stop()
        assert (sent[0]["status"], endpoint._in_hand) == (200, {})
        assert size < 1.5 * callbacks.MAX_BODY_BYTES

    asyncio.run(deliver_in_parts())


@pytest.mark.databases("sqlite")
def test_bodies_beyond_the_memory_of_the_accounts_url_are_held_back_without_theirs(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MAX_ACCOUNT_BYTES", 10)
    monkeypatch.setattr(callbacks, "TARPIT_SECONDS", 3_600)
    path = f"/callbacks/kling/{web.account_token}"
    with (
        connected(web, path, "Content-Length: 2000") as refused,
        connected(web, path, "Transfer-Encoding: chunked") as more,
    ):
        refused.sendall(b" " * 1_000)
        wait_until(lambda: BoundedHttpProtocol._held)
        [protocol] = BoundedHttpProtocol._held
        refused.sendall(b" " * 1_000)
        wait_until(lambda: not protocol._in_body and protocol.cycle.body == b"")
        assert post(web, path, b"{}").status_code == 200
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        more.sendall(chunk)
        wait_until(lambda: len(BoundedHttpProtocol._held) == 2)
        more.sendall(chunk * 3)
        assert answer_on(more)[0] == 429, "one that goes on and on is not read for long"


@pytest.mark.parametrize("url", ["task", "account"])
@pytest.mark.databases("sqlite")
def test_connections_without_a_complete_head_block_no_delivery(
    url: str, web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announced bytes are not in memory. Bytes count from their arrival until their connection ends."""
    monkeypatch.setattr(callbacks, "MAX_TASK_BYTES", 2 * 2_000)
    monkeypatch.setattr(callbacks, "MAX_ACCOUNT_BYTES", 2 * 2_000)
    path = path_of(parts, insert_row(parts)) if url == "task" else f"/callbacks/kling/{web.account_token}"
    with ExitStack() as opened:
        silent = [opened.enter_context(connected(web, path, "Content-Length: 2000")) for _ in range(8)]
        wait_until(lambda: web.requests_under_way == 8)
        assert post(web, path).status_code == 200
        for connection in silent[:4]:
            connection.sendall(b" " * 1_000)
        wait_until(lambda: post(web, path).status_code == 429)
    wait_until(lambda: post(web, path).status_code == 200)


# -- deliveries that cannot be stored -------------------------------------------------------------------------------


def assert_try_again(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.headers["retry-after"]) == (503, str(RETRY_AFTER_SECONDS))
    assert set(answer.json()) == {"error"} and "try again" in answer.json()["error"]
    assert not any(word in answer.text.lower() for word in ("sql", "psycopg", "127.0.0.1", "error:", "/", "table"))


@ON_SQLITE
def test_a_full_inbox_is_503_and_the_receiver_not_ready(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "MAX_WAITING", 0)
    assert_try_again(post(web, path_of(parts, insert_row(parts))))
    assert httpx.get(f"{web.url}/readyz").status_code == 503
    assert callbacks_of(parts) == []


def is_due(parts: Parts, task: Task) -> bool:
    due_at = task_of(parts, task.external_task_id).due_at
    return due_at is not None and due_at <= datetime.now(UTC)


@pytest.mark.databases("sqlite")
def test_a_task_with_too_many_deliveries_is_read_instead(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "COUNT_FROM", 1)
    monkeypatch.setattr(group_commit, "MAX_KEPT_PER_TASK", 2)
    task = insert_row(parts)
    bodies = [b'{"task_id": "901", "task_status": "processing", "n": %d}' % number for number in range(4)]
    answers = [post(web, path_of(parts, task), body).status_code for body in bodies]
    assert answers == [200, 200, 429, 429], "no proxy repeats a 429"
    assert is_due(parts, task)
    assert post(web, path_of(parts, task), bodies[0]).status_code == 200  # known already


def test_a_task_with_too_many_deliveries_that_cannot_be_read_is_503(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "COUNT_FROM", 1)
    monkeypatch.setattr(group_commit, "MAX_KEPT_PER_TASK", 1)
    task = insert_row(parts)
    path = path_of(parts, task)
    assert post(web, path, b'{"task_id": "901", "n": 1}').status_code == 200

    def fail(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailable("database: away")

    with monkeypatch.context() as outage:
        outage.setattr(tasks, "lock", fail)
        assert_try_again(post(web, path, b'{"task_id": "901", "n": 2}'))
    assert post(web, path, b'{"task_id": "901", "n": 2}').status_code == 429
    assert is_due(parts, task)


@ON_POSTGRESQL
def test_delivery_is_answered_503_during_a_database_outage_and_200_later(
    web: Web, parts: Parts, postgres: Postgres
) -> None:
    path = path_of(parts, insert_row(parts))
    postgres.stop()
    try:
        assert_try_again(post(web, path))
        ready = httpx.get(f"{web.url}/readyz", timeout=10)
        assert (ready.status_code, ready.json()) == (503, {"status": "unavailable"})
        assert httpx.get(f"{web.url}/healthz").status_code == 200
    finally:
        postgres.start()
    assert post(web, path).status_code == 200
    assert len(callbacks_of(parts)) == 1


@pytest.mark.databases("sqlite")
def test_the_reads_that_a_full_task_causes_are_bounded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "COUNT_FROM", 1)
    monkeypatch.setattr(group_commit, "MAX_KEPT_PER_TASK", 1)
    monkeypatch.setattr(callbacks, "READ_SOON_SECONDS", 0.0)
    later, reads = datetime.now(UTC) + timedelta(hours=1), 0
    task = insert_row(parts, due_at=later)
    with Web(parts) as web:
        for number in range(25):
            body = b'{"task_id": "901", "task_status": "processing", "n": %d}' % number
            assert post(web, path_of(parts, task), body).status_code == (429 if number else 200)
            reads += task_of(parts, task.external_task_id).due_at != later
            with parts.database.write() as session:
                session.execute(update(Task).values(due_at=later))
    assert reads == 20


@ON_SQLITE
def test_late_commit_is_503_and_the_repeat_is_a_duplicate(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "COMMIT_SECONDS", 0.2)
    path = path_of(parts, insert_row(parts))
    with parts.database.write():
        assert_try_again(post(web, path))
    monkeypatch.undo()
    assert post(web, path).status_code == 200
    assert len(callbacks_of(parts)) == 1


@pytest.mark.databases("sqlite")
def test_bug_is_503_and_reveals_nothing(web: Web, parts: Parts) -> None:
    path = path_of(parts, insert_row(parts))
    with parts.database.write() as session:
        session.execute(text(f"ALTER TABLE {Callback.__tablename__} RENAME TO gone"))
    assert_try_again(post(web, path))


# -- health ---------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_ready_says_ok_with_a_worker_and_degraded_without(web: Web, parts: Parts) -> None:
    ready = httpx.get(f"{web.url}/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "degraded"})
    assert httpx.get(f"{web.url}/readyz?strict=1").status_code == 503
    heartbeats.register(parts.database, 1)
    wait_until(lambda: httpx.get(f"{web.url}/readyz?strict=1").json() == {"status": "ok"})


@pytest.mark.databases("sqlite")
@WATCHED
@pytest.mark.parametrize(("schema", "words"), [("0000", "run `receiver migrate`"), ("9999", "newer than this version")])
def test_a_schema_of_another_version_is_not_ready(web: Web, parts: Parts, schema: str, words: str) -> None:
    with parts.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :schema"), {"schema": schema})
    assert httpx.get(f"{web.url}/readyz").json() == {"status": "unavailable"}
    found = httpx.get(f"{web.url}/readyz", headers={"Authorization": f"Bearer {METRICS_TOKEN}"}).json()
    assert words in found["checks"]["schema"]


@ON_SQLITE
@WATCHED
def test_readiness_details_need_the_token(web: Web) -> None:
    bearer = {"Authorization": f"Bearer {METRICS_TOKEN}"}
    assert "checks" not in httpx.get(f"{web.url}/readyz").json()
    assert httpx.get(f"{web.url}/readyz", headers=bearer).json()["checks"]["database"] == "ok"
    assert httpx.get(f"{web.url}/metrics").status_code == 401
    assert httpx.get(f"{web.url}/metrics", headers={"Authorization": "Bearer other"}).status_code == 401
    metrics = httpx.get(f"{web.url}/metrics", headers=bearer)
    assert metrics.status_code == 200 and "receiver_deliveries" in metrics.text


@ON_SQLITE
def test_without_a_token_configured_there_are_no_metrics(web: Web) -> None:
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer None"}):
        assert httpx.get(f"{web.url}/metrics", headers=headers).status_code == 404


@ON_SQLITE
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/", "/callbacks/kling/x", f"/{uuid.UUID(int=7)}"])
def test_every_answer_has_security_headers_and_no_banner(path: str, web: Web) -> None:
    answer = httpx.get(web.url + path)
    assert "server" not in answer.headers and not answer.is_redirect
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'"
    assert answer.headers["cache-control"] == "no-store"


@ON_SQLITE
def test_deliveries_without_a_body_are_answered_side_by_side(web: Web, parts: Parts) -> None:
    path = path_of(parts, insert_row(parts))
    with ThreadPoolExecutor(3) as senders:
        with parts.database.write():
            answers = [senders.submit(post, web, path, b"") for _ in range(3)]
            wait_until(lambda: web.requests_under_way == 3)
        assert [each.result().status_code for each in answers] == [200] * 3
