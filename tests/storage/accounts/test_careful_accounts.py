"""An account that was refused lately has few creates under way at once, however many workers there are."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from sqlmodel import Session, col, select

from storage.accounts import pauses
from storage.accounts.slots import Slots
from storage.database.sessions import Database
from storage.errors import AccountRefused
from storage.rows.models import AccountPause, Task
from storage.states import Step
from tests.bench.claims import PAST, fill

REFUSED = AccountRefused("no", code=1102, http_status=429, said="no")
NOW = datetime.now(UTC)


@pytest.fixture
def creates(database: Database) -> list[Task]:
    """Claimed creates that were not sent, of an account that was refused and has resumed."""
    fill(database, Task, 6, step=Step.CREATE, due_at=NOW + timedelta(days=1), lease=uuid.uuid4())
    with database.write() as session:
        found = list(session.scalars(select(Task).where(col(Task.lease).is_not(None))))
        pauses.pause(session, "kling", None, REFUSED)
        session.execute(update(AccountPause).values(trial_at=col(AccountPause.since)))
        pauses.resume(session, pauses.begin(session, found[0]))
        assert pauses.every(session) == []
    return found


def sent(session: Session, tasks: list[Task]) -> int:
    """How many of these may be sent, each by a worker of its own."""
    count = 0
    for task in tasks:
        trial = pauses.begin(session, task)
        if trial.refusal is None and not trial.is_early:
            session.execute(update(Task).where(col(Task.id) == task.id).values(sent_at=NOW))
            count += 1
    return count


def test_few_creates_are_under_way_after_a_pause(database: Database, creates: list[Task]) -> None:
    with database.write() as session:
        assert sent(session, creates) == pauses.CAREFUL_CREATES
        assert not pauses.has_room(session, "kling", uuid.uuid4())
        session.execute(update(Task).where(col(Task.id) == creates[0].id).values(lease=None))
        assert sent(session, creates[-1:]) == 1, "an answer makes room"


def test_queue_admits_only_tasks_that_may_be_sent(database: Database, creates: list[Task]) -> None:
    fill(database, Task, 9, slots=-1, queued_at=PAST)
    slots = Slots("kling", 50)
    with database.write() as session:
        session.execute(update(Task).where(col(Task.id).in_([each.id for each in creates[1:]])).values(due_at=None))
        assert slots.is_any_next(session)
        assert slots.admit(session, 9) == pauses.CAREFUL_CREATES - 1
        session.execute(update(Task).where(col(Task.queued_at).is_(None)).values(step=Step.CREATE))
        assert not slots.is_any_next(session)


def test_an_hour_later_the_account_is_as_any_other(database: Database, creates: list[Task]) -> None:
    with database.write() as session:
        session.execute(update(AccountPause).values(since=PAST, trial_at=PAST - timedelta(seconds=1)))
        assert sent(session, creates) == len(creates)


def test_second_refusal_pauses_the_account_and_is_reported_again(database: Database, creates: list[Task]) -> None:
    with database.write() as session:
        before = session.scalars(select(AccountPause.since)).one()
        pauses.pause(session, "kling", None, REFUSED)
        (paused,) = pauses.every(session)
        assert paused.since >= before
        assert sent(session, creates) == 0
