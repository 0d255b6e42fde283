"""A create holds its claim until it ends, and sends nothing after it lost the claim."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from sqlmodel import update

from receiver.app.wiring import Parts
from receiver.providers.kling.request import parse_request
from receiver.sandbox import Sandbox
from receiver.tasks.create_outcome import CreateOutcome
from receiver.tasks.lease_renewal import renewing_lease
from storage.database.sessions import Database
from storage.rows.models import Task
from storage.states import TaskState
from tests.harness import wait_until
from tests.pipeline import Web, make_due_now, run, task_of
from tests.receiver.gateway.test_gateway import CHANGES, ID, ON_SQLITE, create, status_and_code
from tests.receiver.tasks.test_submit import make_upstream
from tests.rows import LONG_AGO, new_task, stored
from tests.unreported_tasks import REQUEST, creates, queries

# The provider's delay, which is more than two leases.
SLOW_SECONDS, LEASE_SECONDS = 3.5, 1.5


@pytest.fixture
def changes() -> dict[str, Any]:
    return {**CHANGES, "lease_seconds": LEASE_SECONDS}


@pytest.fixture(autouse=True)
def slow_tasks(sandbox: Sandbox) -> None:
    sandbox.set(submitted_seconds=600, hang_seconds=SLOW_SECONDS)


def inserted(parts: Parts) -> Task:
    """A row in the state in which a submitter or the gateway commits it: claimed and not sent yet."""
    task = parts.submitter.row(parse_request(REQUEST), ID)
    with parts.database.write() as session:
        assert parts.submitter.insert(session, task)
    return task


def nobody_else_finds_work(parts: Parts, asking: Future[Any]) -> None:
    """Workers search for creates until this one is done. They would send again what they find."""
    found = 0
    while not wait([asking], timeout=0.1).done:
        found += run(parts, "creates")
    assert found == 0


def by_library(parts: Parts) -> None:
    parts.submitter.submit(REQUEST, external_task_id=ID)


def by_worker(parts: Parts) -> None:
    """Like `work --once`, beside other workers."""
    inserted(parts)
    with parts.database.write() as session:
        session.execute(update(Task).values(sent_at=None, lease=None, due_at=LONG_AGO))
    run(parts, "creates")


@pytest.mark.parametrize(
    ("way", "database_kind"),
    [(by_library, "sqlite"), (by_library, "postgresql"), (by_worker, "postgresql")],
    indirect=["database_kind"],
)
def test_a_create_that_takes_longer_than_its_lease_is_sent_once(
    way: Callable[[Parts], None], parts: Parts, sandbox: Sandbox
) -> None:
    sandbox.set(create_faults=["hang"])
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(way, parts)
        wait_until(lambda: creates(sandbox))
        nobody_else_finds_work(parts, asking)
        asking.result()
    assert (len(creates(sandbox)), task_of(parts, ID).losses) == (1, 0)


@ON_SQLITE
def test_gateway_create_that_takes_longer_than_its_lease_is_sent_once(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["hang:created"])
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(create, web, {**REQUEST, "external_task_id": ID})
        wait_until(lambda: creates(sandbox))
        nobody_else_finds_work(parts, asking)
        assert status_and_code(asking.result()) == (200, 0)
    task = task_of(parts, ID)
    assert (task.state, task.losses, len(creates(sandbox))) == (TaskState.SUBMITTED, 0, 1)


@ON_SQLITE
def test_slow_lookup_of_an_adopted_task_renews_its_claim(parts: Parts, sandbox: Sandbox) -> None:
    made = make_upstream(parts, sandbox, seconds_ago=1_000)
    parts.submitter.submit(REQUEST, external_task_id=ID)
    sandbox.set(query_faults=["hang"])
    before = queries(sandbox)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(parts.submitter.submit, REQUEST, external_task_id=ID, adopt=True)
        wait_until(lambda: queries(sandbox) > before)
        nobody_else_finds_work(parts, asking)
        assert asking.result().task.provider_task_id == made
    assert task_of(parts, ID).losses == 0


def test_a_create_that_lost_its_claim_before_it_was_sent_is_not_sent(parts: Parts, sandbox: Sandbox) -> None:
    """The create waited for a thread until a worker took over its row. The worker reads whether it arrived, then sends
    it.
    """
    task, outcome_listener = inserted(parts), CreateOutcome()
    make_due_now(parts)
    assert run(parts, "creates") == 1
    parts.submitter.create_step.send(task, outcome_listener)
    assert (creates(sandbox), outcome_listener.refusal, task_of(parts, ID).state) == ([], None, TaskState.CREATED)
    make_due_now(parts)
    run(parts, "creates")
    assert (len(creates(sandbox)), task_of(parts, ID).state) == (1, TaskState.SUBMITTED)


@ON_SQLITE
def test_a_create_that_waited_has_a_whole_lease_when_it_is_sent(parts: Parts, sandbox: Sandbox) -> None:
    task = inserted(parts)
    make_due_now(parts)  # the lease has expired, and no worker has claimed the row yet
    sandbox.set(create_faults=["hang"])
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(parts.submitter.create_step.send, task)
        wait_until(lambda: creates(sandbox))
        nobody_else_finds_work(parts, asking)
    assert len(creates(sandbox)) == 1


# -- lease renewal ----------------------------------------------------------------------------------------------------


def held_task(database: Database) -> Task:
    now = database.now()
    with database.write() as session:
        return new_task(session, lease=uuid.uuid4(), due_at=now)


def test_a_held_claim_is_renewed_until_the_end(database: Database) -> None:
    task = held_task(database)
    with renewing_lease(database, task, lease_seconds=0.3):
        seen = {wait_until(lambda: newer_than(database, task, task.due_at))}
        seen.add(wait_until(lambda: newer_than(database, task, max(seen))))
    last = stored(database, task)["due_at"]
    assert len(seen) == 2 and last >= max(seen)
    assert stored(database, task)["lease"] == task.lease


def newer_than(database: Database, task: Task, moment: Any) -> Any:
    due_at = stored(database, task)["due_at"]
    return due_at if due_at > moment else None


def test_another_workers_claim_is_left_alone(database: Database) -> None:
    task = held_task(database)
    theirs = uuid.uuid4()
    with renewing_lease(database, task, lease_seconds=0.3):
        with database.write() as session:
            session.execute(update(Task).values(lease=theirs, due_at=task.due_at))
        mine = held_task(database)
        with renewing_lease(database, mine, lease_seconds=0.3):  # two renewals mean that the other claim had its turn
            first = wait_until(lambda: newer_than(database, mine, mine.due_at))
            wait_until(lambda: newer_than(database, mine, first))
    assert (stored(database, task)["lease"], stored(database, task)["due_at"]) == (theirs, task.due_at)
