"""`RECEIVER_GATEWAY_TASKS=own`: a key sees its own tasks, and nothing of others."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from receiver.app.wiring import Parts
from receiver.gateway.api_keys import client_of
from receiver.sandbox import Sandbox
from storage.rows.events import EventName, record
from tests.pipeline import Web, insert_row
from tests.receiver.gateway.test_gateway import KEY, OTHER_KEY, PATH, PLAIN, call, create, status_and_code, task_of
from tests.receiver.web.test_event_stream import reading, take


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"api_keys": f"{KEY},{OTHER_KEY}", "gateway_tasks": "own"}


def three_tasks(parts: Parts) -> None:
    """One task of each key, and one of the command line."""
    owners = {"mine": client_of(KEY), "theirs": client_of(OTHER_KEY), "ours": None}
    for name, client in owners.items():
        succeed(parts, name, client)


def succeed(parts: Parts, name: str, client: str | None) -> None:
    task = insert_row(parts, external_task_id=name, client=client)
    with parts.database.write() as session:
        record(session, EventName.TASK_SUCCEEDED, task.id)
    parts.sequence()


def subjects(messages: list[dict[str, str]]) -> list[str]:
    return [json.loads(message["data"])["subject"] for message in messages]


def listed(answer: httpx.Response) -> list[str]:
    return [each["task_info"]["external_task_id"] for each in answer.json()["data"]]


def test_a_key_reads_and_lists_its_own_tasks_alone(web: Web, parts: Parts) -> None:
    three_tasks(parts)
    assert listed(call(web, "GET")) == ["mine"]
    assert listed(call(web, "GET", key=OTHER_KEY)) == ["theirs"]
    assert call(web, "GET", f"{PATH}/mine").status_code == 200
    nobodys, theirs = call(web, "GET", f"{PATH}/nobody"), call(web, "GET", f"{PATH}/theirs")
    assert (theirs.status_code, theirs.json()["code"]) == (nobodys.status_code, nobodys.json()["code"])
    assert theirs.json()["message"] == nobodys.json()["message"].replace("nobody", "theirs")
    assert call(web, "GET", f"{PATH}/ours").status_code == theirs.status_code


def test_tasks_named_by_ids_are_its_own_alone(web: Web, parts: Parts) -> None:
    three_tasks(parts)
    found = call(web, "GET", "/kling/tasks?external_task_ids=ours,theirs,mine").json()["data"]
    assert [each["external_id"] for each in found] == ["mine"]


def test_page_of_own_tasks_counts_own_tasks_only(web: Web, parts: Parts) -> None:
    three_tasks(parts)
    assert listed(call(web, "GET", f"{PATH}?pageNum=1&pageSize=1")) == ["mine"]
    assert listed(call(web, "GET", f"{PATH}?pageNum=2&pageSize=1")) == []


def test_a_key_is_sent_events_of_its_own_tasks_alone(web: Web, parts: Parts) -> None:
    three_tasks(parts)
    with reading(web, "?after=0&types=task.succeeded", Authorization=f"Bearer {OTHER_KEY}") as messages:
        assert subjects(take(messages, 1)) == ["theirs"]
        more = {"mine again": client_of(KEY), "theirs again": client_of(OTHER_KEY)}
        for name, client in more.items():
            succeed(parts, name, client)
        assert subjects(take(messages, 1)) == ["theirs again"]


def test_a_refused_id_is_free_for_the_key_that_used_it_alone(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    """The row of the refused create, with its events, became another key's."""
    sandbox.set(create_faults=["1303"])
    assert create(web, {**PLAIN, "external_task_id": "mine"}).status_code == 429
    assert status_and_code(create(web, {**PLAIN, "external_task_id": "mine"}, key=OTHER_KEY)) == (400, 1201)
    assert task_of(parts, "mine").client == client_of(KEY)
    assert create(web, {**PLAIN, "external_task_id": "mine"}).status_code == 200
