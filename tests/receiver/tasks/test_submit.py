"""Each create is sent once: the row before, during and after the request, for every answer of the provider."""

from __future__ import annotations

import hashlib
import random
import threading
import time
import uuid
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import update
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.base.config import SettingsInvalid
from receiver.providers.kling.client import Kling
from receiver.sandbox import Sandbox
from receiver.tasks.create_step import NOT_FOUND_AGAIN_SECONDS, UNREAD_TRIES
from receiver.tasks.operate import Operator
from receiver.tasks.submit import Conflict
from receiver.tasks.task_view import is_over
from receiver.workers.worker import Worker
from storage.bucket.bucket import Bucket
from storage.database import free_space
from storage.errors import DatabaseUnavailable
from storage.rows.claims import BACKOFF_CAP_SECONDS
from storage.rows.models import Task
from storage.states import Step, TaskState
from tests.harness import wait_until
from tests.pipeline import Web, insert_row, make_due_now, run, settings_for, task_of
from tests.rows import LONG_AGO, new_task, stored
from tests.unreported_tasks import REQUEST, creates, drawn, encoded, unanswered

ID = "order-4711"
# For the kinds of an answer: the rows that they lead to are written on both by the tests around them.
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])


@pytest.fixture(autouse=True)
def slow_tasks(sandbox: Sandbox) -> None:
    """The provider changes no task by itself, so a row shows what its create returned."""
    sandbox.set(submitted_seconds=600, processing_seconds=600)


def submit_request(parts: Parts, external_task_id: str | None = ID, adopt: bool = False, **fields: Any) -> Task:
    return parts.submitter.submit({**REQUEST, **fields}, external_task_id=external_task_id, adopt=adopt).task


def submit_with_fault(parts: Parts, sandbox: Sandbox, fault: str) -> Task:
    """The create arrives and fails; the caller waits a short time for its answer."""
    sandbox.set(create_faults=[fault], hang_seconds=600)
    hasty = Parts(parts.settings)
    kling = Kling(base_url=sandbox.url, api_key=parts.settings.kling_api_key, timeout_seconds=0.5)
    hasty.__dict__["kling"] = kling  # the place of the cached property
    task = submit_request(hasty)
    hasty.close()
    wait_until(lambda: sandbox.ledger().counts[f"fault:create:{fault}"])
    return task


def go_on(parts: Parts, **values: Any) -> Task:
    """Make the one row due, with `values` written into it, and let a worker continue its create."""
    with parts.database.write() as session:
        session.execute(update(Task).values(**{"due_at": LONG_AGO, **values}))
    lanes = [lane for lane in parts.lanes() if lane.name == "creates"]
    Worker(parts.database, lanes, lease_seconds=5, grace_seconds=0).run_until_idle()
    return task_of(parts, ID)


def due_in(parts: Parts, task: Task) -> float:
    assert task.due_at is not None
    return (task.due_at - parts.database.now()).total_seconds()


def make_upstream(parts: Parts, sandbox: Sandbox, *, seconds_ago: float) -> str:
    """A task at the provider under our id that another client made."""
    made = parts.kling.create(REQUEST, external_task_id=ID, callback_url=None)
    provider_task_id = made.report.provider_task_id
    sandbox.world.tasks[provider_task_id].created_ms -= int(seconds_ago * 1000)
    return provider_task_id


# -- the row and the request --------------------------------------------------------------------------------------


def test_an_accepted_request_is_submitted(parts: Parts, sandbox: Sandbox) -> None:
    submitted = parts.submitter.submit(REQUEST)
    task, (made,) = submitted.task, sandbox.ledger().tasks
    assert submitted.new
    assert (task.state, task.step, task.lease, task.error) == (TaskState.SUBMITTED, Step.READ, None, None)
    assert (task.provider_task_id, task.external_task_id) == (made.task_id, made.external_task_id)
    assert uuid.UUID(task.external_task_id).version == 4


@ONE_DATABASE
def test_database_that_goes_after_the_create_leaves_the_id_in_the_error(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: object) -> Task:
        raise DatabaseUnavailable("database: too many connections")

    monkeypatch.setattr(parts.submitter, "_again", gone)
    with pytest.raises(DatabaseUnavailable) as raised:
        parts.submitter.submit(REQUEST)
    assert f"too many connections; the task {sandbox.ledger().tasks[0].external_task_id} may be paid" in str(
        raised.value
    )


def test_the_row_is_committed_and_claimed_before_the_request_leaves(parts: Parts, sandbox: Sandbox) -> None:
    asking = threading.Thread(target=submit_request, args=(parts,))
    with unanswered(sandbox):
        asking.start()
        wait_until(lambda: creates(sandbox))
        row, seconds = task_of(parts, ID), due_in(parts, task_of(parts, ID))
    asking.join()
    assert (row.state, row.step, row.attempts) == (TaskState.CREATED, Step.CREATE, 1)
    assert row.lease is not None
    assert row.sent_at is not None
    assert 0 < seconds <= parts.settings.lease_seconds
    assert task_of(parts, ID).state is TaskState.SUBMITTED


@pytest.mark.databases("sqlite")
def test_the_callback_url_carries_the_token_of_the_task(parts: Parts, sandbox: Sandbox) -> None:
    task = submit_request(parts)
    (body,) = creates(sandbox)
    public_url, _, token = body["callback_url"].rpartition("/callbacks/kling/")
    assert (public_url, task.callback_url) == (parts.settings.public_url, body["callback_url"])
    assert parts.tokens.read("kling", token) == task.id


@pytest.mark.databases("sqlite")
def test_no_callback_is_requested_without_a_public_url(database_url: str, bucket: Any, sandbox: Sandbox) -> None:
    settings = settings_for(database_url, bucket, sandbox).model_copy(update={"public_url": None})
    private = Parts(settings)
    task = submit_request(private)
    private.close()
    assert (task.state, task.callback_url) == (TaskState.SUBMITTED, None)
    assert "callback_url" not in creates(sandbox)[0]


def test_sending_again_uses_the_stored_callback_url(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["1302"])
    before = submit_request(parts).callback_url
    moved = Parts(parts.settings.model_copy(update={"public_url": "https://moved.example"}))
    go_on(moved)
    moved.close()
    assert [body["callback_url"] for body in creates(sandbox)] == [before, before]


@pytest.mark.parametrize("again", [{}, {"n": 1, "aspect_ratio": "auto"}], ids=["same", "defaults spelled out"])
def test_the_same_request_is_sent_once(parts: Parts, sandbox: Sandbox, again: dict[str, Any]) -> None:
    first = submit_request(parts)
    second = parts.submitter.submit({**REQUEST, **again}, external_task_id=ID)
    assert (second.new, second.task.id) == (False, first.id)
    assert len(creates(sandbox)) == 1


def test_another_request_under_the_same_id_is_a_conflict(parts: Parts, sandbox: Sandbox) -> None:
    before = stored(parts.database, submit_request(parts))
    with pytest.raises(Conflict, match=ID):
        submit_request(parts, n=2)
    assert stored(parts.database, task_of(parts, ID)) == before
    assert len(creates(sandbox)) == 1


def test_adopted_task_is_taken_for_a_request_where_the_caller_says_so(parts: Parts, sandbox: Sandbox) -> None:
    task = insert_row(parts, external_task_id=ID, adopt=True, request={}, request_hash="")
    with pytest.raises(Conflict, match=r"without its request: `receiver submit --adopt`"):
        submit_request(parts)
    submitted = parts.submitter.submit(REQUEST, external_task_id=ID, adopt=True)
    assert (submitted.new, submitted.task.id) == (False, task.id)
    assert not creates(sandbox)


def test_submitters_at_once_send_once(parts: Parts, sandbox: Sandbox) -> None:
    threads = [threading.Thread(target=submit_request, args=(parts,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(creates(sandbox)) == 1


def test_base64_input_is_kept_as_its_hash_once_the_create_is_settled(parts: Parts, sandbox: Sandbox) -> None:
    picture = drawn(400, 300)
    sandbox.set(create_faults=["1302"])
    images = [{"image": encoded(picture)}]
    assert submit_request(parts, image_list=images).request["image_list"] == images
    kept = go_on(parts).request["image_list"]
    assert kept == [{"image": {"sha256": hashlib.sha256(picture).hexdigest(), "bytes": len(picture)}}]
    assert [body["image_list"] for body in creates(sandbox)] == [images, images]
    assert parts.submitter.submit({**REQUEST, "image_list": images}, external_task_id=ID).new is False


def test_a_program_without_credentials_does_not_pause_the_account_of_others(
    parts: Parts, database_url: str, bucket: Bucket, sandbox: Sandbox
) -> None:
    without = Parts(settings_for(database_url, bucket, sandbox, kling_api_key=None))
    with closing(without), pytest.raises(SettingsInvalid, match="nothing was sent: set RECEIVER_KLING_API_KEY"):
        without.submitter.submit(REQUEST, external_task_id=ID)
    assert submit_request(parts).state is TaskState.SUBMITTED
    assert len(creates(sandbox)) == 1


# -- credentials and addresses ------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_access_and_secret_key_sign_the_request(database_url: str, bucket: Any, sandbox: Sandbox) -> None:
    knobs = sandbox.world.knobs
    keys = {"kling_access_key": knobs.access_key, "kling_secret_key": knobs.secret_key}
    signed = Parts(settings_for(database_url, bucket, sandbox, kling_api_key=None, **keys))
    assert submit_request(signed).state is TaskState.SUBMITTED
    signed.close()


@pytest.mark.databases("sqlite")
def test_a_base_url_may_have_a_path(database_url: str, bucket: Any, sandbox: Sandbox) -> None:
    gateway = Parts(settings_for(database_url, bucket, sandbox, kling_base_url=f"{sandbox.url}/kling"))
    assert submit_request(gateway).state is TaskState.SUBMITTED
    gateway.close()


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["1201", "1203", "1300", "1301"])
@ONE_DATABASE
def test_a_definite_refusal_fails_the_task(parts: Parts, sandbox: Sandbox, code: str) -> None:
    sandbox.set(create_faults=[code])
    task = submit_request(parts)
    assert (task.state, task.step, task.lease, task.due_at) == (TaskState.FAILED, None, None, None)
    assert f"code {code}" in (task.error or "")
    assert len(creates(sandbox)) == 1


@pytest.mark.parametrize("code", ["1302", "1303"])
def test_throttled_create_continues_from_its_row(parts: Parts, sandbox: Sandbox, code: str) -> None:
    sandbox.set(create_faults=[code, code])
    task = submit_request(parts)
    assert (task.state, task.step, task.sent_at) == (TaskState.CREATED, Step.CREATE, None)
    assert f"code {code}" in (task.note or "")
    assert 0 < due_in(parts, task) <= 30
    assert go_on(parts).state is TaskState.CREATED
    again = go_on(parts)
    assert (again.state, again.note, again.attempts) == (TaskState.SUBMITTED, None, 0)
    assert len(sandbox.ledger().tasks) == 1


@pytest.mark.databases("sqlite")
def test_a_full_account_is_asked_again_until_there_is_room(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(concurrency_limit=1)
    submit_request(parts, "first")
    assert submit_request(parts).state is TaskState.CREATED
    sandbox.set(concurrency_limit=2)
    assert go_on(parts).state is TaskState.SUBMITTED
    assert [task.external_task_id for task in sandbox.ledger().tasks] == ["first", ID]


def test_a_request_that_never_left_is_sent_without_looking_it_up(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.stop()
    task = submit_request(parts)
    assert (task.state, task.sent_at) == (TaskState.CREATED, None)
    sandbox.start()
    assert go_on(parts).state is TaskState.SUBMITTED
    assert sandbox.ledger().counts["query"] == 0


# -- unclear answers ----------------------------------------------------------------------------------------------

UNCLEAR = ["5000", "5001", "5002", "html", "broken", "hang"]


@pytest.mark.parametrize("fault", UNCLEAR)
@pytest.mark.databases("sqlite")
def test_an_unclear_answer_after_creation_is_looked_up(parts: Parts, sandbox: Sandbox, fault: str) -> None:
    task = submit_with_fault(parts, sandbox, f"{fault}:created")
    assert (task.state, task.step, task.lease) == (TaskState.CREATED, Step.CREATE, None)
    assert task.sent_at is not None
    found = go_on(parts)
    assert (found.state, found.provider_task_id) == (TaskState.SUBMITTED, sandbox.ledger().task(ID).task_id)
    assert len(creates(sandbox)) == 1


@pytest.mark.parametrize("fault", UNCLEAR)
@ONE_DATABASE
def test_an_unclear_answer_before_creation_is_sent_again_after_two_misses(
    parts: Parts, sandbox: Sandbox, fault: str
) -> None:
    submit_with_fault(parts, sandbox, fault)
    missed = go_on(parts)
    assert missed.missed_at is not None
    assert due_in(parts, missed) > 8
    assert go_on(parts).missed_at == missed.missed_at
    assert len(creates(sandbox)) == 1
    again = go_on(parts, missed_at=missed.missed_at - timedelta(seconds=10))
    assert (again.state, again.external_task_id) == (TaskState.SUBMITTED, ID)
    assert [body["external_task_id"] for body in creates(sandbox)] == [ID, ID]
    assert len(sandbox.ledger().tasks) == 1


@ONE_DATABASE
def test_a_clock_that_is_set_forward_is_no_second_miss(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_with_fault(parts, sandbox, UNCLEAR[0])
    missed, now = go_on(parts), parts.database.now()
    with monkeypatch.context() as patch:
        patch.setattr(type(parts.database), "now", lambda _: now + timedelta(hours=1))
        assert (go_on(parts).missed_at, len(creates(sandbox))) == (missed.missed_at, 1)
    assert go_on(parts, missed_at=LONG_AGO).state is TaskState.SUBMITTED


@ONE_DATABASE
def test_a_miss_from_a_clock_that_was_ahead_puts_nothing_off(parts: Parts, sandbox: Sandbox) -> None:
    submit_with_fault(parts, sandbox, UNCLEAR[0])
    again = go_on(parts, missed_at=parts.database.now() + timedelta(days=1))
    assert again.missed_at is not None
    assert again.missed_at <= parts.database.now()
    assert due_in(parts, again) <= BACKOFF_CAP_SECONDS
    assert len(creates(sandbox)) == 1, "the first miss by the right clock"


def test_task_that_is_found_late_is_not_sent_again(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["5000:created"], query_lag_seconds=600)
    submit_request(parts)
    assert go_on(parts).missed_at is not None
    sandbox.world.tasks[sandbox.ledger().task(ID).task_id].visible_ms = 0
    assert go_on(parts, missed_at=LONG_AGO).state is TaskState.SUBMITTED
    assert len(creates(sandbox)) == 1


def test_task_found_after_a_second_send_is_ours(parts: Parts, sandbox: Sandbox) -> None:
    """The provider's reads lag so far behind that we send again. "Already exists" reveals the task, and a later read
    finds it.
    """
    sandbox.set(create_faults=["5000:created"], query_lag_seconds=600)
    submit_request(parts)
    go_on(parts, missed_at=LONG_AGO)
    assert [create.code for create in sandbox.ledger().creates] == [5000, 1201]
    assert task_of(parts, ID).state is TaskState.CREATED
    sandbox.world.tasks[sandbox.ledger().task(ID).task_id].visible_ms = 0
    assert go_on(parts).state is TaskState.SUBMITTED
    assert len(sandbox.ledger().tasks) == 1


@pytest.mark.parametrize("fault", ["5001", "html", "1002"])
@ONE_DATABASE
def test_lookup_without_an_answer_decides_nothing(parts: Parts, sandbox: Sandbox, fault: str) -> None:
    sandbox.set(create_faults=["5000:created"])
    submit_request(parts)
    sandbox.set(query_faults=[fault])
    unread = go_on(parts)
    assert (unread.state, unread.missed_at) == (TaskState.CREATED, None)
    assert go_on(parts).state is TaskState.SUBMITTED
    assert len(creates(sandbox)) == 1


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.databases("sqlite")
def test_list_shows_whether_a_create_arrived_if_tasks_cannot_be_read(
    parts: Parts, sandbox: Sandbox, arrived: bool
) -> None:
    sandbox.set(create_faults=["5000:created" if arrived else "5000"], query_faults=["1202"])
    submit_request(parts)
    task = go_on(parts)
    assert (task.state is TaskState.SUBMITTED, task.missed_at is None) == (arrived, arrived)
    assert len(creates(sandbox)) == 1


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(("fault", "level"), [("5001", "warning"), ("1302", "info")])
def test_create_that_a_fault_delays_is_a_warning(parts: Parts, sandbox: Sandbox, fault: str, level: str) -> None:
    sandbox.set(create_faults=[fault])
    with capture_logs() as lines:
        submit_request(parts)
    (line,) = [line for line in lines if line["event"] == "task.create_retry_scheduled"]
    assert line["log_level"] == level


@pytest.mark.databases("sqlite")
def test_lookup_without_an_answer_for_an_hour_is_logged_as_an_error(
    parts: Parts, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox.set(create_faults=["5000:created"], query_faults=["5001"] * 2)
    submit_request(parts)
    go_on(parts)
    assert "task.create_not_confirmed" not in capsys.readouterr().out
    long_tried = {"created_at": parts.database.now() - timedelta(hours=1), "attempts": 5}
    assert go_on(parts, **long_tried).state is TaskState.CREATED
    assert "task.create_not_confirmed" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["5001", "1002"])
@ONE_DATABASE
def test_lookup_without_an_answer_ends_with_the_result_lifetime(parts: Parts, sandbox: Sandbox, fault: str) -> None:
    sandbox.set(create_faults=["5000:created"], query_faults=[fault] * 2)
    submit_request(parts)
    lifetime = timedelta(seconds=parts.settings.result_lifetime_seconds)
    assert go_on(parts, sent_at=parts.database.now() - lifetime + timedelta(minutes=1)).state is TaskState.CREATED
    ended = go_on(parts, sent_at=parts.database.now() - lifetime)
    assert (ended.state, ended.step, ended.due_at) == (TaskState.FAILED, None, None)
    assert "no answer whether it arrived" in (ended.error or "")
    assert submit_request(parts, adopt=True).state is TaskState.SUBMITTED


@ONE_DATABASE
def test_retry_of_all_reads_a_create_that_ended_in_doubt_and_sends_none(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["5000:created", "1301"], query_faults=["5001"])
    submit_request(parts)
    ended = go_on(parts, sent_at=parts.database.now() - timedelta(seconds=parts.settings.result_lifetime_seconds))
    assert (ended.state, submit_request(parts, "refused").state) == (TaskState.FAILED, TaskState.FAILED)
    operator = Operator(parts.database, parts.providers, parts.schedule)
    assert +operator.retry_failed(limit=10).counts == {"reads_due": 1}
    run(parts, "reads", "creates")
    assert (task_of(parts, ID).provider_task_id is None, len(creates(sandbox))) == (False, 2)
    assert task_of(parts, "refused").step is None


@pytest.mark.databases("sqlite")
def test_create_of_an_existing_unreadable_task_ends(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["5000:created"], query_lag_seconds=600)
    submit_request(parts)
    assert go_on(parts, missed_at=LONG_AGO).state is TaskState.CREATED
    task = go_on(parts, attempts=UNREAD_TRIES - 1, missed_at=LONG_AGO)
    assert (task.state, task.step) == (TaskState.FAILED, None)
    assert "--adopt" in (task.error or "")


def test_create_that_keeps_failing_is_sent_less_often(parts: Parts, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["5000"])
    submit_request(parts)
    random.seed(7)  # full jitter: some waits are short
    assert due_in(parts, go_on(parts, attempts=20)) > 4 * NOT_FOUND_AGAIN_SECONDS


@pytest.mark.parametrize("arrived", [True, False])
def test_a_crashed_submitter_is_taken_over(parts: Parts, sandbox: Sandbox, arrived: bool) -> None:
    """The row's lease has expired, and it is unknown whether its request was sent."""
    now = parts.database.now()
    with parts.database.write() as session:
        new_task(
            session, external_task_id=ID, request=REQUEST, created_at=now, sent_at=now, attempts=1, lease=uuid.uuid4()
        )
    if arrived:
        make_upstream(parts, sandbox, seconds_ago=0)
    task = go_on(parts)
    assert (task.state is TaskState.SUBMITTED, task.missed_at is None) == (arrived, arrived)
    assert go_on(parts, missed_at=LONG_AGO).state is TaskState.SUBMITTED
    assert [create.code for create in sandbox.ledger().creates] == [0]


def test_a_row_that_keeps_ending_its_workers_is_parked(parts: Parts, sandbox: Sandbox) -> None:
    with parts.database.write() as session:
        task = new_task(session, external_task_id=ID, request=REQUEST, losses=6, lease=uuid.uuid4())
    parts.submitter.create_step.work(task)
    assert "ended its worker 6 times" in (task_of(parts, ID).error or "")
    assert creates(sandbox) == []


# -- "already exists" ---------------------------------------------------------------------------------------------


def test_an_existing_task_made_after_our_row_is_ours(parts: Parts, sandbox: Sandbox) -> None:
    """A minute's difference between the two clocks is tolerated."""
    made = make_upstream(parts, sandbox, seconds_ago=55)
    task = submit_request(parts)
    assert (task.state, task.provider_task_id, task.error) == (TaskState.SUBMITTED, made, None)


def test_an_older_existing_task_is_a_conflict_until_it_is_adopted(parts: Parts, sandbox: Sandbox) -> None:
    made = make_upstream(parts, sandbox, seconds_ago=65)
    refused = submit_request(parts)
    assert (refused.state, refused.provider_task_id) == (TaskState.FAILED, None)
    assert "--adopt" in (refused.error or "")
    adopted = submit_request(parts, adopt=True)
    assert (adopted.id, adopted.state, adopted.provider_task_id) == (refused.id, TaskState.SUBMITTED, made)
    assert len(sandbox.ledger().tasks) == 1


def test_dismissed_task_that_is_adopted_is_not_over(parts: Parts, sandbox: Sandbox) -> None:
    make_upstream(parts, sandbox, seconds_ago=65)
    submit_request(parts)
    Operator(parts.database, parts.providers, parts.schedule).dismiss(ID, "not ours")
    adopted = submit_request(parts, adopt=True)
    assert (is_over(adopted), adopted.note) == (False, None)


def test_adoption_takes_over_an_existing_task_at_once(parts: Parts, sandbox: Sandbox) -> None:
    made = make_upstream(parts, sandbox, seconds_ago=10_000)
    task = submit_request(parts, adopt=True)
    assert (task.state, task.provider_task_id) == (TaskState.SUBMITTED, made)


@pytest.mark.databases("sqlite")
def test_an_unclear_answer_for_an_older_task_is_a_conflict(parts: Parts, sandbox: Sandbox) -> None:
    make_upstream(parts, sandbox, seconds_ago=65)
    sandbox.set(create_faults=["5000"])
    submit_request(parts)
    assert "--adopt" in (go_on(parts).error or "")


@ONE_DATABASE
def test_an_unclear_create_from_a_clock_that_was_ahead_is_ours(parts: Parts, sandbox: Sandbox) -> None:
    """The clock was set back before the task was read, so its row seems younger than the task."""
    sandbox.set(create_faults=["5000:created"])
    submit_request(parts)
    found = go_on(parts, created_at=parts.database.now() + timedelta(hours=1))
    assert (found.state, len(creates(sandbox))) == (TaskState.SUBMITTED, 1)


@pytest.mark.databases("sqlite", "postgresql")
def test_an_unclear_create_of_a_host_whose_clock_is_ahead_is_ours(parts: Parts, sandbox: Sandbox) -> None:
    """The provider's times seemed older than the row, and the task failed here while it was paid for there."""
    skewed = Kling(base_url=sandbox.url, api_key=parts.settings.kling_api_key, now=lambda: time.time() + 300)
    parts.__dict__["kling"] = skewed
    sandbox.set(create_faults=["5000:created"])
    submit_request(parts)
    for made in sandbox.world.tasks.values():
        made.created_ms -= 300_000
    found = go_on(parts)
    assert (found.state, found.error, len(creates(sandbox))) == (TaskState.SUBMITTED, None, 1)


@ONE_DATABASE
def test_a_task_whose_own_id_is_our_external_id_is_not_ours(parts: Parts, sandbox: Sandbox) -> None:
    """A query takes either id, so it finds the other task."""
    other = submit_request(parts, "first").provider_task_id
    assert other is not None
    sandbox.set(create_faults=["5000"])
    submit_request(parts, other)
    with parts.database.write() as session:
        session.execute(update(Task).where(Task.external_task_id == other).values(due_at=LONG_AGO))
    run(parts, "creates")
    found = task_of(parts, other)
    assert (found.state, found.provider_task_id) == (TaskState.FAILED, None)


# -- callbacks that overtake the answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "state"), [("a boat", TaskState.SUCCEEDED), ("[fail]", TaskState.FAILED)])
def test_a_callback_may_overtake_the_create_answer(
    parts: Parts, sandbox: Sandbox, web: Web, prompt: str, state: TaskState
) -> None:
    sandbox.set(submitted_seconds=0, processing_seconds=0)
    confirm = Parts(parts.settings.model_copy(update={"confirm": "never"}))
    asking = threading.Thread(target=submit_request, args=(parts,), kwargs={"prompt": prompt})
    callbacks = Worker(confirm.database, confirm.lanes()[:1], lease_seconds=5, grace_seconds=0)
    with unanswered(sandbox):
        asking.start()
        wait_until(lambda: callbacks.run_until_idle() and task_of(parts, ID).state is state)
        assert task_of(parts, ID).step is Step.CREATE
    asking.join()
    task = task_of(parts, ID)
    assert (task.state, task.lease, task.step is Step.CREATE) == (state, None, False)
    assert task.provider_task_id == sandbox.ledger().task(ID).task_id
    confirm.close()


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_a_create_waits_while_the_disk_has_no_room_for_its_callback(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.set(create_faults=["1302"])
    parts.submitter.submit(REQUEST, external_task_id="due")
    sent = len(creates(sandbox))
    with monkeypatch.context() as patch:
        patch.setattr(free_space, "MIN_FREE_SHARE", 2.0)
        task = parts.submitter.submit(REQUEST, external_task_id="new").task
        assert (task.state, task.sent_at, task.queued_at is None) == (TaskState.CREATED, None, False)
        make_due_now(parts)
        run(parts, "creates")
        assert len(creates(sandbox)) == sent
        for name in ("due", "new"):
            assert "the disk of the database has" in (task_of(parts, name).note or "")
    with parts.database.write() as session:
        session.execute(update(Task).values(queued_at=LONG_AGO))
    wait_until(lambda: run(parts, "creates") + 1 and len(creates(sandbox)) == sent + 2)
