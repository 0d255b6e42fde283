"""SIGTERM while the provider is slow: waiting clients are answered, and a worker continues the row."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from storage.states import TaskState
from tests.harness import wait_until
from tests.pipeline import Web, free_port, make_due_now, run, task_of
from tests.receiver.app.test_shutdown import EXIT_SECONDS, leases, serving
from tests.receiver.app.test_shutdown import settings as settings  # a fixture
from tests.receiver.gateway.test_gateway import CHANGES, ID, KEY, ON_SQLITE, PATH, PLAIN, create, status_and_code
from tests.receiver.gateway.test_idempotency import keys
from tests.unreported_tasks import creates

BODY = {**PLAIN, "external_task_id": ID}
WORD = {"Idempotency-Key": "try-1"}


@pytest.fixture
def changes() -> dict[str, Any]:
    return dict(CHANGES)


@pytest.fixture(autouse=True)
def slow_provider(sandbox: Sandbox, parts: Parts) -> Iterator[None]:
    """Answers no create until it is stopped. That cuts the connections, so the outcome is unclear."""
    # Sends no callback either, because one that is applied before the stop makes the task `submitted` without the
    # create's answer.
    sandbox.set(create_faults=["hang:created"], hang_seconds=600, submitted_seconds=600, callback_drop_rate=1)
    yield
    sandbox.stop()
    wait_until(lambda: task_of(parts, ID).lease is None)


def test_waiting_creates_are_answered_submitted_and_continue(parts: Parts, sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(1) as pool, Web(parts) as web:
        waiting = pool.submit(create, web, BODY, headers=WORD)
        wait_until(lambda: creates(sandbox))
        web.stop_listening()
        answer = waiting.result()
        assert (status_and_code(answer), answer.json()["data"]["task_status"]) == ((200, 0), "submitted")
        assert [kept.answer for kept in keys(parts)] == [answer.json()]
        assert task_of(parts, ID).state is TaskState.CREATED
    sandbox.stop()
    wait_until(lambda: task_of(parts, ID).lease is None)
    sandbox.start()
    make_due_now(parts)
    run(parts, "creates")
    assert (task_of(parts, ID).state, len(creates(sandbox))) == (TaskState.SUBMITTED, 1)


@ON_SQLITE
def test_sigterm_ends_no_create(settings: dict[str, str], parts: Parts, sandbox: Sandbox, tmp_path: Path) -> None:
    """The whole process: the client is answered before the provider, whose answer is stored before the process ends."""
    sandbox.set(hang_seconds=8)  # well beyond what the start of the stop takes on a loaded machine; 5 was too short
    body, headers = {**PLAIN, "external_task_id": ID}, {"Authorization": f"Bearer {KEY}"}
    with ThreadPoolExecutor(1) as pool, serving({**settings, "RECEIVER_API_KEYS": KEY}, tmp_path) as process:
        url = settings["RECEIVER_PUBLIC_URL"] + PATH
        asking = pool.submit(httpx.post, url, json=body, headers=headers, timeout=30, trust_env=False)
        wait_until(lambda: creates(sandbox))
        process.send_signal(signal.SIGTERM)
        assert status_and_code(asking.result()) == (200, 0)
        assert task_of(parts, ID).state is TaskState.CREATED
        assert process.wait(EXIT_SECONDS) == 0
    assert (task_of(parts, ID).state, leases(parts.database)) == (TaskState.SUBMITTED, 0)


def test_duplicate_gets_the_same_answer_at_shutdown(parts: Parts, sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(2) as pool, Web(parts) as web:
        both = [pool.submit(create, web, BODY, headers=WORD) for _ in range(2)]
        wait_until(lambda: creates(sandbox) and web.requests_under_way == 2)
        web.stop_listening()
        first, twin = (each.result() for each in both)
    assert (status_and_code(first), twin.json()) == ((200, 0), first.json())


def test_duplicate_of_a_create_in_another_process_may_be_sent_again(parts: Parts, sandbox: Sandbox) -> None:
    """Another process has the first create and continues it."""
    with ThreadPoolExecutor(2) as pool, Web(parts) as web:
        pool.submit(create, web, BODY, headers=WORD)
        wait_until(lambda: creates(sandbox))
        other = Parts(parts.settings.model_copy(update={"port": free_port()}))
        with Web(other) as here:
            twin = pool.submit(create, here, BODY, headers=WORD)
            wait_until(lambda: here.requests_under_way == 1)
            here.stop_listening()
            assert status_and_code(twin.result()) == (503, 5001)
            assert twin.result().headers["retry-after"] == "5"
        other.close()
        assert [kept.status for kept in keys(parts)] == [None]
