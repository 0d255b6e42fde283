"""Reads of tasks without callbacks: in batches or one by one, until the result is known or the lifetime is over.

`SILENT_TASKS=100` is the long form of the tests in which no callback comes at all.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlmodel import col, update
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks.reconcile import BATCH, NO_BATCH_SECONDS, Reader
from storage.accounts.accepted_creates import NEVER_REPORTED
from storage.accounts.rate_limit import ReadRateLimit
from storage.rows import claims, tasks
from storage.rows.models import Task
from storage.states import ArchiveState, AssetState, CallbackState, Step, TaskState
from tests.harness import wait_until
from tests.pipeline import (
    assert_archived,
    callbacks_of,
    deliver,
    drain,
    insert_row,
    kept,
    make_due_now,
    run,
    settings_for,
    task_of,
)
from tests.rows import LONG_AGO, event_names
from tests.unreported_tasks import REQUEST, all_assets, queries, reader, states_of, submit

SILENT_TASKS = int(os.environ.get("SILENT_TASKS", "4"))


@pytest.fixture
def unpaced(parts: Parts) -> Parts:
    """Parts without a rate limit of reads, for tests that are not about it."""
    parts.__dict__["read_rate_limit"] = ReadRateLimit(parts.database, per_second=10_000)
    return parts


@pytest.fixture
def one_by_one(database_url: str, bucket: Any, sandbox: Sandbox) -> Iterator[Parts]:
    """With access and secret key there is no batch call."""
    knobs = sandbox.world.knobs
    keys = {"kling_access_key": knobs.access_key, "kling_secret_key": knobs.secret_key}
    private = Parts(settings_for(database_url, bucket, sandbox, kling_api_key=None, **keys))
    private.__dict__["read_rate_limit"] = ReadRateLimit(private.database, per_second=10_000)
    yield private
    private.close()


# -- in batches, or one by one ----------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_due_reads_go_out_in_batches(unpaced: Parts, sandbox: Sandbox) -> None:
    made = submit(unpaced, 21)
    wait_until(lambda: {task.status for task in sandbox.ledger().tasks} == {"succeed"})
    assert run(unpaced, "reads") == 21
    assert states_of(unpaced, made) == {TaskState.SUCCEEDED}
    assert queries(sandbox) == 2


def test_a_batch_answer_is_kept_and_applied_like_any_delivery(unpaced: Parts, sandbox: Sandbox) -> None:
    first, second = submit(unpaced, 2, n=2)
    wait_until(lambda: {task.status for task in sandbox.ledger().tasks} == {"succeed"})
    run(unpaced, "reads")
    rows = callbacks_of(unpaced)
    assert [(row.source, row.state) for row in rows] == [("poll", CallbackState.APPLIED)] * 2
    assert {row.task_id for row in rows} == {first.id, second.id}
    run(unpaced, "assets", "finishes")
    for task in (first, second):
        assert_archived(unpaced, sandbox, task_of(unpaced, task.external_task_id))


@pytest.mark.databases("sqlite")
def test_tasks_are_read_one_by_one_with_a_jwt(one_by_one: Parts, sandbox: Sandbox) -> None:
    made = submit(one_by_one, 3)
    wait_until(lambda: {task.status for task in sandbox.ledger().tasks} == {"succeed"})
    run(one_by_one, "reads")
    assert states_of(one_by_one, made) == {TaskState.SUCCEEDED}
    assert queries(sandbox) == 3


@pytest.mark.parametrize("fault", ["1002", "1202", "html"])
@pytest.mark.databases("sqlite")
def test_missing_batch_call_is_not_tried_again_for_an_hour(unpaced: Parts, sandbox: Sandbox, fault: str) -> None:
    clock = [0.0]
    asks = Reader(unpaced.database, unpaced.providers, unpaced.schedule, unpaced.read_rate_limit, now=lambda: clock[0])
    made = submit(unpaced, 2)
    sandbox.set(query_faults=[fault])
    asks.work_many(claim_reads(unpaced))
    assert (queries(sandbox), asks.batch()) == (3, 1)
    make_due_now(unpaced, Task)
    asks.work_many(claim_reads(unpaced))
    clock[0] = NO_BATCH_SECONDS
    assert (asks.batch(), states_of(unpaced, made) <= {TaskState.PROCESSING, TaskState.SUCCEEDED}) == (BATCH, True)


def claim_reads(parts: Parts) -> list[Task]:
    with parts.database.write() as session:
        return claims.claim(session, Task, limit=BATCH, lease_seconds=60, where=(col(Task.step) == Step.READ,))


def test_task_missing_in_a_batch_answer_is_read_alone(unpaced: Parts, sandbox: Sandbox) -> None:
    """An id with a comma cannot be part of a batch read."""
    odd = unpaced.submitter.submit(REQUEST, external_task_id="one,two").task
    made = [odd, *submit(unpaced, 2)]
    wait_until(lambda: {task.status for task in sandbox.ledger().tasks} == {"succeed"})
    run(unpaced, "reads")
    assert states_of(unpaced, made) == {TaskState.SUCCEEDED}
    assert queries(sandbox) == 2


def test_a_task_missing_everywhere_is_read_again_later(unpaced: Parts, sandbox: Sandbox) -> None:
    (known,) = submit(unpaced, 1)
    missing = insert_row(unpaced, external_task_id="missing", due_at=LONG_AGO, submitted_at=unpaced.database.now())
    run(unpaced, "reads")
    row = task_of(unpaced, missing.external_task_id)
    assert (row.state, row.step, row.polls > 0, row.lease) == (TaskState.SUBMITTED, Step.READ, True, None)
    assert task_of(unpaced, known.external_task_id).polls == 1


@pytest.mark.databases("sqlite")
def test_a_read_finds_no_task_whose_own_id_is_our_external_id(one_by_one: Parts, sandbox: Sandbox) -> None:
    """A query takes either id, so it finds the other task."""
    (other,) = submit(one_by_one, 1)
    wait_until(lambda: {task.status for task in sandbox.ledger().tasks} == {"succeed"})
    insert_row(
        one_by_one,
        external_task_id=str(other.provider_task_id),
        due_at=LONG_AGO,
        submitted_at=one_by_one.database.now(),
    )
    run(one_by_one, "reads")
    row = task_of(one_by_one, str(other.provider_task_id))
    assert (row.state, row.provider_task_id, row.polls > 0) == (TaskState.SUBMITTED, None, True)
    assert task_of(one_by_one, other.external_task_id).state is TaskState.SUCCEEDED


@pytest.mark.databases("sqlite")
def test_a_batch_call_that_knows_nothing_is_not_tried_again(unpaced: Parts, sandbox: Sandbox) -> None:
    """Some gateways answer every batch read with an empty list."""
    asks = reader(unpaced)
    for task in submit(unpaced, 2):
        unpaced.kling.create(REQUEST, external_task_id=f"{task.external_task_id},", callback_url=None)
    with unpaced.database.write() as session:
        comma = col(Task.external_task_id) + ","
        session.execute(update(Task).values(external_task_id=comma))
    asks.work_many(claim_reads(unpaced))
    assert asks.batch() == 1


@pytest.mark.databases("sqlite")
def test_list_is_read_if_single_tasks_cannot_be_read(unpaced: Parts, sandbox: Sandbox) -> None:
    """A gateway that supports neither the batch call nor the read of one task, but the list."""
    made = submit(unpaced, 2)
    wait_until(lambda: {task.status for task in sandbox.ledger().tasks} == {"succeed"})
    sandbox.set(query_faults=["1202", "1202"])
    run(unpaced, "reads")
    assert states_of(unpaced, made) == {TaskState.SUCCEEDED}
    assert queries(sandbox) == 4  # the batch, the first task, the list; and the second task, which is answered


@pytest.mark.parametrize("fault", ["5001", "1302"])
@pytest.mark.databases("sqlite")
def test_a_provider_that_is_away_changes_nothing_but_the_time(unpaced: Parts, sandbox: Sandbox, fault: str) -> None:
    made = submit(unpaced, 3)
    sandbox.set(query_faults=[fault])
    reader(unpaced).work_many(claim_reads(unpaced))
    assert queries(sandbox) == 1
    for task in made:
        row = task_of(unpaced, task.external_task_id)
        assert (row.state, row.step, row.polls, row.lease) == (TaskState.SUBMITTED, Step.READ, 0, None)
        assert row.due_at is not None
        assert fault in (row.note or "")


def test_a_read_that_keeps_ending_its_workers_is_parked(unpaced: Parts, sandbox: Sandbox) -> None:
    (task,) = submit(unpaced, 1)
    with unpaced.database.write() as session:
        session.execute(update(Task).values(losses=claims.PARK_LOSSES, lease=uuid.uuid4()))
    with unpaced.database.write() as session:
        claimed = claims.claim(session, Task, limit=1, lease_seconds=60, alone=True)
    reader(unpaced).work(claimed[0])
    row = task_of(unpaced, task.external_task_id)
    assert (row.due_at, row.step, queries(sandbox)) == (None, Step.READ, 0)
    assert "receiver retry" in (row.note or "")


# -- without callbacks ------------------------------------------------------------------------------------------------


def drained(parts: Parts) -> list[Task]:
    """All tasks, after all work that is due now and soon."""

    def over() -> list[Task]:
        parts.worker().run_until_idle()
        with parts.database.read() as session:
            found = tasks.newest(session, 1_000)
        return found if {task.archive for task in found} == {ArchiveState.ARCHIVED} else []

    return wait_until(over, seconds=120, every=0.1)


@pytest.mark.parametrize("public", [True, False], ids=["all callbacks dropped", "no public URL"])
@pytest.mark.databases("sqlite")
def test_tasks_without_callbacks_are_archived(unpaced: Parts, sandbox: Sandbox, public: bool) -> None:
    sandbox.set(callback_drop_rate=1, picture_bytes=2_000, submitted_seconds=0.5, processing_seconds=0.5)
    if not public:
        unpaced.__dict__["settings"] = unpaced.settings.model_copy(update={"public_url": None})
    for _ in range(SILENT_TASKS):
        unpaced.submitter.submit(REQUEST)
    found = drained(unpaced)
    assert len(found) == SILENT_TASKS
    assert all((task.callback_url is not None) is public for task in found)
    assert max(task.polls for task in found) < 10
    assert queries(sandbox) < 10 * SILENT_TASKS
    ours = {asset.sha256 for asset in sandbox.ledger().assets.values()}
    objects = kept(unpaced)
    assert ours == {digest for key, digest in objects.items() if not key.endswith("manifest.json")}
    assert len(objects) == 2 * SILENT_TASKS
    assert not [callback for callback in sandbox.ledger().callbacks if callback.attempts]


def test_a_task_silent_for_one_lifetime_is_failed_and_a_late_success_still_wins(
    unpaced: Parts, sandbox: Sandbox
) -> None:
    sandbox.set(submitted_seconds=600)
    (task,) = submit(unpaced, 1)
    with unpaced.database.write() as session:
        session.execute(update(Task).values(submitted_at=LONG_AGO))
    run(unpaced, "reads")
    silent = task_of(unpaced, task.external_task_id)
    assert (silent.state, silent.error, silent.due_at) == (TaskState.FAILED, NEVER_REPORTED, None)
    made = sandbox.world.tasks[str(task.provider_task_id)]
    made.status, made.pictures, made.expires = "succeed", 1, 4_000_000_000
    body = unpaced.kling.read(provider_task_id=None, external_task_id=task.external_task_id)
    assert body is not None
    deliver(unpaced, task, body.body)
    late = drain(unpaced, task.external_task_id)
    assert (late.state, late.error) == (TaskState.SUCCEEDED, None)
    assert_archived(unpaced, sandbox, late)


@pytest.mark.parametrize(("fault", "state"), [("1103", TaskState.FAILED), ("5001", TaskState.SUBMITTED)])
@pytest.mark.databases("sqlite")
def test_only_an_answer_ends_a_silent_task(unpaced: Parts, sandbox: Sandbox, fault: str, state: TaskState) -> None:
    """A provider that refuses us has answered; one that is down has not."""
    (task,) = submit(unpaced, 1)
    with unpaced.database.write() as session:
        session.execute(update(Task).values(submitted_at=LONG_AGO))
    sandbox.set(query_faults=[fault] * 2)
    run(unpaced, "reads")
    assert task_of(unpaced, task.external_task_id).state is state


@pytest.mark.databases("sqlite", "postgresql")
def test_an_unknown_status_in_answers_is_told(unpaced: Parts, sandbox: Sandbox) -> None:
    """Without callbacks such a task was read for the whole result lifetime, and nothing said why."""
    sandbox.set(submitted_seconds=600)
    (task,) = submit(unpaced, 1)
    made = sandbox.world.tasks[str(task.provider_task_id)]
    made.status = "expired"  # type: ignore[assignment]
    with capture_logs() as logs:
        for _ in range(3):
            make_due_now(unpaced, Task)
            run(unpaced, "reads")
    row = task_of(unpaced, task.external_task_id)
    assert (row.state, row.step) == (TaskState.SUBMITTED, Step.READ)
    assert "unknown status 'expired'" in str(row.note)
    assert [line["status"] for line in logs if line["event"] == "callback.status_not_recognized"] == ["expired"]
    made.status = "processing"
    make_due_now(unpaced, Task)
    run(unpaced, "reads")
    assert task_of(unpaced, task.external_task_id).note is None


@pytest.mark.databases("sqlite", "postgresql")
def test_a_task_that_failed_as_silent_is_not_said_to_be_read_again(unpaced: Parts, sandbox: Sandbox) -> None:
    """Its last answer had an unknown status, and the note that told of it stayed."""
    sandbox.set(submitted_seconds=600)
    (task,) = submit(unpaced, 1)
    sandbox.world.tasks[str(task.provider_task_id)].status = "expired"  # type: ignore[assignment]
    with unpaced.database.write() as session:
        session.execute(update(Task).values(submitted_at=LONG_AGO))
    run(unpaced, "reads")
    row = task_of(unpaced, task.external_task_id)
    assert (row.state, row.error, row.note, row.due_at) == (TaskState.FAILED, NEVER_REPORTED, None, None)


@pytest.mark.databases("sqlite")
def test_urls_that_died_before_the_worker_came_are_refreshed(unpaced: Parts, sandbox: Sandbox) -> None:
    """Tested with links that are dead on arrival, and with links that expired in our queue."""
    dead = submit(unpaced, 1, prompt="a boat [expire]", n=3)[0]
    sandbox.set(fresh_urls_on_read=True)
    wait_until(lambda: {task.status for task in sandbox.ledger().tasks} == {"succeed"})
    run(unpaced, "reads")
    sandbox.world.tasks[str(dead.provider_task_id)].live_from += 1
    run(unpaced, "assets")
    assert {asset.state for asset in all_assets(unpaced)} == {AssetState.DUE}
    done = drain(unpaced, dead.external_task_id)
    assert (done.archive, "asset.archived" in event_names(unpaced.database, done)) == (ArchiveState.ARCHIVED, True)
    assert_archived(unpaced, sandbox, done)
