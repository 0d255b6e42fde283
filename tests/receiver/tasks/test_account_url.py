"""What a stranger with the account's URL, and no signature, can do to a task: cause a bounded number of reads."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlmodel import col, update

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks import apply_deliveries as told
from receiver.tasks.operate import Operator
from storage.filters import DeliveryFilter
from storage.operations import lists
from storage.rows import tasks
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Callback, Task
from storage.states import ArchiveState, CallbackState, TaskState
from tests.harness import wait_until
from tests.pipeline import assets_of, callback_of, callbacks_of, deliver, drain, insert_row, make_due_now, run, task_of
from tests.receiver.tasks.test_apply_deliveries import body, info, is_read_now
from tests.receiver.tasks.test_unsigned_deliveries import FORGED, archived, confirm
from tests.rows import LONG_AGO, event_names
from tests.unreported_tasks import REQUEST, submit

# Verdicts are made of values. What waits for a read or for a create is tested on both databases.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")


@pytest.fixture
def changes() -> dict[str, Any]:
    """No poll becomes due while a test runs: only deliveries cause reads."""
    return {"poll_after_seconds": 3_600}


def unchanged(parts: Parts, task: Task, *but: str) -> dict[str, Any]:
    """The columns of the task, without the time of its next read and its count."""
    reads = {"step", "due_at", "callback_reads", "attempts", "lease", "losses", *but}
    return task_of(parts, task.external_task_id).model_dump(exclude=reads)


def shown_with(parts: Parts, task: Task) -> list[str | None]:
    """The reasons of the deliveries that the console shows as the task's."""
    with parts.database.read() as session:
        page = lists.newest_deliveries(session, DeliveryFilter(task=task.external_task_id), None)
    return [row.reason for row, *_ in page.rows if row.source == "push"]


@pytest.mark.parametrize("at_own_url", [True, False], ids=["own URL", "account URL"])
def test_a_refused_task_takes_no_picture_of_another(parts: Parts, sandbox: Sandbox, at_own_url: bool) -> None:
    """The other task is the account's, so a read under its id would succeed."""
    made = parts.kling.create(
        {"model_name": "kling-v3-omni", "prompt": "theirs"}, external_task_id="x", callback_url=None
    )
    sandbox.set(models=["other-model"])
    (task,) = submit(parts, 1)
    assert task_of(parts, task.external_task_id).state is TaskState.FAILED
    wait_until(lambda: {each.status for each in sandbox.ledger().tasks} == {"succeed"})
    forged = body("failed", task_id=made.report.provider_task_id, **info(task.external_task_id))
    deliver(parts, task if at_own_url else None, forged)
    operator = Operator(parts.database, parts.providers, parts.schedule)
    left = [operator.retry(task.external_task_id), operator.reconcile([task.external_task_id])[0]]
    assert all("its create failed" in each.left[task.external_task_id] for each in left)
    drain(parts, task.external_task_id)
    found = task_of(parts, task.external_task_id)
    assert (found.state, found.provider_task_id, assets_of(parts, task)) == (TaskState.FAILED, None, [])


@pytest.mark.parametrize("status", ["submitted", "processing", "failed", "resting", "succeed"])
@pytest.mark.parametrize("is_over", [True, False], ids=["archived", "running"])
def test_nothing_of_a_strangers_body_is_taken_over(parts: Parts, status: str, is_over: bool) -> None:
    task = archived(parts, external_task_id="ours") if is_over else insert_row(parts, external_task_id="ours")
    before, files, names = unchanged(parts, task), assets_of(parts, task), event_names(parts.database, task)
    shown = shown_with(parts, task)
    forged = body(status, 1 if status == "succeed" else 0, host=FORGED, task_id="foreign", **info("ours"))
    row = deliver(parts, None, forged)
    assert row.state is CallbackState.APPLIED and str(row.reason).startswith("not believed")
    assert (unchanged(parts, task), event_names(parts.database, task)) == (before, names)
    assert [each.model_dump() for each in assets_of(parts, task)] == [each.model_dump() for each in files]
    assert shown_with(parts, task) == shown
    with parts.database.read() as session:
        assert lists.exact(session, "foreign", ["kling"]) is None
    assert is_read_now(parts, task) is (row.reason == told.AWAITS_READ)


def test_a_strangers_contradiction_is_no_event_of_the_task(parts: Parts) -> None:
    task = insert_row(parts, external_task_id="ours")
    deliver(parts, task, body("processing", task_id="901"), webhook_id="msg_1")
    names = event_names(parts.database, task)
    assert deliver(parts, None, body("failed", task_id="901", **info("another"))).state is CallbackState.REJECTED
    assert event_names(parts.database, task) == names


@pytest.mark.parametrize("at_own_url", [True, False], ids=["own URL", "account URL"])
def test_a_delivery_is_called_confirmed_only_if_the_read_agrees(
    parts: Parts, sandbox: Sandbox, at_own_url: bool
) -> None:
    (task,) = submit(parts, 1)
    wait_until(lambda: {each.status for each in sandbox.ledger().tasks} == {"succeed"})
    paid = parts.kling.read(provider_task_id=None, external_task_id=task.external_task_id)
    assert paid is not None
    to, name = task if at_own_url else None, info(task.external_task_id)
    other = body("succeed", 2, task_id=str(task.provider_task_id), **name)
    sent = [deliver(parts, to, each) for each in (body("failed", **name), other)]
    sent.append(deliver(parts, None, paid.body))
    assert [row.reason for row in sent] == [told.AWAITS_READ] * 3
    run(parts, "reads", "callbacks")
    after = [callback_of(parts, row.delivery_key) for row in sent]
    assert [(row.state, row.reason) for row in after] == [
        (CallbackState.APPLIED, reason) for reason in (told.OTHERWISE, told.OTHERWISE, told.BY_READ)
    ]
    assert told.BY_READ in shown_with(parts, task) and (told.OTHERWISE in shown_with(parts, task)) is at_own_url
    assert not is_read_now(parts, task) and task_of(parts, task.external_task_id).callback_reads <= 1


@BOTH
def test_reads_that_the_account_url_causes_leave_room_for_others(parts: Parts) -> None:
    """One forged delivery for each of 150 tasks delayed another task's read by 30 s."""

    def due_times() -> dict[str, datetime | None]:
        return {each: task_of(parts, each).due_at for each in ids}

    at_once = told.ACCOUNT_READS_AT_ONCE
    ids = [insert_row(parts, external_task_id=f"known{number}").external_task_id for number in range(8 * at_once)]
    bodies = [json.dumps(body("failed", **info(each))).encode() for each in ids]
    started = parts.database.now()
    with parts.database.write() as session:
        store(session, [Delivery("kling", "push", None, each) for each in bodies])
    run(parts, "callbacks")
    times, ended = due_times(), parts.database.now()
    *first, before_last, last = sorted(ids, key=lambda each: times[each] or LONG_AGO)
    assert all(is_read_now(parts, task_of(parts, each)) for each in first[:at_once])
    waits = timedelta(seconds=7 * at_once / told.ACCOUNT_READS_PER_SECOND)
    assert started + waits - timedelta(seconds=1) < (times[last] or started) <= ended + waits
    for each in (before_last, last):
        deliver(parts, None, body("processing", **info(each)))
    assert due_times() == times, "a read that is planned is neither planned again nor made earlier"
    deliver(parts, task_of(parts, last), body("failed"))
    assert [is_read_now(parts, task_of(parts, each)) for each in (before_last, last)] == [False, True]


def test_a_read_under_way_is_not_put_off_by_the_account_url(parts: Parts) -> None:
    known = [insert_row(parts, external_task_id=f"known{number}") for number in range(told.ACCOUNT_READS_AT_ONCE + 8)]
    for each in known[:-1]:
        deliver(parts, None, body("failed", **info(each.external_task_id)))
    with parts.database.write() as session:
        session.execute(update(Task).where(col(Task.id) == known[-1].id).values(lease=uuid.uuid4()))
    deliver(parts, None, body("failed", **info(known[-1].external_task_id)))
    assert is_read_now(parts, known[-1])


def test_a_delivery_that_repeats_what_is_known_causes_no_read(parts: Parts) -> None:
    task = archived(parts, external_task_id="ours")
    confirm(parts, task, body("succeed", 1))
    assert deliver(parts, None, body("succeed", 1, **info("ours"))).reason == told.KNOWN
    assert not is_read_now(parts, task) and told.KNOWN in shown_with(parts, task)


@BOTH
def test_another_file_at_the_account_url_exposes_an_unsigned_one(parts: Parts) -> None:
    """Even when the reads are spent: then at the pace of polls."""
    task = insert_row(parts, external_task_id="ours")
    deliver(parts, task, body("succeed", 1, host=FORGED))
    with parts.database.write() as session:
        row = tasks.lock(session, task.id)
        assert row is not None
        row.callback_reads = told.MAX_READS_PER_TASK
    assert deliver(parts, None, body("succeed", 1, **info("ours"))).reason == told.AWAITS_READ
    found = task_of(parts, "ours")
    assert found.step is not None and found.due_at is not None and not found.contradicted
    assert [each.reason for each in callbacks_of(parts)] == [None, told.AWAITS_READ]


@pytest.mark.parametrize("webhook_id", ["msg_1", None])
def test_called_back_is_what_came_to_the_tasks_own_url_or_was_signed(parts: Parts, webhook_id: str | None) -> None:
    """The rate of lost callbacks counts tasks without it."""
    task = insert_row(parts, external_task_id="ours")
    deliver(parts, None, body("failed", **info("ours")), webhook_id=webhook_id)
    found = task_of(parts, "ours")
    assert {bool(found.called_back_at), bool(found.end_called_back_at)} == {webhook_id is not None}
    deliver(parts, task, body("failed", n=1))
    found = task_of(parts, "ours")
    assert found.called_back_at is not None and found.end_called_back_at is not None


@BOTH
def test_a_delivery_whose_read_became_needless_is_decided_anew(parts: Parts) -> None:
    """The provider calls both URLs, and the task's own ends the task before the read of the other."""
    task = insert_row(parts, external_task_id="ours")
    first = deliver(parts, None, body("succeed", 1, **info("ours")))
    assert first.reason == told.AWAITS_READ
    deliver(parts, task, body("succeed", 1))
    assert not is_read_now(parts, task)
    assert callback_of(parts, first.delivery_key).reason == told.KNOWN


def test_a_forged_success_does_not_withdraw_the_read_that_would_expose_it(parts: Parts) -> None:
    task = insert_row(parts, external_task_id="ours")
    genuine = deliver(parts, None, body("succeed", 1, **info("ours")))
    deliver(parts, task, body("succeed", 1, host=FORGED))
    assert callback_of(parts, genuine.delivery_key).reason == told.AWAITS_READ and is_read_now(parts, task)


@pytest.mark.parametrize("is_early", [True, False], ids=["before the read", "after it"])
def test_a_true_delivery_at_the_account_url_is_the_tasks_callback(
    parts: Parts, sandbox: Sandbox, is_early: bool
) -> None:
    """Where the provider knows that URL alone, no callback would count otherwise, and all would be called lost."""
    (task,) = submit(parts, 1)
    wait_until(lambda: {each.status for each in sandbox.ledger().tasks} == {"succeed"})
    paid = parts.kling.read(provider_task_id=None, external_task_id=task.external_task_id)
    assert paid is not None
    if is_early:
        deliver(parts, None, paid.body)
        run(parts, "reads", "callbacks")
    else:
        confirm(parts, task, json.loads(paid.body))
        deliver(parts, None, paid.body)
    found = task_of(parts, task.external_task_id)
    assert found.end_called_back_at is not None and found.completed_at is not None
    assert (found.end_called_back_at < found.completed_at) is is_early


@pytest.mark.parametrize(
    "is_answered", [pytest.param(True, id="answered", marks=BOTH), pytest.param(False, id="looked up")]
)
def test_a_delivery_before_the_end_of_the_create_is_decided_after_it(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, is_answered: bool
) -> None:
    """The answer says only that the task was accepted, so it is read at once. If it was lost, the look-up finds all."""
    early: list[Callback] = []
    create = parts.kling.create

    def create_slowly(*given: Any, external_task_id: str, **more: Any) -> Any:
        try:
            return create(*given, external_task_id=external_task_id, **more)
        finally:
            wait_until(lambda: {each.status for each in sandbox.ledger().tasks} == {"succeed"})
            paid = parts.kling.read(provider_task_id=None, external_task_id=external_task_id)
            assert paid is not None
            early.append(deliver(parts, None, paid.body))

    monkeypatch.setattr(parts.kling, "create", create_slowly)
    sandbox.set(create_faults=[] if is_answered else ["5000:created"])
    task = parts.submitter.submit(REQUEST).task
    assert [row.reason for row in early] == [told.AWAITS_READ]
    if not is_answered:
        make_due_now(parts, Task)
    parts.worker().run_until_idle()
    found = task_of(parts, task.external_task_id)
    assert (found.archive, found.end_called_back_at is not None) == (ArchiveState.ARCHIVED, True)
    assert callback_of(parts, early[0].delivery_key).reason == (told.BY_READ if is_answered else told.KNOWN)


@pytest.mark.parametrize("status", ["processing", "failed", "succeed"])
@pytest.mark.parametrize("at_own_url", [True, False], ids=["own URL", "account URL"])
def test_a_delivery_for_a_deleted_task_awaits_no_read(parts: Parts, status: str, at_own_url: bool) -> None:
    task = insert_row(parts, external_task_id="ours", step=None, due_at=None, deleted_at=LONG_AGO)
    row = deliver(parts, task if at_own_url else None, body(status, 1, **info("ours")))
    assert (row.state, row.reason) == (CallbackState.APPLIED, told.DELETED)
    found = task_of(parts, "ours")
    assert (found.step, found.due_at, found.callback_reads, assets_of(parts, task)) == (None, None, 0, [])
