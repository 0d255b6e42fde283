"""How many write transactions a task takes. Each is an fsync, and on SQLite a turn at the lock that callbacks need."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, event

from receiver.app.wiring import Parts
from storage.rows.models import AccountPause
from storage.states import TaskState
from tests.archived_tasks import REQUEST


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
