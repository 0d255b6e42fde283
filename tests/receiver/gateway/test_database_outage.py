"""A create whose row is committed is never answered 5xx: its client would send it again, and pay twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.gateway import creates as gateway_creates
from receiver.gateway.creates import Creates, DuplicateWait
from receiver.sandbox import Sandbox
from receiver.tasks.create_outcome import CreateOutcome
from storage.errors import DatabaseUnavailable, ProviderRejected
from storage.states import TaskState
from tests.harness import wait_until
from tests.pipeline import Web, make_due_now, run, task_of
from tests.postgres import Postgres, demoted_in_use
from tests.receiver.gateway.test_gateway import CHANGES, ID, ON_POSTGRESQL, PLAIN, create, status_and_code
from tests.rows import wait_until_blocked
from tests.unreported_tasks import creates

WORD = {"Idempotency-Key": "try-1"}
BODY = {**PLAIN, "external_task_id": ID}


@pytest.fixture
def changes() -> dict[str, Any]:
    return dict(CHANGES)


@pytest.fixture(autouse=True)
def slow_tasks(sandbox: Sandbox) -> None:
    sandbox.set(submitted_seconds=600)


@pytest.fixture
def mortal(postgres: Postgres) -> Iterator[Postgres]:
    """A server that the test stops, and that is restarted for the next test in any case."""
    yield postgres
    if postgres.process is None:
        postgres.start()


@contextmanager
def settles_held_up(parts: Parts) -> Iterator[None]:
    """During the block rows are committed and requests are sent, but no answer can be stored."""
    with suppress(DatabaseUnavailable), parts.database.write() as session:
        session.execute(text("LOCK TABLE asset IN ACCESS EXCLUSIVE MODE"))
        yield


@ON_POSTGRESQL
@pytest.mark.parametrize("fault", ["", "1301", "1302"])
def test_database_outage_during_the_providers_answer_is_not_a_5xx(
    fault: str, web: Web, parts: Parts, sandbox: Sandbox, mortal: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_creates, "UNDER_WAY_SECONDS", 0.5)  # the longest wait of the duplicate
    sandbox.set(create_faults=[fault] if fault else [])
    with ThreadPoolExecutor(1) as pool:
        with settles_held_up(parts):
            asking = pool.submit(create, web, BODY, headers=WORD)
            wait_until(lambda: creates(sandbox))
            wait_until_blocked(parts.database, asking)
            mortal.stop()
        answer = asking.result()
    mortal.start()
    assert (status_and_code(answer), answer.json()["data"]["task_status"]) == ((200, 0), "submitted")
    assert answer.json()["data"]["task_id"] == str(task_of(parts, ID).id)
    again = create(web, BODY, headers=WORD)
    assert (status_and_code(again), again.json()["data"]["task_id"]) == ((200, 0), answer.json()["data"]["task_id"])
    assert len(creates(sandbox)) == 1


@ON_POSTGRESQL
def test_create_continues_when_the_database_is_back(web: Web, parts: Parts, sandbox: Sandbox, mortal: Postgres) -> None:
    with ThreadPoolExecutor(1) as pool:
        with settles_held_up(parts):
            asking = pool.submit(create, web, BODY)
            wait_until(lambda: creates(sandbox))
            wait_until_blocked(parts.database, asking)
            mortal.stop()
        assert status_and_code(asking.result()) == (200, 0)
    mortal.start()
    make_due_now(parts)
    assert run(parts, "creates") == 1
    assert (task_of(parts, ID).state, len(creates(sandbox))) == (TaskState.SUBMITTED, 1)


@ON_POSTGRESQL
@pytest.mark.parametrize("refused", [False, True])
def test_database_outage_before_the_answer_is_stored_is_not_a_5xx(
    refused: bool, parts: Parts, sandbox: Sandbox, mortal: Postgres
) -> None:
    sandbox.set(create_faults=["1301"] if refused else [])
    made = Creates(parts.database, parts.submitter, parts.response_format, parts.settings.callback_policy)
    call, outcome_listener = made.read(json.dumps(BODY).encode(), "client", "try-1"), CreateOutcome()
    begun = made.begin(call)
    made.send(begun, outcome_listener)
    mortal.stop()
    reply = made.conclude(call, begun, outcome_listener.refusal, "request")
    mortal.start()
    assert isinstance(outcome_listener.refusal, ProviderRejected) == refused
    assert (reply.http_status, reply.body["code"]) == ((400, 1301) if refused else (200, 0))
    duplicate_wait, much_later = DuplicateWait(0), 60.0
    assert made.replay(call, begun, "later", duplicate_wait, now=0) is None
    told_later = made.replay(call, begun, "later", duplicate_wait, now=much_later)
    assert told_later is not None
    assert told_later.body["data"]["task_id"] == str(begun.task.id)


def test_bug_after_the_commit_is_not_a_5xx(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    with parts.database.write() as session:
        session.execute(text("ALTER TABLE asset RENAME TO gone"))  # a statement of the settle
    answer = create(web, BODY, headers=WORD)
    assert (status_and_code(answer), answer.json()["data"]["task_status"]) == ((200, 0), "submitted")
    assert len(creates(sandbox)) == 1


@ON_POSTGRESQL
def test_a_create_on_a_read_only_database_is_answered_with_retry_after(
    web: Web, parts: Parts, sandbox: Sandbox, postgres: Postgres
) -> None:
    name = str(parts.database.url.database)
    with capture_logs() as logs, postgres.read_only(name):
        postgres.end_sessions(name)
        answer = create(web, BODY, headers=WORD)
        assert (status_and_code(answer), answer.headers["Retry-After"]) == ((503, 5001), "5")
        assert status_and_code(create(web, BODY, headers=WORD)) == (503, 5001)
    assert [line["event"] for line in logs] == ["database.lost"]
    wait_until(lambda: status_and_code(create(web, BODY, headers=WORD)) == (200, 0))
    assert len(creates(sandbox)) == 1


@ON_POSTGRESQL
def test_a_create_whose_session_turns_read_only_is_done_on_a_new_one(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    with demoted_in_use(parts.database, "task"), capture_logs() as logs:
        assert status_and_code(create(web, BODY, headers=WORD)) == (200, 0)
    with demoted_in_use(parts.database, "task"):
        assert parts.submitter.submit(PLAIN, external_task_id="own").new
    assert not any(line["event"] == "database.lost" for line in logs)
    assert len(creates(sandbox)) == 2
