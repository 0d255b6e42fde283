"""Deliveries without a known task wait for their row, and are matched however it comes."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event
from sqlmodel import col, select, update

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks import apply_deliveries
from receiver.tasks.apply_deliveries import AWAITS_READ
from storage.accounts.rate_limit import ReadRateLimit
from storage.database import group_writer
from storage.database.sessions import Database
from storage.rows import claims
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Callback, Event, Task
from storage.states import ArchiveState, CallbackState, Step
from tests.pipeline import callback_of, callbacks_of, deliver, drain, insert_row, make_due_now, run, task_of
from tests.rows import LONG_AGO
from tests.unreported_tasks import OTHERS, REQUEST, all_assets, queries


@pytest.fixture
def unpaced(parts: Parts) -> Parts:
    """Parts without a rate limit of reads, for tests that are not about it."""
    parts.__dict__["read_rate_limit"] = ReadRateLimit(parts.database, per_second=10_000)
    return parts


def assert_asked(parts: Parts, delivery: Callback, external_task_id: str) -> None:
    """A delivery to the account URL is not believed: the task it names is read."""
    row, task = callback_of(parts, delivery.delivery_key), task_of(parts, external_task_id)
    assert (row.state, row.reason) == (CallbackState.APPLIED, AWAITS_READ)
    assert task.due_at is not None
    assert (task.step, task.due_at <= parts.database.now()) == (Step.READ, True)


def test_an_unmatched_delivery_is_applied_once_its_task_is_submitted(unpaced: Parts, sandbox: Sandbox) -> None:
    delivery = deliver(unpaced, None, OTHERS)
    assert (delivery.state, delivery.external_task_id, delivery.provider_task_id) == ("unmatched", "late", "777")
    sandbox.set(submitted_seconds=600)
    unpaced.submitter.submit(REQUEST, external_task_id="late")
    run(unpaced, "callbacks")
    assert_asked(unpaced, delivery, "late")


def test_an_unmatched_delivery_is_applied_once_its_alias_is_learnt(unpaced: Parts) -> None:
    """A gateway uses its own id without ours. The later callback to our own URL is signed and contains it, too."""
    delivery = deliver(unpaced, None, {"task_id": "777", "task_status": "processing"})
    task = insert_row(unpaced)
    run(unpaced, "callbacks")
    assert callback_of(unpaced, delivery.delivery_key).state is CallbackState.UNMATCHED
    deliver(unpaced, task, {"task_id": "777", "task_status": "submitted"}, webhook_id="msg_1")
    run(unpaced, "callbacks")
    assert_asked(unpaced, delivery, task.external_task_id)


def test_delivery_that_stays_unmatched_is_checked_once_more_and_stored(unpaced: Parts, sandbox: Sandbox) -> None:
    delivery = deliver(unpaced, None, OTHERS)
    assert delivery.due_at is not None
    make_due_now(unpaced)
    assert run(unpaced, "callbacks", "unmatched") == 1
    kept_row = callback_of(unpaced, delivery.delivery_key)
    assert (kept_row.state, kept_row.due_at, kept_row.lease) == (CallbackState.UNMATCHED, None, None)
    assert queries(sandbox) == 0  # an account URL names no task of ours, so nothing is read or adopted


def test_row_committed_later_is_found_by_the_second_check(unpaced: Parts) -> None:
    """The transactions of the task and of the delivery overlapped, and neither saw the other."""
    delivery = deliver(unpaced, None, OTHERS)
    task = insert_row(unpaced, external_task_id="late")
    with unpaced.database.write() as session:
        session.execute(update(Callback).values(state=CallbackState.UNMATCHED, due_at=LONG_AGO))
    run(unpaced, "callbacks", "unmatched")
    assert_asked(unpaced, delivery, task.external_task_id)


def test_a_task_lost_with_its_database_is_adopted_by_its_token(unpaced: Parts, sandbox: Sandbox) -> None:
    """An old backup was restored, and the provider calls back for a task of ours without a row."""
    lost = Task(id=uuid.uuid4(), external_task_id="lost", provider="kling")
    made = unpaced.kling.create({**REQUEST, "n": 2}, external_task_id="lost", callback_url=None)
    delivery = deliver(unpaced, lost, {"task_id": made.report.provider_task_id, "task_status": "submitted"})
    assert delivery.state is CallbackState.UNMATCHED
    make_due_now(unpaced)
    run(unpaced, "unmatched", "callbacks")
    assert callback_of(unpaced, delivery.delivery_key).state is CallbackState.APPLIED
    assert task_of(unpaced, "lost").id == lost.id
    done = drain(unpaced, "lost")
    assert {asset.sha256 for asset in all_assets(unpaced)} == set(sandbox.ledger().sha256.values())
    assert done.archive is ArchiveState.ARCHIVED


def test_a_token_of_an_unknown_task_stays_unmatched(unpaced: Parts, sandbox: Sandbox) -> None:
    unknown = Task(id=uuid.uuid4(), external_task_id="unknown", provider="kling")
    delivery = deliver(unpaced, unknown, {"task_id": "777", "task_status": "submitted"})
    make_due_now(unpaced)
    run(unpaced, "unmatched", "callbacks")
    row = callback_of(unpaced, delivery.delivery_key)
    assert (row.state, row.due_at, queries(sandbox)) == (CallbackState.UNMATCHED, None, 1)


def test_an_unmatched_delivery_waits_for_a_provider_that_is_away(unpaced: Parts, sandbox: Sandbox) -> None:
    lost = Task(id=uuid.uuid4(), external_task_id="lost", provider="kling")
    delivery = deliver(unpaced, lost, {"task_id": "777", "task_status": "submitted"})
    sandbox.set(query_faults=["5001"])
    make_due_now(unpaced)
    run(unpaced, "unmatched")
    assert callback_of(unpaced, delivery.delivery_key).due_at is not None


def test_many_unmatched_deliveries_share_transactions(unpaced: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """At their arrival, and at the second check: of 16 deliveries to the account URL one names a known task by then."""
    monkeypatch.setattr(group_writer, "MAX_GROUP_SECONDS", 60)
    bodies = [b'{"task_id": "%d", "external_task_id": "n%d", "task_status": "submitted"}' % (n, n) for n in range(16)]
    with unpaced.database.write() as session:
        store(session, [Delivery("kling", "push", None, body) for body in bodies])
    with commits(unpaced.database) as first:
        assert run(unpaced, "callbacks") == 16
    insert_row(unpaced, external_task_id="n7")
    with unpaced.database.write() as session:
        session.execute(update(Callback).values(state=CallbackState.UNMATCHED, due_at=LONG_AGO))
    with commits(unpaced.database) as second:
        assert run(unpaced, "unmatched") == 16
    # The claim, the rest, and a claim without a result, because no check follows a full claim. The first delivery may
    # be committed before the others wait.
    assert (len(first) <= 4, len(second) <= 4) == (True, True)
    assert [row.external_task_id for row in callbacks_of(unpaced) if row.state is CallbackState.RECEIVED] == ["n7"]
    assert {row.due_at for row in callbacks_of(unpaced) if row.state is CallbackState.UNMATCHED} == {None}


def test_lost_lease_fails_no_other_delivery_of_its_transaction(unpaced: Parts) -> None:
    for number in range(3):
        deliver(unpaced, None, {**OTHERS, "external_task_id": f"n{number}"})
    make_due_now(unpaced)
    (lane,) = [each for each in unpaced.lanes() if each.name == "unmatched"]
    assert lane.work_many
    with unpaced.database.write() as session:
        rows = claims.claim(session, Callback, limit=3, lease_seconds=60, where=lane.where)
    with unpaced.database.write() as session:
        session.execute(update(Callback).where(col(Callback.id) == rows[1].id).values(lease=uuid.uuid4()))
    lane.work_many(rows)
    assert [row.lease is None for row in callbacks_of(unpaced)] == [True, False, True]


def test_events_of_no_task_are_limited(unpaced: Parts) -> None:
    """A sink would get one for each delivery at the account URL before the later events of tasks."""
    task, lost = insert_row(unpaced), Task(id=uuid.uuid4(), external_task_id="lost", provider="kling")
    deliver(unpaced, task, {"task_id": "777", "task_status": "submitted"}, webhook_id="msg_1")
    unmatched = [b'{"task_status": "submitted", "external_task_id": "n%d"}' % n for n in range(12)]
    rejected = [body.replace(b'"n', b'"other').replace(b"}", b', "task_id": "777"}') for body in unmatched]
    with unpaced.database.write() as session:
        store(session, [Delivery("kling", "push", None, body) for body in unmatched])
        store(session, [Delivery("kling", "push", lost.id, body) for body in unmatched])
        store(session, [Delivery("kling", "push", None, body) for body in rejected])
    run(unpaced, "callbacks")
    with unpaced.database.read() as session:
        owners = list(session.exec(select(Event.task_id).where(col(Event.name).startswith("callback."))))
    assert owners.count(lost.id) == 12 and 0 <= owners.count(None) - apply_deliveries.MAX_NOBODYS_EVENTS <= 3
    states = Counter(row.state for row in callbacks_of(unpaced))
    assert states == {CallbackState.APPLIED: 1, CallbackState.UNMATCHED: 24, CallbackState.REJECTED: 12}


@contextmanager
def commits(database: Database) -> Iterator[list[None]]:
    found: list[None] = []

    def note(_: object) -> None:
        found.append(None)

    event.listen(database.writer, "commit", note)
    yield found
    event.remove(database.writer, "commit", note)
