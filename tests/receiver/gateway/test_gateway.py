"""The gateway over real sockets: a client changes its base URL and nothing else."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
import tracemalloc
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlmodel import select, update

from receiver.app.wiring import Parts
from receiver.events.http_post import Poster
from receiver.gateway import gateway
from receiver.providers.kling.client import Kling
from receiver.providers.kling.request import parse_request
from receiver.sandbox import Sandbox
from receiver.tasks.create_outcome import CreateOutcome
from receiver.tasks.operate import Operator
from receiver.tasks.task_view import is_over
from storage.accounts.accepted_creates import NEVER_REPORTED
from storage.database import free_space
from storage.errors import FetchRefused
from storage.rows.models import Task
from storage.states import Step, TaskState
from tests.harness import wait_until
from tests.pipeline import Web, insert_row, make_due_now, run, task_of
from tests.postgres import Postgres
from tests.receiver.web.test_callbacks import BODY, answer_on, connected, path_of, post
from tests.rows import LONG_AGO, event_names
from tests.seed_client import EXAMPLE, Failed, SeedClient
from tests.unreported_tasks import creates, drawn, encoded, unanswered
from tests.webhook_receiver import SECRET

KEY, OTHER_KEY = "a-gateway-key-of-more-than-32-characters", "another-gateway-key-of-more-than-32-chars"
CHANGES = {"api_keys": f"{KEY},{OTHER_KEY}"}
ON_SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"])
ON_POSTGRESQL = pytest.mark.parametrize("database_kind", ["postgresql"])
PATH = "/kling/v1/images/omni-image"
PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat"}
ID = "order-4711"
PATIENCE_SECONDS = 120
FULL: dict[str, Any] = {
    "model_name": "kling-v3-omni",
    "prompt": "a boat <<<image_1>>>, no people\nat “dusk” 🌅",
    "image_list": [{"image": "https://p2-fdl.klingai.com/ksc2/z3.png?cacheKey=Ch~_-&x-kcdn-pid=112757&pkey=AA"}],
    "element_list": [{"element_id": 835266081714884677}],
    "resolution": "2k",
    "n": 2,
    "result_type": "series",
    "series_amount": 3,
    "aspect_ratio": "21:9",
    "watermark_info": {"enabled": True},
    "external_task_id": "order/4711 é",
}


@pytest.fixture
def changes() -> dict[str, Any]:
    return dict(CHANGES)


@pytest.fixture
def client(web: Web) -> SeedClient:
    return SeedClient(f"{web.url}/kling", KEY)


def call(web: Web, method: str, path: str = PATH, *, key: str = KEY, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
    return httpx.request(method, web.url + path, headers=headers, timeout=PATIENCE_SECONDS, **options)


def create(web: Web, body: Any = PLAIN, **options: Any) -> httpx.Response:
    return call(web, "POST", json=body, **options)


def status_and_code(answer: httpx.Response) -> tuple[int, int]:
    return answer.status_code, answer.json()["code"]


def rows(parts: Parts) -> list[Task]:
    with parts.database.read() as session:
        return list(session.exec(select(Task)))


# -- keys and paths ---------------------------------------------------------------------------------------------------


@ON_SQLITE
@pytest.mark.parametrize("changes", [{}])
def test_without_keys_there_is_no_gateway(web: Web) -> None:
    for path in (PATH, f"{PATH}/x", "/kling/openapi.json", "/kling/", "/kling"):
        for method in ("GET", "POST"):
            answer = call(web, method, path)
            assert (answer.status_code, answer.json()) == (404, {"error": "not found"})


SHOWN = {
    "": 1001, "Bearer ": 1001, "Bearer " + "x" * 40: 1002, f"Basic {KEY}": 1002, f"Bearer {KEY[:-1]}": 1002,
    f"Bearer {KEY},{OTHER_KEY}": 1002, "Bearer é": 1002,
}  # fmt: skip


@ON_SQLITE
def test_request_without_a_valid_key_is_401_before_its_body_arrives(web: Web, parts: Parts) -> None:
    for shown, code in SHOWN.items():
        header = f"Authorization: {shown}".encode().decode("latin-1")
        with connected(web, PATH, header, "Content-Length: 1000", "Connection: close") as connection:
            status, body = answer_on(connection)
        assert (status, body["code"]) == (401, code), shown
    assert call(web, "GET", "/kling/other", key="wrong").status_code == 401
    assert rows(parts) == []


@ON_SQLITE
def test_every_key_sees_the_same_account(web: Web) -> None:
    task_id = create(web, key=KEY).json()["data"]["task_id"]
    assert call(web, "GET", f"{PATH}/{task_id}", key=OTHER_KEY).status_code == 200


OTHER_CALLS = [
    ("DELETE", PATH), ("PUT", PATH), ("POST", f"{PATH}/x"), ("PUT", f"{PATH}/"), ("POST", "/kling/tasks"),
    ("POST", "/kling/v1/images/generations"), ("GET", "/kling/"), ("GET", "/kling/%0A"),
    ("POST", "/kling/openapi.json"),
]  # fmt: skip


@ON_SQLITE
def test_other_calls_of_kling_are_404_with_its_code(web: Web) -> None:
    for method, path in OTHER_CALLS:
        assert status_and_code(call(web, method, path)) == (404, 1202), (method, path)


# -- requests to the provider -----------------------------------------------------------------------------------------


@ON_SQLITE
def test_every_field_arrives_upstream_as_it_was_sent(client: SeedClient, sandbox: Sandbox) -> None:
    """The same client sends to the provider and to us. The bytes that reached the provider are compared."""
    direct = SeedClient(sandbox.url, sandbox.api_key)
    added = ("callback_url", "external_task_id")  # ours has another callback URL, and an id if none was given
    for fields in (EXAMPLE, FULL, {**PLAIN, "image_list": [], "callback_url": None, "n": None}):
        direct.create(**{**fields, "external_task_id": ""})
        client.create(**fields)
        theirs, ours = (json.loads(made.raw) for made in sandbox.ledger().creates[-2:])
        wanted = {name: value for name, value in theirs.items() if value not in ("", [], None)}
        assert {name: value for name, value in ours.items() if name not in added} == wanted
        assert ours["external_task_id"] == fields.get("external_task_id") or not fields.get("external_task_id")
    assert b'"element_id": 835266081714884677' in sandbox.ledger().creates[1].raw


@ON_SQLITE
@pytest.mark.parametrize("changes", [{**CHANGES, "private_callback_hosts": "127.0.0.1:9"}])
def test_clients_callback_url_is_not_sent_upstream(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    url = "http://127.0.0.1:9/mine?secret=1"
    create(web, {**PLAIN, "callback_url": url})
    (task,) = rows(parts)
    assert task.client_callback_url == url
    assert url not in repr(task)
    assert creates(sandbox)[0]["callback_url"] == task.callback_url
    assert b"secret=1" not in sandbox.ledger().creates[0].raw


SINK = {"event_sinks": "http://127.0.0.1:9/hook", "event_secrets": SECRET, "private_event_hosts": "127.0.0.1:9"}


@ON_SQLITE
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**CHANGES, "private_event_hosts": "127.0.0.1:9"}, "not on RECEIVER_PRIVATE_CALLBACK_HOSTS"),
        ({**CHANGES, **SINK, "private_callback_hosts": "127.0.0.1:9"}, "receives events"),
    ],
)
def test_a_client_is_not_called_back_at_an_event_sink(reason: str, web: Web, parts: Parts) -> None:
    answer = create(web, {**PLAIN, "callback_url": "http://127.0.0.1:9/hook"})
    assert status_and_code(answer) == (400, 1201)
    assert reason in answer.json()["message"]
    with pytest.raises(FetchRefused, match=re.escape(reason)):
        Poster(parts.settings.callback_policy, connections=1).post("http://127.0.0.1:9/hook", b"", {})


@ON_SQLITE
def test_base64_is_sent_and_kept_as_its_hash(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    picture = encoded(drawn(400, 300))
    assert create(web, {**PLAIN, "image_list": [{"image": f"data:image/png;base64,{picture}"}]}).status_code == 200
    assert creates(sandbox)[0]["image_list"] == [{"image": picture}]
    assert picture not in json.dumps(rows(parts)[0].request)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_create_is_answered_as_kling_does_with_our_own_id(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    body = create(web, {**PLAIN, "external_task_id": ID}).json()
    task, data = task_of(parts, ID), body["data"]
    assert (body["code"], body["message"], set(body)) == (0, "SUCCEED", {"code", "message", "request_id", "data"})
    assert (data["task_id"], data["task_status"]) == (str(task.id), "submitted")
    assert data["task_info"] == {"external_task_id": ID}
    assert data["created_at"] == data["updated_at"] == round(task.created_at.timestamp() * 1000)
    assert data["receiver"]["provider_task_id"] == sandbox.ledger().task(ID).task_id != data["task_id"]


@ON_SQLITE
def test_an_id_that_the_client_did_not_give_is_not_shown(web: Web, sandbox: Sandbox) -> None:
    data = create(web).json()["data"]
    assert data["task_info"] == {}
    assert creates(sandbox)[0]["external_task_id"] == data["task_id"]


INVALID = {
    "prompt": {"model_name": "kling-image-o1", "prompt": ""}, "n": {**PLAIN, "n": 10},
    "model_name": {**PLAIN, "model_name": [1]},
    "aspect_ratio": {**PLAIN, "aspect_ratio": "5:4"}, "colour": {**PLAIN, "colour": "red"},
    "external_task_id": {**PLAIN, "external_task_id": "é" * 100},
    "image_list": {**PLAIN, "image_list": [{"image": ""}]},
    "callback_url": {**PLAIN, "callback_url": "http://10.0.0.1/hidden-path"},
}  # fmt: skip
NO_OBJECTS = (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5_000 + b"}")


@ON_SQLITE
def test_a_fault_is_1201_and_names_the_field(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    for field, body in INVALID.items():
        answer = create(web, body)
        assert status_and_code(answer) == (400, 1201)
        assert field in answer.json()["message"]
        assert "hidden-path" not in answer.text
    for raw in NO_OBJECTS:
        assert status_and_code(call(web, "POST", content=raw)) == (400, 1200), raw[:20]
    assert (rows(parts), creates(sandbox)) == ([], [])


@ON_SQLITE
def test_an_id_with_a_control_character_is_refused(web: Web, parts: Parts) -> None:
    answer = create(web, {**PLAIN, "external_task_id": "a\x1b]0;owned\x07"})
    assert status_and_code(answer) == (400, 1201) and "control character" in answer.json()["message"]
    assert rows(parts) == []


REFUSALS = {"1203": 404, "1301": 400, "1302": 429, "1303": 429}


def test_a_refusal_passes_through_and_ends_the_row(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=list(REFUSALS))
    for code, status in REFUSALS.items():
        answer = create(web, {**PLAIN, "external_task_id": code})
        assert status_and_code(answer) == (status, int(code))
        assert answer.json()["receiver"] == {"refused_by": "provider"}
        task = task_of(parts, code)
        assert (task.state, task.due_at, task.lease) == (TaskState.FAILED, None, None)
    assert run(parts, "creates") == 0
    assert len(creates(sandbox)) == len(REFUSALS)


def test_a_dismissed_id_that_is_asked_for_again_is_not_over(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1303"])
    create(web, {**PLAIN, "external_task_id": ID})
    Operator(parts.database, parts.providers, parts.schedule).dismiss(ID, "not needed")
    create(web, {**PLAIN, "external_task_id": ID})
    assert not is_over(task_of(parts, ID))


def test_a_refused_id_is_free_as_it_is_at_kling(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1303"])
    assert create(web, {**PLAIN, "external_task_id": ID}).status_code == 429
    again = create(web, {**PLAIN, "prompt": "a ship", "external_task_id": ID})
    assert (again.status_code, task_of(parts, ID).provider_task_id is None) == (200, False)
    assert [body["prompt"] for body in creates(sandbox)] == ["a boat", "a ship"]
    assert len(rows(parts)) == 1
    assert event_names(parts.database, task_of(parts, ID))[2] == "task.created"


@ON_SQLITE
def test_an_accepted_id_that_was_never_reported_is_not_sent_again(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    create(web, {**PLAIN, "external_task_id": ID})
    silent = {"state": TaskState.FAILED, "error": NEVER_REPORTED, "provider_task_id": None, "step": None}
    with parts.database.write() as session:
        session.execute(update(Task).values(**silent, due_at=None))
    assert status_and_code(create(web, {**PLAIN, "external_task_id": ID})) == (400, 1201)
    assert (task_of(parts, ID).error, len(creates(sandbox))) == (NEVER_REPORTED, 1)


@ON_SQLITE
def test_an_id_dismissed_before_it_was_known_whether_it_arrived_is_not_sent_again(
    web: Web, parts: Parts, sandbox: Sandbox
) -> None:
    """The provider does not enforce ids, so it would make and charge a second task."""
    sandbox.set(external_ids=False, create_faults=["5000:created"])
    create(web, {**PLAIN, "external_task_id": ID})
    Operator(parts.database, parts.providers, parts.schedule).dismiss(ID, "not needed")
    again = create(web, {**PLAIN, "prompt": "a ship", "external_task_id": ID})
    assert (status_and_code(again), len(creates(sandbox))) == ((400, 1201), 1)


@pytest.mark.databases("sqlite")
def test_an_unclear_outcome_is_200_and_resolved_from_the_row(
    web: Web, client: SeedClient, parts: Parts, sandbox: Sandbox
) -> None:
    faults = ["5000:created", "5002:created", "broken:created", "5001", "html"]
    sandbox.set(create_faults=faults, submitted_seconds=600)
    for fault in faults:
        made = client.create(**PLAIN, external_task_id=fault)
        assert (made["task_status"], made["receiver"]["provider_task_id"]) == ("submitted", None)
        assert client.task(fault)["task_status"] == "submitted"
    make_due_now(parts, Task)
    wait_until(lambda: run(parts, "creates") + 1 and all(is_accepted(client, fault) for fault in faults[:3]))
    sent = [body["external_task_id"] for body in creates(sandbox)]
    assert [sent.count(fault) for fault in faults[:3]] == [1, 1, 1]


def is_accepted(client: SeedClient, name: str) -> bool:
    return client.task(name)["receiver"]["provider_task_id"] is not None


@ON_SQLITE
def test_a_provider_that_is_away_leaves_the_row_to_the_workers(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.stop()
    assert status_and_code(create(web, {**PLAIN, "external_task_id": ID})) == (200, 0)
    sandbox.start()
    assert task_of(parts, ID).state is TaskState.CREATED
    wait_until(lambda: run(parts, "creates"))
    assert task_of(parts, ID).state is TaskState.SUBMITTED


@ON_SQLITE
def test_an_id_used_before_already_exists(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    body = {**PLAIN, "external_task_id": ID}
    assert create(web, body).status_code == 200
    for again in (body, {**body, "n": 2}):
        answer = create(web, again)
        assert status_and_code(answer) == (400, 1201)
        assert answer.json()["message"] == f"External_task_id {ID} already exists"
    assert len(creates(sandbox)) == 1


@ON_SQLITE
def test_an_id_that_exists_at_the_provider_alone_already_exists(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    theirs = parts.kling.create(PLAIN, external_task_id=ID, callback_url=None)
    sandbox.world.tasks[theirs.report.provider_task_id].created_ms -= 3_600_000
    answer = create(web, {**PLAIN, "external_task_id": ID})
    assert status_and_code(answer) == (400, 1201)
    assert "already exists" in answer.json()["message"]
    assert task_of(parts, ID).state is TaskState.FAILED


@ON_SQLITE
@pytest.mark.parametrize("changes", [{**CHANGES, "kling_slots": 2}])
def test_create_without_free_slots_is_answered_1303_and_leaves_no_row(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(submitted_seconds=600)
    assert create(web, {**PLAIN, "n": 2, "external_task_id": ID}).status_code == 200
    for body in (PLAIN, {**PLAIN, "external_task_id": "new"}):
        assert status_and_code(create(web, body, headers={"Idempotency-Key": "k"})) == (429, 1303)
    assert status_and_code(create(web, {**PLAIN, "external_task_id": ID})) == (400, 1201)
    assert len(rows(parts)) == len(creates(sandbox)) == 1


@ON_SQLITE
@pytest.mark.parametrize("changes", [{**CHANGES, "kling_slots": 1}])
def test_a_refused_id_is_not_sent_again_without_free_slots(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(submitted_seconds=600, create_faults=["1303"])
    assert create(web, {**PLAIN, "external_task_id": ID}).status_code == 429
    assert create(web, {**PLAIN, "external_task_id": "holds the slot"}).status_code == 200
    assert status_and_code(create(web, {**PLAIN, "external_task_id": ID})) == (429, 1303)
    assert [body["external_task_id"] for body in creates(sandbox)] == [ID, "holds the slot"]


@ON_SQLITE
def test_a_create_whose_callback_has_no_room_is_answered_503_and_leaves_no_row(
    web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.set(submitted_seconds=600, create_faults=["1302"])
    assert create(web, {**PLAIN, "external_task_id": "refused"}).status_code == 429
    body, word = {**PLAIN, "external_task_id": ID}, {"Idempotency-Key": "k"}
    first = create(web, body, headers=word)
    with monkeypatch.context() as patch:
        patch.setattr(free_space, "MIN_FREE_SHARE", 2.0)
        for name in ("new", "refused"):  # a refused id is free again
            answer = create(web, {**PLAIN, "external_task_id": name}, headers={"Idempotency-Key": name})
            assert (status_and_code(answer), answer.headers["Retry-After"]) == ((503, 5001), "5")
            assert "the disk of the database has" in answer.json()["message"]
        assert create(web, body, headers=word).json() == first.json()
    assert (len(rows(parts)), len(creates(sandbox))) == (2, 2)
    for name in ("new", "refused"):
        again = create(web, {**PLAIN, "external_task_id": name}, headers={"Idempotency-Key": name})
        assert status_and_code(again) == (200, 0)


# -- a slow provider, many clients ------------------------------------------------------------------------------------


@ON_SQLITE
def test_a_client_whose_create_takes_too_long_is_answered_submitted(
    web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "PROVIDER_SECONDS", 0.2)
    with unanswered(sandbox):
        assert status_and_code(create(web, {**PLAIN, "external_task_id": ID})) == (200, 0)
        assert task_of(parts, ID).state is TaskState.CREATED
    wait_until(lambda: task_of(parts, ID).state is TaskState.SUBMITTED)
    assert len(creates(sandbox)) == 1


@pytest.mark.parametrize("code", ["1303", "1301"])
def test_refusal_after_the_client_left_only_changes_the_row(code: str, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=[code])
    task = parts.submitter.row(parse_request(PLAIN), ID)
    task.client_callback_url = "https://client.example/"
    with parts.database.write() as session:
        assert parts.submitter.insert(session, task)
    outcome_listener = CreateOutcome()
    outcome_listener.leave()
    parts.submitter.create_step.send(task, outcome_listener)
    row = task_of(parts, ID)
    assert (row.state is TaskState.CREATED and row.step is Step.CREATE) == (code == "1303")
    assert row.client_callback_url == "https://client.example/"
    assert outcome_listener.refusal is None


def test_a_refusal_is_not_sent_when_another_worker_owns_the_row(parts: Parts, sandbox: Sandbox) -> None:
    """The id exists already. While that task is read, another worker gets the row."""
    theirs = parts.kling.create(PLAIN, external_task_id=ID, callback_url=None)
    sandbox.world.tasks[theirs.report.provider_task_id].created_ms -= 3_600_000
    sandbox.set(query_faults=["hang"], hang_seconds=1)
    task = parts.submitter.row(parse_request(PLAIN), ID)
    with parts.database.write() as session:
        assert parts.submitter.insert(session, task)
    outcome_listener = CreateOutcome()
    sending = threading.Thread(target=parts.submitter.create_step.send, args=(task, outcome_listener))
    sending.start()
    wait_until(lambda: sandbox.ledger().counts["query"])
    with parts.database.write() as session:
        session.execute(update(Task).values(lease=uuid.uuid4()))
    sending.join()
    assert (outcome_listener.refusal, task_of(parts, ID).state) == (None, TaskState.CREATED)


@pytest.fixture
def patient(parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting clients wait longer than any test."""
    kling = Kling(base_url=sandbox.url, api_key=parts.settings.kling_api_key, timeout_seconds=PATIENCE_SECONDS)
    parts.__dict__["kling"] = kling  # the place of the cached property
    monkeypatch.setattr(gateway, "PROVIDER_SECONDS", PATIENCE_SECONDS)


@ON_SQLITE
@pytest.mark.usefixtures("patient")
def test_creates_that_wait_hold_up_no_callback_and_no_query(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["hang:created"] * 40, hang_seconds=PATIENCE_SECONDS)
    task = insert_row(parts)
    with ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(create, web) for _ in range(40)]
        wait_until(lambda: len(creates(sandbox)) == 40, seconds=PATIENCE_SECONDS / 2)
        answers = [post(web, path_of(parts, task), BODY + b" " * count).status_code for count in range(5)]
        found = call(web, "GET", f"{PATH}/{task.id}").status_code
        assert not any(each.done() for each in waiting)
        assert (set(answers), found) == ({200}, 200)
        sandbox.stop()  # cuts the connections, so that all outcomes are unclear
        assert {status_and_code(each.result()) for each in waiting} == {(200, 0)}


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_one_clients_queries_leave_threads_to_others(web: Web, parts: Parts) -> None:
    """The lock represents slow list queries."""
    insert_row(parts)
    with ThreadPoolExecutor(12) as pool, parts.database.write() as session:
        session.execute(text("LOCK TABLE asset IN ACCESS EXCLUSIVE MODE"))
        lists = [pool.submit(call, web, "GET", PATH) for _ in range(12)]
        wait_until(lambda: web.requests_under_way == 12)
        started = time.monotonic()
        unknown = call(web, "GET", f"{PATH}/{uuid.uuid4()}", key=OTHER_KEY)
        assert (unknown.json()["code"], time.monotonic() - started < 5) == (1201, True)
        assert not any(each.done() for each in lists)
        session.rollback()
        assert {each.result().status_code for each in lists} == {200}


@ON_SQLITE
def test_more_creates_than_threads_are_answered_429(
    web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MAX_CREATES", 1)
    first = threading.Thread(target=create, args=(web,))
    with unanswered(sandbox):
        first.start()
        wait_until(lambda: creates(sandbox))
        answer = create(web)
    first.join()
    assert (status_and_code(answer), answer.headers["retry-after"]) == ((429, 1302), "1")
    assert status_and_code(create(web)) == (200, 0)


@ON_SQLITE
def test_unfinished_bodies_take_no_place_of_a_create(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_CREATES", 2)
    with ExitStack() as opened:
        for _ in range(4):
            connection = opened.enter_context(connected(web, PATH, *head("Content-Length: 100")))
            connection.sendall(b"{")
        wait_until(lambda: web.requests_under_way == 4)
        assert [status_and_code(create(web, key=key)) for key in (KEY, OTHER_KEY)] == [(200, 0)] * 2


@ON_SQLITE
def test_one_client_leaves_a_place_to_others(
    web: Web, parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MAX_CREATES", 3)
    with ThreadPoolExecutor(3) as pool:
        with unanswered(sandbox):
            waiting = [pool.submit(create, web) for _ in range(2)]
            wait_until(lambda: len(rows(parts)) == 2)
            assert status_and_code(create(web)) == (429, 1302)
            waiting.append(pool.submit(create, web, key=OTHER_KEY))
            wait_until(lambda: len(rows(parts)) == 3)
        assert {status_and_code(each.result()) for each in waiting} == {(200, 0)}


@ON_SQLITE
def test_one_clients_bodies_leave_room_to_others(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_BODIES_BYTES", 80_000)
    with connected(web, PATH, *head("Transfer-Encoding: chunked")) as connection:
        connection.sendall(b"EA60\r\n" + b" " * 60_000 + b"\r\n1\r\nx\r\n")  # and no end
        status, body = answer_on(connection)
        assert (status, body["code"]) == (429, 1302)


@ON_POSTGRESQL
def test_request_during_a_database_outage_is_answered_5001(
    web: Web, parts: Parts, sandbox: Sandbox, postgres: Postgres
) -> None:
    postgres.stop()
    try:
        for answer in (create(web), call(web, "GET"), call(web, "GET", f"{PATH}/x")):
            assert status_and_code(answer) == (503, 5001)
            assert answer.headers["retry-after"] == "5"
    finally:
        postgres.start()
    assert creates(sandbox) == []


# -- bounds of bodies -------------------------------------------------------------------------------------------------


def head(*lines: str) -> tuple[str, ...]:
    return (f"Authorization: Bearer {KEY}", *lines)


@ON_SQLITE
def test_a_body_declared_too_long_is_413_before_it_is_sent(web: Web) -> None:
    length = f"Content-Length: {gateway.MAX_BODY_BYTES + 1}"
    with connected(web, PATH, *head(length, "Connection: close")) as connection:
        status, body = answer_on(connection)
    assert (status, body["code"]) == (413, 1201)


@ON_SQLITE
@pytest.mark.parametrize(("bound", "answered"), [("MAX_BODY_BYTES", (413, 1201)), ("MAX_BODIES_BYTES", (429, 1302))])
def test_a_chunked_body_is_refused_once_it_is_too_much(
    bound: str, answered: tuple[int, int], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, bound, 65_536)
    with connected(web, PATH, *head("Transfer-Encoding: chunked")) as connection:
        connection.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n1\r\nx\r\n")  # and no end
        status, body = answer_on(connection)
    assert (status, body["code"]) == answered
    assert status_and_code(create(web)) == (200, 0)  # the taken place is free again


@ON_SQLITE
def test_a_body_that_does_not_come_is_408(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "BODY_SECONDS", 0.2)
    with connected(web, PATH, *head("Content-Length: 100")) as connection:
        connection.sendall(b'{"prompt"')
        status, body = answer_on(connection)
    assert (status, body["code"], rows(parts)) == (408, 1200, [])


@ON_SQLITE
def test_memory_of_a_refused_body_is_freed_at_once(web: Web) -> None:
    """A traceback held it until the next full garbage collection, which a frozen heap makes rare."""
    body = b'{"prompt": "' + b"a" * 8 * 2**20 + b'",}'
    gc.disable()
    tracemalloc.start()
    try:
        with connected(web, PATH, *head(f"Content-Length: {len(body)}", "Connection: close")) as connection:
            connection.sendall(body)
            status, answer = answer_on(connection)
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < len(body) / 2, seconds=5)
    finally:
        tracemalloc.stop()
        gc.enable()
    assert (status, answer["code"]) == (400, 1200)


NESTED = b'{"prompt": [' + b"[[],[]]," * 9_000


@ON_SQLITE
def test_a_nested_body_is_refused_before_the_rest_is_sent(web: Web, parts: Parts) -> None:
    with connected(web, PATH, *head("Content-Length: 10000000")) as connection:
        connection.sendall(NESTED)  # and no more
        status, body = answer_on(connection)
        assert connection.recv(1) == b""  # nobody reads the rest
    assert (status, body["code"], rows(parts)) == (400, 1200, [])


@ON_SQLITE
def test_a_large_body_is_refused_late_and_a_small_one_at_once(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the server ends, here. Meanwhile the client has a bounded number of them."""
    monkeypatch.setattr(gateway, "REFUSAL_SECONDS", 600)
    monkeypatch.setattr(gateway, "CLIENT_LATE_REFUSALS", 2)
    lines = head("Content-Length: 10000000")
    with connected(web, PATH, *lines) as first, connected(web, PATH, *lines) as second:
        first.sendall(NESTED)
        assert status_and_code(create(web, [[]])) == (400, 1200)
        second.sendall(NESTED)
        wait_until(lambda: status_and_code(create(web)) == (429, 1302))
        assert status_and_code(create(web, key=OTHER_KEY)) == (200, 0)
        for connection in (first, second):
            connection.settimeout(0.1)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(PATIENCE_SECONDS)
        web.stop_listening()
        assert [answer_on(connection)[0] for connection in (first, second)] == [400, 400]


@ON_SQLITE
def test_a_late_refusal_keeps_nothing_of_the_body(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "REFUSAL_SECONDS", 600)
    body = json.dumps({"model_name": "other", "prompt": "x" * 8 * 2**20, "n": "no number"}).encode()
    gc.disable()
    tracemalloc.start()
    try:
        with connected(web, PATH, *head(f"Content-Length: {len(body)}")) as connection:
            connection.sendall(body)
            wait_until(lambda: tracemalloc.get_traced_memory()[1] > len(body), seconds=5)
            wait_until(lambda: tracemalloc.get_traced_memory()[0] < len(body) / 2, seconds=5)
            assert web.requests_under_way == 1
            web.stop_listening()
            assert answer_on(connection)[0] == 400
    finally:
        tracemalloc.stop()
        gc.enable()


# -- queries ----------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_an_unknown_task_is_1201_in_klings_format(web: Web) -> None:
    for name in ("42", "a%2Fb", "%00", "%0A", "%ED%A0%80", "..%2F..", "x" * 1_000):
        answer = call(web, "GET", f"{PATH}/{name}")
        assert status_and_code(answer) == (400, 1201), name
        assert answer.json()["message"].startswith("Task not found by id/external id: ")


def test_a_task_is_found_by_our_id_and_by_the_clients_never_by_the_providers(
    client: SeedClient, web: Web, sandbox: Sandbox
) -> None:
    made = client.create(**FULL)
    assert client.task(made["task_id"])["task_info"] == {"external_task_id": "order/4711 é"}
    assert client.task("order%2F4711%20%C3%A9")["task_id"] == made["task_id"]
    for unknown in (made["receiver"]["provider_task_id"], made["task_id"].upper(), made["task_id"].replace("-", "")):
        with pytest.raises(Failed, match="Task not found"):
            client.task(unknown)
    assert sandbox.ledger().counts["query"] == 0


def test_the_list_is_newest_first(web: Web, parts: Parts) -> None:
    made = [create(web).json()["data"]["task_id"] for _ in range(3)]
    insert_row(parts, created_at=LONG_AGO)

    def page(**params: int) -> list[str]:
        return [task["task_id"] for task in call(web, "GET", params=params).json()["data"]]

    assert page()[:3] == made[::-1]
    assert (len(page()), page(pageSize=2), page(pageNum=2, pageSize=2)[0]) == (4, made[:0:-1], made[0])
    assert page(pageNum=1_000, pageSize=500) == []


@ON_SQLITE
def test_a_page_that_does_not_exist_is_1201(web: Web) -> None:
    for query in ("pageNum=0", "pageNum=1001", "pageSize=501", "pageSize=-1", "pageSize=x", "pageNum=1.5"):
        answer = call(web, "GET", f"{PATH}?{query}")
        assert status_and_code(answer) == (400, 1201)
        assert query.partition("=")[0] in answer.json()["message"]
