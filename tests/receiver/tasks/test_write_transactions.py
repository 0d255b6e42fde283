"""How many write transactions a task takes. Each is an fsync, and on SQLite a turn at the lock that callbacks need."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import Connection, event
from sqlmodel import select

from receiver.app.wiring import Parts
from storage.rows.deliveries import Delivery, store
from storage.rows.models import AccountPause, Dispatch, Event
from storage.states import TaskState
from tests.archived_tasks import REQUEST
from tests.pipeline import insert_row, run


@pytest.fixture
def commits(parts: Parts) -> list[Connection]:
    """The commits of this process."""
    seen: list[Connection] = []
    event.listen(parts.database.writer, "commit", seen.append)  # the engine ends with the test
    return seen


def test_a_create_is_two_transactions_its_row_and_its_answer(parts: Parts, commits: list[Connection]) -> None:
    task = parts.submitter.submit(REQUEST).task
    assert (task.state, len(commits)) == (TaskState.SUBMITTED, 2)


def test_a_create_of_an_account_that_was_refused_is_noted_before_it_is_sent(
    parts: Parts, commits: list[Connection]
) -> None:
    with parts.database.write() as session:
        now = parts.database.now()
        session.add(AccountPause(provider="kling", model="", said="", since=now, trial_at=now.replace(year=2020)))
    commits.clear()
    assert parts.submitter.submit(REQUEST).task.state is TaskState.SUBMITTED
    assert len(commits) == 3


def test_a_report_is_two_transactions_its_claim_and_all_that_follows(parts: Parts, commits: list[Connection]) -> None:
    """Its task, its events with their numbers, and their dispatches."""
    task = insert_row(parts, client_callback_url="https://client.example/hook")
    report = {"task_id": "901", "task_status": "processing"}
    with parts.database.write() as session:
        store(session, [Delivery("kling", "push", task.id, json.dumps(report).encode())])
    commits.clear()
    assert run(parts, "callbacks") == 1
    assert len(commits) == 2
    with parts.database.read() as session:
        (queued,) = session.exec(select(Dispatch))
        assert session.get_one(Event, queued.event_id).seq
